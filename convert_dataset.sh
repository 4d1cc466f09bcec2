#!/usr/bin/env bash
# Stage 3, conversion: .inter samples, item texts and SIDs to the published CSV layout.
#
#     DATASET_NAME=… DATA_DIR=… OUTPUT_DIR=… bash convert_dataset.sh
#
# Reads DATA_DIR/<D>.item.json, .index.json, .train.inter, .valid.inter and .test.inter, where <D> is DATASET_NAME; writes
# OUTPUT_DIR/{train,valid,test}/<D>.csv and OUTPUT_DIR/info/<D>.txt. Re-running skips a finished conversion.
source "$(dirname "${BASH_SOURCE[0]}")/shell/launcher.sh"

DATASET_NAME=${DATASET_NAME:-}
DATA_DIR=${DATA_DIR:-}
OUTPUT_DIR=${OUTPUT_DIR:-}
TO_INTER=${TO_INTER:-}          # True: the CSVs of CSV_DIR back to .inter files
MAX_HISTORY=${MAX_HISTORY:-}    # items of history that a row keeps, the latest ones

launch python convert_dataset.py "$@"
