#!/usr/bin/env bash
# Semantic IDs from a trained quantizer or from codebooks, also for items added later.
#
#     CKPT_PATH=<folder> DATA_PATH=<D>.emb-<plm>-td.npy OUTPUT_FILE=<D>.index.json bash rq/generate_indices.sh
#
# Reads CKPT_PATH (a checkpoint, a folder with best_collision.safetensors, or codebooks) and the embeddings DATA_PATH that
# it was trained on. With APPEND, an index of the first rows of DATA_PATH, these SIDs are kept and only the other rows get
# new ones. Writes OUTPUT_FILE and its quality report. Re-running skips a finished index. An empty value below is the
# script's default; any other option can be set too, as a variable (DEVICE=cpu) or an argument (--device cpu).
source "$(dirname "${BASH_SOURCE[0]}")/../shell/launcher.sh"

# ---- data
CKPT_PATH=${CKPT_PATH:-}
DATA_PATH=${DATA_PATH:-}
OUTPUT_FILE=${OUTPUT_FILE:-}
ITEM_META_PATH=${ITEM_META_PATH:-}    # <D>.item.json, to check the number of rows

# ---- semantic IDs
COLLISION=${COLLISION:-}              # none, sinkhorn, nearest_free or extra_token

# ---- items added later
APPEND=${APPEND:-}
APPEND_TOKENS=${APPEND_TOKENS:-}      # codebook or used: what the tokenizer of APPEND's catalog knows

launch python rq.generate_indices "$@"
