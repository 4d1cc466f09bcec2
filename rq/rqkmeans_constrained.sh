#!/usr/bin/env bash
# Constrained RQ-KMeans: semantic IDs from codebooks with clusters of bounded size.
# Edit the variables here or set them in the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch.sh

DATASET=${DATASET:-}
ROOT=${ROOT:-}
DATA_PATH=${DATA_PATH:-}
OUTPUT_FILE=${OUTPUT_FILE:-}
CODEBOOK_PATH=${CODEBOOK_PATH:-}
ITEM_META_PATH=${ITEM_META_PATH:-}
K=${K:-256}
L=${L:-3}
MAX_ITER=${MAX_ITER:-100}
SEED=${SEED:-42}
VERBOSE=${VERBOSE:-False}
COLLISION=${COLLISION:-nearest_free}
SOLVER=${SOLVER:-auto}

usage() {
    cat <<'TEXT'
usage: DATASET=<D> ROOT=<folder> bash rq/rqkmeans_constrained.sh
       DATA_PATH=<D>.emb-<plm>-td.npy bash rq/rqkmeans_constrained.sh

reads   ROOT/<D>.emb-*-td.npy or DATA_PATH   item embeddings, any float (items, dim)   (required)
        ITEM_META_PATH  <D>.item.json, to check the number of rows                      (optional)
writes  OUTPUT_FILE     default <D>.index.json beside the embeddings, and beside it <D>.index.quality.json and .png
        CODEBOOK_PATH   default <D>.codebooks_constrained.npz beside the index

Codebooks that were made before with the same variables are not made again.
Variables, with their defaults:
  K=256 L=3 MAX_ITER=100 SEED=42 VERBOSE=False COLLISION=nearest_free (none, sinkhorn, nearest_free, extra_token)
  SOLVER=auto (flow, transport)
TEXT
}

refuse_arguments "$@"
[ -n "$DATA_PATH" ] || require DATASET ROOT
exec python -m rq.rqkmeans_constrained ${DATASET:+--dataset "$DATASET"} ${ROOT:+--root "$ROOT"} \
    ${DATA_PATH:+--data_path "$DATA_PATH"} ${OUTPUT_FILE:+--output_file "$OUTPUT_FILE"} \
    ${CODEBOOK_PATH:+--codebook_path "$CODEBOOK_PATH"} ${ITEM_META_PATH:+--item_meta_path "$ITEM_META_PATH"} \
    --k "$K" --l "$L" --max_iter "$MAX_ITER" --seed "$SEED" --verbose "$VERBOSE" --collision "$COLLISION" \
    --solver "$SOLVER"
