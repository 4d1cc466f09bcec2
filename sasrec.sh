#!/usr/bin/env bash
# Baselines on the CSVs of stage 3: MODEL=popularity, markov, sasrec, gru4rec or caser. Edit the variables here or
# set them in the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source launch.sh

MODEL=${MODEL:-sasrec}
TRAIN_FILE=${TRAIN_FILE:-}
VALID_FILE=${VALID_FILE:-}
TEST_FILE=${TEST_FILE:-}
INFO_FILE=${INFO_FILE:-}
OUTPUT_DIR=${OUTPUT_DIR:-output/$MODEL}
SEED=${SEED:-42}
MAX_HISTORY=${MAX_HISTORY:-10}
DEVICE=${DEVICE:-}
HIDDEN_SIZE=${HIDDEN_SIZE:-64}
DROPOUT=${DROPOUT:-0.2}
TIE_EMBEDDINGS=${TIE_EMBEDDINGS:-True}
POPULARITY_BIAS=${POPULARITY_BIAS:-True}
NUM_LAYERS=${NUM_LAYERS:-2}                # sasrec, gru4rec
NUM_HEADS=${NUM_HEADS:-2}                  # sasrec
NUM_FILTERS=${NUM_FILTERS:-16}             # caser, and the next two
FILTER_SIZES=${FILTER_SIZES:-2,3,4}
NUM_VERTICAL=${NUM_VERTICAL:-4}
LOSS=${LOSS:-ce}
NEGATIVES=${NEGATIVES:-1}                  # with LOSS=bce
LOSS_POSITIONS=${LOSS_POSITIONS:-last}
EPOCHS=${EPOCHS:-9}
SAMPLE=${SAMPLE:-30000}
BATCH_SIZE=${BATCH_SIZE:-64}
LEARNING_RATE=${LEARNING_RATE:-1e-3}
WEIGHT_DECAY=${WEIGHT_DECAY:-0.01}
EARLY_STOP=${EARLY_STOP:-5}

usage() {
    cat <<'TEXT'
usage: TRAIN_FILE=<csv> VALID_FILE=<csv> TEST_FILE=<csv> INFO_FILE=<txt> [VARIABLE=value ...] bash sasrec.sh

Trains and scores one baseline; writes metrics.json (and a trained model's checkpoint) into OUTPUT_DIR, by default
output/$MODEL. MODEL is popularity, markov, sasrec, gru4rec or caser. Paths are taken from the project's root. Every
variable at the top of this file can be set in the environment; `python sasrec.py --help` says what each means.
TEXT
}

refuse_arguments "$@"
require TRAIN_FILE VALID_FILE TEST_FILE INFO_FILE
exec python sasrec.py \
    --model "$MODEL" \
    --train_file "$TRAIN_FILE" \
    --valid_file "$VALID_FILE" \
    --test_file "$TEST_FILE" \
    --info_file "$INFO_FILE" \
    --output_dir "$OUTPUT_DIR" \
    --seed "$SEED" \
    --max_history "$MAX_HISTORY" \
    --device "$DEVICE" \
    --hidden_size "$HIDDEN_SIZE" \
    --dropout "$DROPOUT" \
    --tie_embeddings "$TIE_EMBEDDINGS" \
    --popularity_bias "$POPULARITY_BIAS" \
    --num_layers "$NUM_LAYERS" \
    --num_heads "$NUM_HEADS" \
    --num_filters "$NUM_FILTERS" \
    --filter_sizes "$FILTER_SIZES" \
    --num_vertical "$NUM_VERTICAL" \
    --loss "$LOSS" \
    --negatives "$NEGATIVES" \
    --loss_positions "$LOSS_POSITIONS" \
    --epochs "$EPOCHS" \
    --sample "$SAMPLE" \
    --batch_size "$BATCH_SIZE" \
    --learning_rate "$LEARNING_RATE" \
    --weight_decay "$WEIGHT_DECAY" \
    --early_stop "$EARLY_STOP"
