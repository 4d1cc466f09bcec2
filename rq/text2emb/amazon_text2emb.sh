#!/usr/bin/env bash
# Text embedding: embeds the text of each item with an encoder that sentence-transformers can load.
#
#     DATASET=<D> ROOT=<folder> PLM_NAME=<name> PLM_CHECKPOINT=<folder> bash rq/text2emb/amazon_text2emb.sh
#
# Reads ROOT/DATASET.item.json; writes ROOT/DATASET.emb-PLM_NAME-td.npy, float32 (items, dim), row i is item i.
# Re-running resumes a killed run and skips finished embeddings. An empty value below is the script's default; any other
# option can be set too, as a variable (DEVICE=cpu) or an argument (--device cpu).
#
# accelerate starts NPROC processes on this node (default: one per GPU, or 1); they share the items. For several nodes set
# NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT on each.
source "$(dirname "${BASH_SOURCE[0]}")/../../shell/launcher.sh"

# ---- data
DATASET=${DATASET:-}
ROOT=${ROOT:-}

# ---- encoder
PLM_NAME=${PLM_NAME:-}                # short name, for the file name
PLM_CHECKPOINT=${PLM_CHECKPOINT:-}    # folder: sentence-transformers, or any encoder or causal LM of Hugging Face
MAX_SENT_LEN=${MAX_SENT_LEN:-}        # tokens
POOLING=${POOLING:-}                  # mean, cls, max, lasttoken, …; empty: as the encoder's folder says
PROMPT=${PROMPT:-}                    # text before each item's text
PROMPT_NAME=${PROMPT_NAME:-}          # or one of the encoder's own prompts
WORD_DROP_RATIO=${WORD_DROP_RATIO:-}
SEED=${SEED:-}

# ---- speed
BATCH_TOKENS=${BATCH_TOKENS:-}        # tokens per step, padding included
DTYPE=${DTYPE:-}                      # float32, bfloat16 or float16

ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-config/$([ "$(count_gpus)" -gt 0 ] && echo ddp || echo cpu).yaml}
launch accelerate rq.text2emb.amazon_text2emb "$@"
