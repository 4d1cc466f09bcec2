#!/usr/bin/env bash
# RQ-KMeans+: train on from the codebooks of constrained RQ-KMeans, then write the index.
# Edit the variables here or set them in the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch.sh

DATA_PATH=${DATA_PATH:-}
CKPT_DIR=${CKPT_DIR:-}
PRETRAINED_CODEBOOK_PATH=${PRETRAINED_CODEBOOK_PATH:-}
OUTPUT_FILE=${OUTPUT_FILE:-}
COLLISION=${COLLISION:-nearest_free}
LR=${LR:-1e-3}
EPOCHS=${EPOCHS:-10000}
BATCH_SIZE=${BATCH_SIZE:-20480}
EVAL_STEP=${EVAL_STEP:-50}
LEARNER=${LEARNER:-AdamW}
LR_SCHEDULER_TYPE=${LR_SCHEDULER_TYPE:-constant}
WARMUP_EPOCHS=${WARMUP_EPOCHS:-50}
WEIGHT_DECAY=${WEIGHT_DECAY:-1e-4}
DROPOUT_PROB=${DROPOUT_PROB:-0.0}
BN=${BN:-False}
LOSS_TYPE=${LOSS_TYPE:-mse}
NUM_EMB_LIST=${NUM_EMB_LIST:-}
SK_EPSILONS=${SK_EPSILONS:-}
SK_ITERS=${SK_ITERS:-50}
E_DIM=${E_DIM:-0}
QUANT_LOSS_WEIGHT=${QUANT_LOSS_WEIGHT:-1.0}
BETA=${BETA:-0.25}
LAYERS=${LAYERS:-2048 1024 512 256 128 64}
SAVE_LIMIT=${SAVE_LIMIT:-5}
DEAD_CODE_THRESHOLD=${DEAD_CODE_THRESHOLD:-0}
SEED=${SEED:-2024}
DEVICE=${DEVICE:-}
COMPILE=${COMPILE:-False}
OVERWRITE=${OVERWRITE:-False}

usage() {
    cat <<'TEXT'
usage: DATA_PATH=<D>.emb-<plm>-td.npy CKPT_DIR=<folder> PRETRAINED_CODEBOOK_PATH=<D>.codebooks_constrained.npz \
           bash rq/rqkmeans_plus.sh

reads   DATA_PATH                 item embeddings, float32 (items, dim)        (required)
        PRETRAINED_CODEBOOK_PATH  codebooks of rq/rqkmeans_constrained.sh      (required)
writes  CKPT_DIR                  best_loss and best_collision checkpoints     (required)
        OUTPUT_FILE               the index; default CKPT_DIR/<D>.index.json, and its quality report beside it

Started again, it goes on where it was killed; a finished run is left as it is.
Variables, with their defaults (lists are separated by blanks):
  LR=1e-3 EPOCHS=10000 BATCH_SIZE=20480 EVAL_STEP=50 LEARNER=AdamW LR_SCHEDULER_TYPE=constant WARMUP_EPOCHS=50
  WEIGHT_DECAY=1e-4 DROPOUT_PROB=0.0 BN=False LOSS_TYPE=mse COLLISION=nearest_free (none, sinkhorn,
  nearest_free, extra_token) NUM_EMB_LIST="" (the codebooks' own) E_DIM=0 (the embeddings' own)
  SK_EPSILONS="" (none: 0 at every level) SK_ITERS=50 QUANT_LOSS_WEIGHT=1.0
  BETA=0.25 LAYERS="2048 1024 512 256 128 64" SAVE_LIMIT=5 DEAD_CODE_THRESHOLD=0 (items an
  epoch; below it a code restarts) SEED=2024 DEVICE="" (cuda if there is one) COMPILE=False (cuda) OVERWRITE=False
TEXT
}

refuse_arguments "$@"
require DATA_PATH CKPT_DIR PRETRAINED_CODEBOOK_PATH
# Lists are unquoted on purpose: one word is one value.
exec python -m rq.rqkmeans_plus --data_path "$DATA_PATH" --ckpt_dir "$CKPT_DIR" \
    --pretrained_codebook_path "$PRETRAINED_CODEBOOK_PATH" --collision "$COLLISION" \
    ${OUTPUT_FILE:+--output_file "$OUTPUT_FILE"} \
    --lr "$LR" --epochs "$EPOCHS" --batch_size "$BATCH_SIZE" --eval_step "$EVAL_STEP" \
    --learner "$LEARNER" --lr_scheduler_type "$LR_SCHEDULER_TYPE" --warmup_epochs "$WARMUP_EPOCHS" \
    --weight_decay "$WEIGHT_DECAY" --dropout_prob "$DROPOUT_PROB" --bn "$BN" --loss_type "$LOSS_TYPE" \
    ${NUM_EMB_LIST:+--num_emb_list $NUM_EMB_LIST} \
    ${SK_EPSILONS:+--sk_epsilons $SK_EPSILONS} --sk_iters "$SK_ITERS" --e_dim "$E_DIM" \
    --quant_loss_weight "$QUANT_LOSS_WEIGHT" --beta "$BETA" --layers $LAYERS --save_limit "$SAVE_LIMIT" \
    --dead_code_threshold "$DEAD_CODE_THRESHOLD" --seed "$SEED" --compile "$COMPILE" \
    ${DEVICE:+--device "$DEVICE"} --overwrite "$OVERWRITE"
