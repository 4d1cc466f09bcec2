#!/usr/bin/env bash
# RQ-KMeans by faiss: codebooks and semantic IDs.
#
#     DATASET=<D> ROOT=<folder> bash rq/rqkmeans_faiss.sh
#     DATA_PATH=<D>.emb-<plm>-td.npy bash rq/rqkmeans_faiss.sh
#
# Reads the embeddings, ROOT/<D>.emb-*-td.npy or DATA_PATH. Writes <D>.index.json next to them (OUTPUT_FILE), its quality
# report, and <D>.codebooks_faiss.npz (CODEBOOK_PATH). Re-running skips what is finished. An empty value below is the
# script's default; any other option can be set too, as a variable (VERBOSE=True) or an argument (--verbose True).
source "$(dirname "${BASH_SOURCE[0]}")/../shell/launcher.sh"

# ---- data
DATASET=${DATASET:-}
ROOT=${ROOT:-}
DATA_PATH=${DATA_PATH:-}
OUTPUT_FILE=${OUTPUT_FILE:-}

# ---- clustering
K=${K:-}                              # codes per level
L=${L:-}                              # levels
MAX_ITER=${MAX_ITER:-}
SEED=${SEED:-}

# ---- semantic IDs
COLLISION=${COLLISION:-}              # none, sinkhorn, nearest_free or extra_token

launch python rq.rqkmeans_faiss "$@"
