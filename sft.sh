#!/usr/bin/env bash
# Stage 4: supervised fine-tuning of a language model on semantic IDs.
#
#     BASE_MODEL=… TRAIN_FILE=… EVAL_FILE=… SID_INDEX_PATH=… ITEM_META_PATH=… bash sft.sh
#
# Reads BASE_MODEL TRAIN_FILE EVAL_FILE SID_INDEX_PATH ITEM_META_PATH; writes a Hugging Face checkpoint to OUTPUT_DIR.
# Re-running resumes a killed run and skips a finished one. An empty value below is the script's default; any other
# option can be set too, as a variable (EVAL_BEAMS=50) or an argument (--eval_beams 50).
#
# NPROC processes run on this node (default: one per GPU, or 1). For several nodes set NNODES, NODE_RANK, MASTER_ADDR and
# MASTER_PORT on each. torchrun starts them; with ACCELERATE_CONFIG=config/zero3.yaml (or another file of config/)
# accelerate does.
source "$(dirname "${BASH_SOURCE[0]}")/shell/launcher.sh"

# ---- data
TRAIN_FILE=${TRAIN_FILE:-}
EVAL_FILE=${EVAL_FILE:-}
SID_INDEX_PATH=${SID_INDEX_PATH:-}
ITEM_META_PATH=${ITEM_META_PATH:-}
USER_PREFERENCE_FILE=${USER_PREFERENCE_FILE:-}   # for the preference tasks
CATEGORY=${CATEGORY:-}                           # the prompts' name for the items
SFT_TASKS=${SFT_TASKS:-}                         # sid_seq,title2sid:0.5,…
MAX_HISTORY=${MAX_HISTORY:-}
CUTOFF_LEN=${CUTOFF_LEN:-}                       # tokens of a row

# ---- model
BASE_MODEL=${BASE_MODEL:-}                       # folder or hub name of a causal LM
TRAIN_FROM_SCRATCH=${TRAIN_FROM_SCRATCH:-}
SID_INIT=${SID_INIT:-}                           # mean or text
FREEZE_LLM=${FREEZE_LLM:-}                       # train only the new tokens' embedding rows
USE_LORA=${USE_LORA:-}
LORA_R=${LORA_R:-}
LORA_ALPHA=${LORA_ALPHA:-}

# ---- training
BATCH_SIZE=${BATCH_SIZE:-1024}                   # the published recipe's, for GPUs; the script's default fits a CPU
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-16}         # the published recipe's
NUM_EPOCHS=${NUM_EPOCHS:-}
LEARNING_RATE=${LEARNING_RATE:-}
LR_SCHEDULER_TYPE=${LR_SCHEDULER_TYPE:-}
WARMUP_RATIO=${WARMUP_RATIO:-}
WEIGHT_DECAY=${WEIGHT_DECAY:-}
PACKING=${PACKING:-}
GRADIENT_CHECKPOINTING=${GRADIENT_CHECKPOINTING:-}
SEED=${SEED:-}

# ---- evaluation and tracking
EVAL_STEP=${EVAL_STEP:-}                         # steps between evaluations; below 1: share of all steps
METRIC_FOR_BEST_MODEL=${METRIC_FOR_BEST_MODEL:-} # eval_loss, HR@10, NDCG@10, …
EARLY_STOPPING_PATIENCE=${EARLY_STOPPING_PATIENCE:-}
REPORT_TO=${REPORT_TO:-}                         # none, wandb, tensorboard or trackio
WANDB_PROJECT=${WANDB_PROJECT:-}
WANDB_RUN_NAME=${WANDB_RUN_NAME:-}

# ---- output
OUTPUT_DIR=${OUTPUT_DIR:-output/sft}             # the script has no default

launch "$([ -n "${ACCELERATE_CONFIG:-}" ] && echo accelerate || echo torchrun)" sft.py "$@"
