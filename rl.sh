#!/usr/bin/env bash
# Stage 5: reinforcement learning (GRPO) over catalog-constrained completions.
#
#     MODEL_PATH=… TRAIN_FILE=… EVAL_FILE=… INFO_FILE=… BASELINE_PATH=… bash rl.sh
#
# Reads MODEL_PATH (the SFT checkpoint) TRAIN_FILE EVAL_FILE INFO_FILE, and BASELINE_PATH for REWARD_TYPE sasrec or dense;
# writes a Hugging Face checkpoint to OUTPUT_DIR. Re-running resumes a killed run and skips a finished one. The values
# below are the recipe of docs/rl.md. An empty value is the script's default; any other option can be set too, as a
# variable (TOP_P=0.9) or an argument (--top_p 0.9).
#
# accelerate starts NPROC processes on this node (default: one per GPU, or 1) with the file ACCELERATE_CONFIG of config/.
# For several nodes set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT on each.
source "$(dirname "${BASH_SOURCE[0]}")/shell/launcher.sh"

# ---- data and model
MODEL_PATH=${MODEL_PATH:-}
TRAIN_FILE=${TRAIN_FILE:-}
EVAL_FILE=${EVAL_FILE:-}
INFO_FILE=${INFO_FILE:-}
CATEGORY=${CATEGORY:-}                        # empty: as the checkpoint was trained
RL_TASKS=${RL_TASKS:-}                        # sid_seq, title2sid, title_seq2sid; title2sid:1000 uses at most 1000 rows
TRAIN_ROWS=${TRAIN_ROWS:-}                    # rows of TRAIN_FILE, drawn by SEED
SEED=${SEED:-}

# ---- generation
NUM_GENERATIONS=${NUM_GENERATIONS:-32}        # wider groups contain the target more often
SPACE=${SPACE:-${LOGP_SPACE:-catalog}}        # catalog: no probability is trained on tokens that the trie forbids
BEAM_SEARCH=${BEAM_SEARCH:-}                  # False: the group is sampled
DYNAMIC_SAMPLING=${DYNAMIC_SAMPLING:-}
ADD_GT=${ADD_GT:-}

# ---- rewards
REWARD_TYPE=${REWARD_TYPE:-sasrec}            # usually gives each completion a different value, so each group has a signal
REWARD_WEIGHTS=${REWARD_WEIGHTS:-}            # 1,0.5: a weight per reward
REWARD_MODULE=${REWARD_MODULE:-}              # path.py:name, your own reward
SCALE_REWARDS=${SCALE_REWARDS:-none}          # the sasrec reward is in nats; dividing by its deviation inflates small gaps
BASELINE_PATH=${BASELINE_PATH:-${CF_PATH:-}}  # folder of a baseline that sasrec.sh trained
ADA_PATH=${ADA_PATH:-}                        # item embeddings, for REWARD_TYPE semantic

# ---- training
TRAIN_BATCH_SIZE=${TRAIN_BATCH_SIZE:-}        # completions per forward and process
GRADIENT_ACCUMULATION_STEPS=${GRADIENT_ACCUMULATION_STEPS:-8}  # 16 prompts per step and process
NUM_TRAIN_EPOCHS=${NUM_TRAIN_EPOCHS:-}
LEARNING_RATE=${LEARNING_RATE:-1e-4}          # measured with a model of a million weights; lower it for large models
LOSS_TYPE=${LOSS_TYPE:-}                      # grpo, dapo, bnpo, dr_grpo, cispo, sapo, luspo, vespo
BETA=${BETA:-2.0}                             # with 0.04 the KL term is too weak for rewards in nats
MASK_ALL_ZERO=${MASK_ALL_ZERO:-}              # True: groups without a difference in reward leave the loss
GRADIENT_CHECKPOINTING=${GRADIENT_CHECKPOINTING:-}
USE_LORA=${USE_LORA:-}
LORA_R=${LORA_R:-}
LORA_ALPHA=${LORA_ALPHA:-}

# ---- evaluation and tracking
EVAL_STEP=${EVAL_STEP:-0.2}                   # an evaluation of all validation rows takes longer, so fewer of them
EVAL_ROWS=${EVAL_ROWS:--1}                    # a choice among few checkpoints needs many rows
EVAL_BEAMS=${EVAL_BEAMS:-${TEST_BEAM:-50}}    # as many beams as are scored in the end
METRIC_FOR_BEST_MODEL=${METRIC_FOR_BEST_MODEL:-NDCG@50}  # the steadiest metric on few rows
REPORT_TO=${REPORT_TO:-}                      # none, wandb, tensorboard or trackio
WANDB_PROJECT=${WANDB_PROJECT:-}
WANDB_RUN_NAME=${WANDB_RUN_NAME:-}

# ---- output
OUTPUT_DIR=${OUTPUT_DIR:-output/rl}           # the script has no default

ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-config/$([ "$(count_gpus)" -gt 0 ] && echo zero2_opt || echo cpu).yaml}
launch accelerate rl.py "$@"
