#!/usr/bin/env bash
# Embed the items' text. Edit the variables here or set them in the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch.sh

DATASET=${DATASET:-}
ROOT=${ROOT:-}
PLM_NAME=${PLM_NAME:-}
PLM_CHECKPOINT=${PLM_CHECKPOINT:-}
MAX_SENT_LEN=${MAX_SENT_LEN:-2048}
BATCH_SIZE=${BATCH_SIZE:-64}
WORD_DROP_RATIO=${WORD_DROP_RATIO:--1}
SEED=${SEED:-42}
DEVICE=${DEVICE:-}

usage() {
    cat <<'TEXT'
usage: DATASET=<D> ROOT=<folder> PLM_NAME=<name> PLM_CHECKPOINT=<folder> bash rq/text2emb/amazon_text2emb.sh

reads   ROOT/DATASET.item.json              titles, descriptions, brands, categories   (required)
        PLM_CHECKPOINT                      Hugging Face folder of the encoder         (required)
writes  ROOT/DATASET.emb-PLM_NAME-td.npy    float32 (items, dim), row i is item i      (PLM_NAME is required)

Variables, with their defaults:
  MAX_SENT_LEN=2048 (tokens) BATCH_SIZE=64 WORD_DROP_RATIO=-1 (off) SEED=42 DEVICE="" (cuda if there is one)
TEXT
}

refuse_arguments "$@"
require DATASET ROOT PLM_NAME PLM_CHECKPOINT
exec python -m rq.text2emb.amazon_text2emb --dataset "$DATASET" --root "$ROOT" --plm_name "$PLM_NAME" \
    --plm_checkpoint "$PLM_CHECKPOINT" --max_sent_len "$MAX_SENT_LEN" --batch_size "$BATCH_SIZE" \
    --word_drop_ratio "$WORD_DROP_RATIO" --seed "$SEED" ${DEVICE:+--device "$DEVICE"}
