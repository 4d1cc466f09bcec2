#!/usr/bin/env bash
# Stage 4: supervised fine-tuning, by torchrun. Edit the variables here or set them in the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source launch.sh

BASE_MODEL=${BASE_MODEL:-}               # folder or hub name of a causal LM
TRAIN_FILE=${TRAIN_FILE:-}               # train CSV
EVAL_FILE=${EVAL_FILE:-}                 # valid CSV
SID_INDEX_PATH=${SID_INDEX_PATH:-}       # <D>.index.json
ITEM_META_PATH=${ITEM_META_PATH:-}       # <D>.item.json
OUTPUT_DIR=${OUTPUT_DIR:-output/sft}
CATEGORY=${CATEGORY:-}                   # what the prompts call the items

BATCH_SIZE=${BATCH_SIZE:-1024}           # rows a step, over all processes
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-16}
NUM_EPOCHS=${NUM_EPOCHS:-10}
LEARNING_RATE=${LEARNING_RATE:-3e-4}
CUTOFF_LEN=${CUTOFF_LEN:-512}
SFT_TASKS=${SFT_TASKS:-sid_seq,title2sid,sid2title,sid_seq2title,title_seq2title}
GROUP_BY_LENGTH=${GROUP_BY_LENGTH:-True}
FREEZE_LLM=${FREEZE_LLM:-False}
TRAIN_FROM_SCRATCH=${TRAIN_FROM_SCRATCH:-False}
EVAL_STEP=${EVAL_STEP:-0.1}
SAMPLE=${SAMPLE:--1}
SEED=${SEED:-42}
WANDB_PROJECT=${WANDB_PROJECT:-}
WANDB_RUN_NAME=${WANDB_RUN_NAME:-}

usage() {
    cat <<'TEXT'
usage: BASE_MODEL=… TRAIN_FILE=… EVAL_FILE=… SID_INDEX_PATH=… ITEM_META_PATH=… bash sft.sh

reads   BASE_MODEL TRAIN_FILE EVAL_FILE SID_INDEX_PATH ITEM_META_PATH   (required)
writes  OUTPUT_DIR   a Hugging Face checkpoint; started again, it goes on where it was killed

Hyper-parameters are the variables at the top of sft.sh; `python sft.py --help` explains them and lists the rest.
NPROC processes (default: one a GPU, or 1); for several nodes set NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT on each.
TEXT
}

refuse_arguments "$@"
require BASE_MODEL TRAIN_FILE EVAL_FILE SID_INDEX_PATH ITEM_META_PATH
find_processes
rendezvous=(--standalone)
[ "$NNODES" -eq 1 ] || rendezvous=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")

OMP_NUM_THREADS=$THREADS exec torchrun "${rendezvous[@]}" --nproc_per_node "$NPROC" sft.py \
    --base_model "$BASE_MODEL" --train_file "$TRAIN_FILE" --eval_file "$EVAL_FILE" \
    --sid_index_path "$SID_INDEX_PATH" --item_meta_path "$ITEM_META_PATH" \
    --output_dir "$OUTPUT_DIR" --category "$CATEGORY" \
    --batch_size "$BATCH_SIZE" --micro_batch_size "$MICRO_BATCH_SIZE" \
    --num_epochs "$NUM_EPOCHS" --learning_rate "$LEARNING_RATE" --cutoff_len "$CUTOFF_LEN" \
    --sft_tasks "$SFT_TASKS" --group_by_length "$GROUP_BY_LENGTH" --freeze_LLM "$FREEZE_LLM" \
    --train_from_scratch "$TRAIN_FROM_SCRATCH" --eval_step "$EVAL_STEP" --sample "$SAMPLE" --seed "$SEED" \
    --wandb_project "$WANDB_PROJECT" --wandb_run_name "$WANDB_RUN_NAME"
