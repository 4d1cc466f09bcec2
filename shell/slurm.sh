#!/usr/bin/env bash
#SBATCH --job-name=minionerec
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=output/slurm-%j.log
#
# A launcher on the nodes of a Slurm job; options of sbatch override the lines above, variables go to the launcher.
#
#     BASE_MODEL=… TRAIN_FILE=… OUTPUT_DIR=output/sft sbatch shell/slurm.sh sft.sh
#     sbatch --nodes=1 --gpus-per-node=4 shell/slurm.sh evaluate.sh --num_beams 50
#
# Submit it in the project's root, with the environment active. The nodes need the same files. One task a node starts the
# launcher, which starts one process a GPU.
set -euo pipefail
[ -n "${SLURM_JOB_ID:-}" ] || { echo "error: not in a Slurm job; submit it: sbatch shell/slurm.sh LAUNCHER" >&2; exit 2; }
[ -f "${1:-}" ] || { echo "error: '${1:-}' is no launcher; sbatch shell/slurm.sh sft.sh, in the project's root" >&2; exit 2; }

export NNODES=$SLURM_JOB_NUM_NODES
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]} MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))} # jobs on one node use different ports
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' slurm "$@"
