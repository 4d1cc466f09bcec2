#!/usr/bin/env bash
# Stage 6: HR, NDCG and MRR of a checkpoint on a test CSV.
#
#     BASE_MODEL=… TEST_DATA_PATH=… INFO_FILE=… TRAIN_FILE=… bash evaluate.sh
#
# Reads BASE_MODEL TEST_DATA_PATH INFO_FILE, and TRAIN_FILE if given; writes RESULT_JSON_DATA (predictions) and, next to
# it, .parquet, .metrics.json and .ranks.npz. Re-running skips a finished evaluation and resumes a killed one. An empty
# value below is the script's default; any other option can be set too, as a variable (NUM_BEAMS=20) or an argument
# (--num_beams 20).
#
# NPROC processes on this node share the rows (default: one per GPU, or 1). For several nodes set NNODES, NODE_RANK,
# MASTER_ADDR and MASTER_PORT on each; the first one writes the results.
source "$(dirname "${BASH_SOURCE[0]}")/shell/launcher.sh"

# ---- model and data
BASE_MODEL=${BASE_MODEL:-}
TEST_DATA_PATH=${TEST_DATA_PATH:-}
INFO_FILE=${INFO_FILE:-}
TRAIN_FILE=${TRAIN_FILE:-}
CATEGORY=${CATEGORY:-}           # empty: as the checkpoint was trained, and so for the next two
MAX_HISTORY=${MAX_HISTORY:-}
SPACE=${SPACE:-}                 # vocab or catalog

# ---- search
NUM_BEAMS=${NUM_BEAMS:-}
BACKEND=${BACKEND:-}             # vllm: the same lists by vLLM
UNSEEN=${UNSEEN:-}               # False: skip the protocol without the items that the user already has
TEST_ROWS=${TEST_ROWS:-}         # rows to evaluate, drawn by SEED
SEED=${SEED:-}

# ---- speed
BATCH_SIZE=${BATCH_SIZE:-}
BATCH_TOKENS=${BATCH_TOKENS:-}
DTYPE=${DTYPE:-}                 # float32 or bfloat16

# ---- output
RESULT_JSON_DATA=${RESULT_JSON_DATA:-}

launch torchrun evaluate.py "$@"
