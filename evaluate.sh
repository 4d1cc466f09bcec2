#!/usr/bin/env bash
# Stage 6: HR, NDCG and MRR of a checkpoint. Edit the variables here or set them in the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source launch.sh

BASE_MODEL=${BASE_MODEL:-}               # folder of the checkpoint
TEST_DATA_PATH=${TEST_DATA_PATH:-}       # test CSV
INFO_FILE=${INFO_FILE:-}                 # info file: the catalog
TRAIN_FILE=${TRAIN_FILE:-}               # train CSV: popularity orders items that share a SID
RESULT_JSON_DATA=${RESULT_JSON_DATA:-output/predictions.json}
CATEGORY=${CATEGORY:-}                   # what the prompts call the items

NUM_BEAMS=${NUM_BEAMS:-50}
BATCH_SIZE=${BATCH_SIZE:-8}              # prompts a forward
LENGTH_PENALTY=${LENGTH_PENALTY:-0.0}
K=${K:-0}                                # predictions kept a row; 0: all
SEED=${SEED:-42}

usage() {
    cat <<'TEXT'
usage: BASE_MODEL=… TEST_DATA_PATH=… INFO_FILE=… bash evaluate.sh

reads   BASE_MODEL TEST_DATA_PATH INFO_FILE   (required)   TRAIN_FILE   (optional)
writes  RESULT_JSON_DATA   each test row with its predictions, and *.metrics.json beside it

Hyper-parameters are the variables at the top of evaluate.sh; `python evaluate.py --help` explains them.
NPROC processes share the rows (default: one a GPU, or 1).
TEXT
}

refuse_arguments "$@"
require BASE_MODEL TEST_DATA_PATH INFO_FILE
find_processes

OMP_NUM_THREADS=$THREADS exec torchrun --standalone --nproc_per_node "$NPROC" evaluate.py \
    --base_model "$BASE_MODEL" --test_data_path "$TEST_DATA_PATH" --info_file "$INFO_FILE" --train_file "$TRAIN_FILE" \
    --result_json_data "$RESULT_JSON_DATA" --category "$CATEGORY" --num_beams "$NUM_BEAMS" \
    --batch_size "$BATCH_SIZE" --length_penalty "$LENGTH_PENALTY" --K "$K" --seed "$SEED"
