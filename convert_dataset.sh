#!/usr/bin/env bash
# Stage 3: .inter samples, item texts and SIDs to the published CSV layout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source launch.sh

DATASET_NAME=${DATASET_NAME:-}           # <D> of the file names
DATA_DIR=${DATA_DIR:-}                   # folder with <D>.item.json, <D>.index.json, <D>.{train,valid,test}.inter
OUTPUT_DIR=${OUTPUT_DIR:-}               # folder that gets train/ valid/ test/ info/
MAX_HISTORY=${MAX_HISTORY:-10}           # items of history a row keeps

usage() {
    cat <<'TEXT'
usage: DATASET_NAME=… DATA_DIR=… OUTPUT_DIR=… bash convert_dataset.sh

reads   DATA_DIR/<D>.item.json, .index.json, .train.inter, .valid.inter, .test.inter
writes  OUTPUT_DIR/{train,valid,test}/<D>.csv and OUTPUT_DIR/info/<D>.txt
MAX_HISTORY=10: items of history a row keeps, the latest ones
TEXT
}

refuse_arguments "$@"
require DATASET_NAME DATA_DIR OUTPUT_DIR
exec python convert_dataset.py --dataset_name "$DATASET_NAME" --data_dir "$DATA_DIR" \
    --output_dir "$OUTPUT_DIR" --max_history "$MAX_HISTORY"
