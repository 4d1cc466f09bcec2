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
LR_SCHEDULER_TYPE=${LR_SCHEDULER_TYPE:-cosine}
WARMUP_RATIO=${WARMUP_RATIO:-0.05}
WEIGHT_DECAY=${WEIGHT_DECAY:-0.01}
SFT_TASKS=${SFT_TASKS:-sid_seq,title2sid,sid2title,sid_seq2title,title_seq2title}
USER_PREFERENCE_FILE=${USER_PREFERENCE_FILE:-} # for the preference tasks
GROUP_BY_LENGTH=${GROUP_BY_LENGTH:-True}
PACKING=${PACKING:-False}                # several rows a line, of CUTOFF_LEN tokens together
GRADIENT_CHECKPOINTING=${GRADIENT_CHECKPOINTING:-False}
TRAIN_FROM_SCRATCH=${TRAIN_FROM_SCRATCH:-False}
SID_INIT=${SID_INIT:-mean}               # mean or text
FREEZE_LLM=${FREEZE_LLM:-False}          # train the new tokens' embeddings alone
USE_LORA=${USE_LORA:-False}              # train adapters and the new tokens' embeddings
LORA_R=${LORA_R:-16}
LORA_ALPHA=${LORA_ALPHA:-32}
LORA_DROPOUT=${LORA_DROPOUT:-0.05}
LORA_TARGET_MODULES=${LORA_TARGET_MODULES:-all-linear}
EVAL_STEP=${EVAL_STEP:-0.1}
METRIC_FOR_BEST_MODEL=${METRIC_FOR_BEST_MODEL:-eval_loss} # or HR@10, NDCG@10, … by constrained beams
EARLY_STOPPING_PATIENCE=${EARLY_STOPPING_PATIENCE:-3}
CACHE_DIR=${CACHE_DIR-output/cache}      # tokenised rows; empty: kept nowhere
SAMPLE=${SAMPLE:--1}
SEED=${SEED:-42}
REPORT_TO=${REPORT_TO:-none}             # none, wandb or tensorboard
WANDB_PROJECT=${WANDB_PROJECT:-}
WANDB_RUN_NAME=${WANDB_RUN_NAME:-}
ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-} # config/zero2_opt.yaml, config/zero3.yaml, …; empty: torchrun, DDP

usage() {
    cat <<'TEXT'
usage: BASE_MODEL=… TRAIN_FILE=… EVAL_FILE=… SID_INDEX_PATH=… ITEM_META_PATH=… bash sft.sh

reads   BASE_MODEL TRAIN_FILE EVAL_FILE SID_INDEX_PATH ITEM_META_PATH   (required)
writes  OUTPUT_DIR   a Hugging Face checkpoint; started again, it goes on where it was killed

Hyper-parameters are the variables at the top of sft.sh; `python sft.py --help` explains them and lists the rest.
ACCELERATE_CONFIG starts it by accelerate with a file of config/ (ZeRO-2, ZeRO-3), else torchrun does.
NPROC processes (default: one a GPU, or 1); for several nodes set NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT on each.
TEXT
}

refuse_arguments "$@"
require BASE_MODEL TRAIN_FILE EVAL_FILE SID_INDEX_PATH ITEM_META_PATH
find_processes
if [ -n "$ACCELERATE_CONFIG" ]; then
    start=(accelerate launch --config_file "$ACCELERATE_CONFIG" --num_cpu_threads_per_process "$THREADS"
        --num_processes $((NPROC * NNODES)) --num_machines "$NNODES" --machine_rank "$NODE_RANK"
        --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT")
elif [ "$NNODES" -eq 1 ]; then
    start=(torchrun --standalone --nproc_per_node "$NPROC")
else
    start=(torchrun --nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR"
        --master_port "$MASTER_PORT" --nproc_per_node "$NPROC")
fi

OMP_NUM_THREADS=$THREADS exec "${start[@]}" sft.py \
    --base_model "$BASE_MODEL" --train_file "$TRAIN_FILE" --eval_file "$EVAL_FILE" \
    --sid_index_path "$SID_INDEX_PATH" --item_meta_path "$ITEM_META_PATH" \
    --output_dir "$OUTPUT_DIR" --category "$CATEGORY" --cache_dir "$CACHE_DIR" \
    --batch_size "$BATCH_SIZE" --micro_batch_size "$MICRO_BATCH_SIZE" --num_epochs "$NUM_EPOCHS" \
    --learning_rate "$LEARNING_RATE" --lr_scheduler_type "$LR_SCHEDULER_TYPE" --warmup_ratio "$WARMUP_RATIO" \
    --weight_decay "$WEIGHT_DECAY" --cutoff_len "$CUTOFF_LEN" \
    --sft_tasks "$SFT_TASKS" --user_preference_file "$USER_PREFERENCE_FILE" --sample "$SAMPLE" --seed "$SEED" \
    --group_by_length "$GROUP_BY_LENGTH" --packing "$PACKING" --gradient_checkpointing "$GRADIENT_CHECKPOINTING" \
    --train_from_scratch "$TRAIN_FROM_SCRATCH" --sid_init "$SID_INIT" --freeze_LLM "$FREEZE_LLM" \
    --use_lora "$USE_LORA" --lora_r "$LORA_R" --lora_alpha "$LORA_ALPHA" --lora_dropout "$LORA_DROPOUT" \
    --lora_target_modules "$LORA_TARGET_MODULES" \
    --eval_step "$EVAL_STEP" --metric_for_best_model "$METRIC_FOR_BEST_MODEL" \
    --early_stopping_patience "$EARLY_STOPPING_PATIENCE" \
    --report_to "$REPORT_TO" --wandb_project "$WANDB_PROJECT" --wandb_run_name "$WANDB_RUN_NAME"
