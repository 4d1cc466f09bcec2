# Sourced by shell/launcher.sh: how many GPUs, processes and threads this node has, and how its threads wait.

count_cores() { nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1; }

# GPUs that CUDA shows to a process here. MIG instances and error texts of nvidia-smi are not counted.
count_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | awk '/^ *-/ { exit } /[0-9A-Za-z]/ { n++ } END { print n + 0 }'
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
    [[ $NPROC =~ ^[1-9][0-9]*$ ]] || die "NPROC is '$NPROC', expected a number of processes, at least 1"
    [[ $NNODES =~ ^[1-9][0-9]*$ ]] || die "NNODES is '$NNODES', expected a number of nodes, at least 1"
    THREADS=$((($(count_cores) + NPROC - 1) / NPROC))
    NODE_RANK=${NODE_RANK:-0}
    MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
    MASTER_PORT=${MASTER_PORT:-$((NNODES > 1 ? 29500 : 0))} # 0: a free port
}

# OpenMP threads spin while they wait. On a busy CPU that slows every process many times; on a quiet one it is twice as
# fast as sleeping. Chosen by the load of the last minute, unless the user has set it.
choose_wait_policy() {
    [ -z "${OMP_WAIT_POLICY:-}" ] && [ "$(count_gpus)" -eq 0 ] && [ -r /proc/loadavg ] || return 0
    local cores
    cores=$(count_cores)
    if awk -v cores="$cores" '{ exit !($1 > cores / 2) }' /proc/loadavg; then
        OMP_WAIT_POLICY=PASSIVE
        echo "the machine is busy (load $(cut -d' ' -f1 /proc/loadavg) on $cores cores): OMP_WAIT_POLICY=PASSIVE"
    fi
}
