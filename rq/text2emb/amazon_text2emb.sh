#!/usr/bin/env bash
# Text embedding: embeds the text of each item with a Hugging Face encoder.
#
#     DATASET=<D> ROOT=<folder> PLM_NAME=<name> PLM_CHECKPOINT=<folder> bash rq/text2emb/amazon_text2emb.sh
#
# Reads ROOT/DATASET.item.json; writes ROOT/DATASET.emb-PLM_NAME-td.npy, float32 (items, dim), row i is item i.
# Re-running skips finished embeddings. An empty value below is the script's default; any other option can be set too, as
# a variable (DEVICE=cpu) or an argument (--device cpu).
source "$(dirname "${BASH_SOURCE[0]}")/../../shell/launcher.sh"

# ---- data
DATASET=${DATASET:-}
ROOT=${ROOT:-}

# ---- encoder
PLM_NAME=${PLM_NAME:-}                # short name, for the file name
PLM_CHECKPOINT=${PLM_CHECKPOINT:-}
MAX_SENT_LEN=${MAX_SENT_LEN:-}        # tokens
BATCH_SIZE=${BATCH_SIZE:-}
WORD_DROP_RATIO=${WORD_DROP_RATIO:-}
SEED=${SEED:-}

launch python rq.text2emb.amazon_text2emb "$@"
