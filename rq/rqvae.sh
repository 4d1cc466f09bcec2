#!/usr/bin/env bash
# RQ-VAE: trains it on item embeddings; rq/generate_indices.sh then makes semantic IDs.
#
#     DATA_PATH=<D>.emb-<plm>-td.npy CKPT_DIR=<folder> bash rq/rqvae.sh
#
# Reads DATA_PATH, float32 (items, dim). Writes the checkpoints best_loss and best_collision to CKPT_DIR.
# Re-running resumes a killed training and skips a finished one. An empty value below is the script's default; any other
# option can be set too, as a variable (BETA=0.5) or an argument (--beta 0.5). Lists are separated by spaces.
source "$(dirname "${BASH_SOURCE[0]}")/../shell/launcher.sh"

# ---- data
DATA_PATH=${DATA_PATH:-}
CKPT_DIR=${CKPT_DIR:-}

# ---- model
LAYERS=${LAYERS:-}                    # hidden sizes, such as "512 256 128"
E_DIM=${E_DIM:-}
NUM_EMB_LIST=${NUM_EMB_LIST:-}        # codes of each level, such as "256 256 256"
QUANT_LOSS_WEIGHT=${QUANT_LOSS_WEIGHT:-}
SK_EPSILONS=${SK_EPSILONS:-}          # balances the codes in training, such as "0.01 0.01 0.01"
KMEANS_INIT=${KMEANS_INIT:-}

# ---- training
LR=${LR:-}
EPOCHS=${EPOCHS:-}
BATCH_SIZE=${BATCH_SIZE:-}
EVAL_STEP=${EVAL_STEP:-}              # epochs between evaluations
LR_SCHEDULER_TYPE=${LR_SCHEDULER_TYPE:-}
WARMUP_EPOCHS=${WARMUP_EPOCHS:-}
WEIGHT_DECAY=${WEIGHT_DECAY:-}
SEED=${SEED:-}

launch python rq.rqvae "$@"
