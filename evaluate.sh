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
SPACE=${SPACE:-}                         # vocab or catalog; empty: the one that the checkpoint's RL used, else vocab
EXCLUDE_SEEN=${EXCLUDE_SEEN:-False}      # recommend no item of the row's own history
BATCH_SIZE=${BATCH_SIZE:-8}              # prompts a forward, at most
BATCH_TOKENS=${BATCH_TOKENS:-16384}      # tokens of prompts a forward, at most
DTYPE=${DTYPE:-}                         # float32 or bfloat16; default: bfloat16 where a GPU has it
MAX_HISTORY=${MAX_HISTORY:-10}           # items of history in a prompt
SAMPLE=${SAMPLE:--1}                     # rows to evaluate, drawn by SEED; -1 for all
LENGTH_PENALTY=${LENGTH_PENALTY:-0.0}
K=${K:-0}                                # predictions kept a row; 0: all
SEED=${SEED:-42}

usage() {
    cat <<'TEXT'
usage: BASE_MODEL=… TEST_DATA_PATH=… INFO_FILE=… bash evaluate.sh

reads   BASE_MODEL TEST_DATA_PATH INFO_FILE   (required)   TRAIN_FILE   (optional)
writes  RESULT_JSON_DATA   each test row with its predictions; *.parquet and *.metrics.json beside it

Hyper-parameters are the variables at the top of evaluate.sh; `python evaluate.py --help` explains them.
NPROC processes share the rows (default: one a GPU, or 1). Killed and started again, it goes on where it was.
TEXT
}

refuse_arguments "$@"
require BASE_MODEL TEST_DATA_PATH INFO_FILE
find_processes

OMP_NUM_THREADS=$THREADS exec torchrun --standalone --nproc_per_node "$NPROC" evaluate.py \
    --base_model "$BASE_MODEL" --test_data_path "$TEST_DATA_PATH" --info_file "$INFO_FILE" --train_file "$TRAIN_FILE" \
    --result_json_data "$RESULT_JSON_DATA" --category "$CATEGORY" --num_beams "$NUM_BEAMS" \
    --space "$SPACE" --exclude_seen "$EXCLUDE_SEEN" --batch_size "$BATCH_SIZE" --batch_tokens "$BATCH_TOKENS" \
    --dtype "$DTYPE" --max_history "$MAX_HISTORY" --sample "$SAMPLE" --length_penalty "$LENGTH_PENALTY" --K "$K" --seed "$SEED"
