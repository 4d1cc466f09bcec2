# Sourced first by every launcher. A launcher then sets the values that a researcher edits and calls `launch`.
#
# Every variable is exported, and the script takes its option --learning_rate from LEARNING_RATE, and so on for all of its
# options, listed in the launcher or not. An empty variable is the script's default. Arguments of the launcher go to the
# script and override variables: `BATCH_SIZE=256 bash sft.sh --eval_beams 50`.
set -euo pipefail
LAUNCHER=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source shell/machine.sh

die() { echo "error: $*" >&2; exit 2; }

# launch HOW SCRIPT ARGUMENT…: run SCRIPT (sft.py, or a module such as rq.rqvae) as HOW says:
#   python       one process
#   torchrun     NPROC processes on each of NNODES nodes
#   accelerate   the same, with the file ACCELERATE_CONFIG
launch() {
    local how=$1 script=$2
    shift 2
    local command=("$script")
    [[ $script == *.py ]] || command=(-m "$script")
    case " $* " in
        *" --help "* | *" -h "*)
            sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$LAUNCHER"
            echo
            MINIONEREC_VARIABLES= exec python "${command[@]}" --help
            ;;
    esac
    if [ "$how" = python ]; then
        shorten_spinning
        exec python "${command[@]}" "$@"
    fi
    find_processes
    shorten_spinning
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$THREADS}
    if [ "$how" = accelerate ]; then
        if [ $((NPROC * NNODES)) -eq 1 ] && [ "$ACCELERATE_CONFIG" = config/cpu.yaml ]; then
            exec python "${command[@]}" "$@"
        fi
        exec python -m minionerec.common.launch accelerate --config_file "$ACCELERATE_CONFIG" \
            --num_cpu_threads_per_process "$OMP_NUM_THREADS" --num_processes $((NPROC * NNODES)) \
            --num_machines "$NNODES" --machine_rank "$NODE_RANK" \
            --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" "${command[@]}" "$@"
    elif [ $((NPROC * NNODES)) -eq 1 ]; then
        exec python "${command[@]}" "$@"
    elif [ "$NNODES" -eq 1 ]; then
        exec python -m minionerec.common.launch torchrun --standalone --nproc_per_node "$NPROC" "${command[@]}" "$@"
    else
        exec python -m minionerec.common.launch torchrun --nnodes "$NNODES" --node_rank "$NODE_RANK" \
            --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --nproc_per_node "$NPROC" "${command[@]}" "$@"
    fi
}

set -a # from here on: functions are not exported
MINIONEREC_VARIABLES=1
