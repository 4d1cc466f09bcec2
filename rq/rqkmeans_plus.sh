#!/usr/bin/env bash
# RQ-KMeans+: an RQ-VAE that starts from the codebooks of constrained RQ-KMeans; ends with the index.
#
#     DATA_PATH=<D>.emb-<plm>-td.npy CKPT_DIR=<folder> PRETRAINED_CODEBOOK_PATH=<D>.codebooks_constrained.npz \
#         bash rq/rqkmeans_plus.sh
#
# Reads DATA_PATH and the codebooks of rq/rqkmeans_constrained.sh. Writes checkpoints to CKPT_DIR, and the index with its
# quality report to OUTPUT_FILE, default CKPT_DIR/<D>.index.json. Re-running resumes a killed training and skips what is
# finished. An empty value below is the script's default; any other option can be set too, as a variable (BETA=0.5) or an
# argument (--beta 0.5). Lists are separated by spaces.
source "$(dirname "${BASH_SOURCE[0]}")/../shell/launcher.sh"

# ---- data
DATA_PATH=${DATA_PATH:-}
PRETRAINED_CODEBOOK_PATH=${PRETRAINED_CODEBOOK_PATH:-}
CKPT_DIR=${CKPT_DIR:-}
OUTPUT_FILE=${OUTPUT_FILE:-}

# ---- model
LAYERS=${LAYERS:-}                    # hidden sizes, such as "512 256 128"
QUANT_LOSS_WEIGHT=${QUANT_LOSS_WEIGHT:-}
SK_EPSILONS=${SK_EPSILONS:-}          # balances the codes in training, such as "0.01 0.01 0.01"

# ---- training
LR=${LR:-}
EPOCHS=${EPOCHS:-}
BATCH_SIZE=${BATCH_SIZE:-}
EVAL_STEP=${EVAL_STEP:-}              # epochs between evaluations
LR_SCHEDULER_TYPE=${LR_SCHEDULER_TYPE:-}
WARMUP_EPOCHS=${WARMUP_EPOCHS:-}
WEIGHT_DECAY=${WEIGHT_DECAY:-}
SEED=${SEED:-}

# ---- semantic IDs
COLLISION=${COLLISION:-}              # none, sinkhorn, nearest_free or extra_token

launch python rq.rqkmeans_plus "$@"
