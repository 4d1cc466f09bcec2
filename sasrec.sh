#!/usr/bin/env bash
# Baselines: trains and scores one model on the CSVs of stage 3.
#
#     MODEL=sasrec TRAIN_FILE=… VALID_FILE=… TEST_FILE=… INFO_FILE=… bash sasrec.sh
#
# Reads TRAIN_FILE VALID_FILE TEST_FILE INFO_FILE; writes metrics.json, and a trained model's checkpoint, to OUTPUT_DIR.
# Re-running skips a finished run. An empty value below is the script's default; any other option can be set too, as a
# variable (EARLY_STOP=2) or an argument (--early_stop 2).
source "$(dirname "${BASH_SOURCE[0]}")/shell/launcher.sh"

# ---- data
TRAIN_FILE=${TRAIN_FILE:-}
VALID_FILE=${VALID_FILE:-}
TEST_FILE=${TEST_FILE:-}
INFO_FILE=${INFO_FILE:-}
MAX_HISTORY=${MAX_HISTORY:-}          # items of a history that are used

# ---- model
MODEL=${MODEL:-}                      # popularity, markov, sasrec, gru4rec or caser
HIDDEN_SIZE=${HIDDEN_SIZE:-}
NUM_LAYERS=${NUM_LAYERS:-}            # sasrec, gru4rec
NUM_HEADS=${NUM_HEADS:-}              # sasrec
DROPOUT=${DROPOUT:-}
ITEM_FEATURES=${ITEM_FEATURES:-}      # .npy of item vectors instead of item ids

# ---- training
LOSS=${LOSS:-}                        # ce, sampled_softmax or bce
NEGATIVES=${NEGATIVES:-}              # sampled_softmax, bce
EPOCHS=${EPOCHS:-}                    # at most; training stops when valid no longer improves
TIME_BUDGET=${TIME_BUDGET:-}          # seconds of training at most
BATCH_SIZE=${BATCH_SIZE:-}
LEARNING_RATE=${LEARNING_RATE:-}
WEIGHT_DECAY=${WEIGHT_DECAY:-}
SEED=${SEED:-}

# ---- tracking
REPORT_TO=${REPORT_TO:-}              # none, wandb, tensorboard or trackio
WANDB_PROJECT=${WANDB_PROJECT:-}
WANDB_RUN_NAME=${WANDB_RUN_NAME:-}

# ---- output
OUTPUT_DIR=${OUTPUT_DIR:-output/${MODEL:-sasrec}}   # one folder for each model; the script has no default

launch python sasrec.py "$@"
