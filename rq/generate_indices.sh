#!/usr/bin/env bash
# Semantic IDs from a quantizer, also for items added later. Edit the variables here or set them in the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch.sh

CKPT_PATH=${CKPT_PATH:-}
DATA_PATH=${DATA_PATH:-}
OUTPUT_FILE=${OUTPUT_FILE:-}
ITEM_META_PATH=${ITEM_META_PATH:-}
COLLISION=${COLLISION:-nearest_free}
APPEND=${APPEND:-}
APPEND_TOKENS=${APPEND_TOKENS:-codebook}
BATCH_SIZE=${BATCH_SIZE:-20480}
DEVICE=${DEVICE:-}

usage() {
    cat <<'TEXT'
usage: CKPT_PATH=<folder> DATA_PATH=<D>.emb-<plm>-td.npy OUTPUT_FILE=<D>.index.json bash rq/generate_indices.sh

reads   CKPT_PATH       a checkpoint, a folder (its best_collision.safetensors) or codebooks (.npz)   (required)
        DATA_PATH       the embeddings it was trained on; with APPEND, new rows after them            (required)
        ITEM_META_PATH  <D>.item.json, to check the number of rows                                    (optional)
        APPEND          an index of the first rows: its SIDs stay, only new items get theirs          (optional)
writes  OUTPUT_FILE     {"0": ["<a_236>", "<b_231>", "<c_226>"], ...}                                 (required)
        and beside it <D>.index.quality.json and .png

Variables, with their defaults:
  COLLISION=nearest_free (none, sinkhorn, nearest_free, extra_token) BATCH_SIZE=20480 DEVICE="" (cuda if there is one)
  APPEND="" APPEND_TOKENS=codebook (used: the tokenizer of the old catalog knows only the codes in use)
TEXT
}

refuse_arguments "$@"
require CKPT_PATH DATA_PATH OUTPUT_FILE
exec python -m rq.generate_indices --ckpt_path "$CKPT_PATH" --data_path "$DATA_PATH" --output_file "$OUTPUT_FILE" \
    --collision "$COLLISION" --batch_size "$BATCH_SIZE" \
    ${APPEND:+--append "$APPEND" --append_tokens "$APPEND_TOKENS"} \
    ${ITEM_META_PATH:+--item_meta_path "$ITEM_META_PATH"} ${DEVICE:+--device "$DEVICE"}
