# Sourced by shell/launcher.sh: how many GPUs, processes and threads this node has, and how threads wait.

count_cores() { OMP_NUM_THREADS= OMP_THREAD_LIMIT= nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1; }

# GPUs that CUDA shows to a process here. MIG instances and error texts of nvidia-smi are not counted.
count_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        # As CUDA reads it: the devices before the first entry that is none.
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | awk '!/^ *([0-9]+|GPU-.*|MIG-.*) *$/ { exit } { n++ } END { print n + 0 }'
    else
        (nvidia-smi --list-gpus 2>/dev/null || true) | grep -c '^GPU [0-9]' || true
    fi
}

# Sets GPUS, and where they are not set NPROC (processes on this node: one a GPU, or 1), THREADS (cores of each process)
# and NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT of several nodes.
find_processes() {
    GPUS=$(count_gpus)
    NPROC=${NPROC:-$((GPUS > 0 ? GPUS : 1))}
    NNODES=${NNODES:-1}
    NODE_RANK=${NODE_RANK:-0}
    [[ $NPROC =~ ^[1-9][0-9]*$ ]] || die "NPROC is '$NPROC', expected a number of processes, at least 1"
    [[ $NNODES =~ ^[1-9][0-9]*$ ]] || die "NNODES is '$NNODES', expected a number of nodes, at least 1"
    [[ $NODE_RANK =~ ^[0-9]+$ ]] && [ "$NODE_RANK" -lt "$NNODES" ] ||
        die "NODE_RANK is '$NODE_RANK', expected a number from 0 to NNODES - 1 = $((NNODES - 1))"
    THREADS=$((($(count_cores) + NPROC - 1) / NPROC))
    MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
    MASTER_PORT=${MASTER_PORT:-$((NNODES > 1 ? 29500 : 0))} # 0: a free port
    local least=$((NNODES > 1 ? 1 : 0))
    [[ $MASTER_PORT =~ ^[0-9]{1,5}$ ]] && [ "$MASTER_PORT" -ge $least ] && [ "$MASTER_PORT" -le 65535 ] ||
        die "MASTER_PORT is '$MASTER_PORT', expected a port from $least to 65535"
}

# GNU OpenMP's threads, those of torch on Linux, spin while they wait for one another, for so long that processes on a busy
# CPU slow one another many times. A short spin is as fast on a quiet one. What the user set is kept.
shorten_spinning() {
    [ -n "${OMP_WAIT_POLICY:-}${GOMP_SPINCOUNT:-}" ] || export GOMP_SPINCOUNT=1000
}
