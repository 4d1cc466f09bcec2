# What the launchers share; sourced, not run. A launcher defines usage() and sets its variables, then calls:
#   refuse_arguments "$@"    -h and --help print the usage text, any other argument is refused
#   require NAME…            each variable must be set
#   find_processes           NPROC: processes on this node, from the GPUs there are, or 1; THREADS: cores for each
die() { echo "error: $*" >&2; exit 2; }

refuse_arguments() {
    case "${1:-}" in
        "") ;;
        -h | --help) usage; exit 0 ;;
        *) die "unknown argument $1; bash $0 --help lists the variables" ;;
    esac
}

require() {
    local name
    for name in "$@"; do
        [ -n "${!name:-}" ] || die "$name is not set; bash $0 --help lists the variables"
    done
}

find_processes() {
    local gpus
    gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[0-9A-Za-z]' || true)
    fi
    GPUS=$gpus
    NPROC=${NPROC:-$((gpus > 0 ? gpus : 1))}
    THREADS=${OMP_NUM_THREADS:-$(( ($(nproc) + NPROC - 1) / NPROC ))}
    NNODES=${NNODES:-1}
    NODE_RANK=${NODE_RANK:-0}
    MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
    MASTER_PORT=${MASTER_PORT:-$((NNODES > 1 ? 29500 : 0))} # 0: accelerate finds a free one
}
