#!/usr/bin/env bash
# Stage 5: GRPO over catalog-constrained beams, by accelerate. Edit the variables here or set them in the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source launch.sh

MODEL_PATH=${MODEL_PATH:-}               # folder of the SFT checkpoint
TRAIN_FILE=${TRAIN_FILE:-}               # train CSV
EVAL_FILE=${EVAL_FILE:-}                 # valid CSV
INFO_FILE=${INFO_FILE:-}                 # info file: the catalog
OUTPUT_DIR=${OUTPUT_DIR:-output/rl}
CATEGORY=${CATEGORY:-}                   # what the prompts call the items

NUM_GENERATIONS=${NUM_GENERATIONS:-16}
TRAIN_BATCH_SIZE=${TRAIN_BATCH_SIZE:-64} # completions of one forward on one process
EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-32}
GRADIENT_ACCUMULATION_STEPS=${GRADIENT_ACCUMULATION_STEPS:-2}
NUM_TRAIN_EPOCHS=${NUM_TRAIN_EPOCHS:-2}
LEARNING_RATE=${LEARNING_RATE:-1e-5}
BETA=${BETA:-1e-3}
REWARD_TYPE=${REWARD_TYPE:-ranking}
TEMPERATURE=${TEMPERATURE:-1.0}
BEAM_SEARCH=${BEAM_SEARCH:-True}
ADD_GT=${ADD_GT:-False}
DYNAMIC_SAMPLING=${DYNAMIC_SAMPLING:-False}
MASK_ALL_ZERO=${MASK_ALL_ZERO:-False}
SYNC_REF_MODEL=${SYNC_REF_MODEL:-False}
DAPO=${DAPO:-False}
GSPO=${GSPO:-False}
TEST_DURING_TRAINING=${TEST_DURING_TRAINING:-False}
TEST_BEAM=${TEST_BEAM:-20}
EVAL_STEP=${EVAL_STEP:-0.1}
EVAL_ROWS=${EVAL_ROWS:-1000}
SAMPLE_TRAIN=${SAMPLE_TRAIN:--1}
SEED=${SEED:-42}
WANDB_PROJECT=${WANDB_PROJECT:-}
WANDB_RUN_NAME=${WANDB_RUN_NAME:-}
ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-} # default: config/zero2_opt.yaml, without a GPU config/cpu.yaml

usage() {
    cat <<'TEXT'
usage: MODEL_PATH=… TRAIN_FILE=… EVAL_FILE=… INFO_FILE=… bash rl.sh

reads   MODEL_PATH TRAIN_FILE EVAL_FILE INFO_FILE   (required)
writes  OUTPUT_DIR   a Hugging Face checkpoint; started again, it goes on where it was killed

Hyper-parameters are the variables at the top of rl.sh; `python rl.py --help` explains them and lists the rest.
NPROC processes (default: one a GPU, or 1); for several nodes set NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT on each.
ACCELERATE_CONFIG names another file of config/.
TEXT
}

refuse_arguments "$@"
require MODEL_PATH TRAIN_FILE EVAL_FILE INFO_FILE
find_processes
if [ -z "$ACCELERATE_CONFIG" ]; then
    ACCELERATE_CONFIG=config/zero2_opt.yaml
    [ "$GPUS" -gt 0 ] || ACCELERATE_CONFIG=config/cpu.yaml
fi

exec accelerate launch --config_file "$ACCELERATE_CONFIG" --num_cpu_threads_per_process "$THREADS" \
    --num_processes $((NPROC * NNODES)) --num_machines "$NNODES" --machine_rank "$NODE_RANK" \
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" rl.py \
    --model_path "$MODEL_PATH" --train_file "$TRAIN_FILE" --eval_file "$EVAL_FILE" --info_file "$INFO_FILE" \
    --output_dir "$OUTPUT_DIR" --category "$CATEGORY" \
    --num_generations "$NUM_GENERATIONS" --train_batch_size "$TRAIN_BATCH_SIZE" --eval_batch_size "$EVAL_BATCH_SIZE" \
    --gradient_accumulation_steps "$GRADIENT_ACCUMULATION_STEPS" --num_train_epochs "$NUM_TRAIN_EPOCHS" \
    --learning_rate "$LEARNING_RATE" --beta "$BETA" --reward_type "$REWARD_TYPE" --temperature "$TEMPERATURE" \
    --beam_search "$BEAM_SEARCH" --add_gt "$ADD_GT" --dynamic_sampling "$DYNAMIC_SAMPLING" \
    --mask_all_zero "$MASK_ALL_ZERO" --sync_ref_model "$SYNC_REF_MODEL" --dapo "$DAPO" --gspo "$GSPO" \
    --test_during_training "$TEST_DURING_TRAINING" --test_beam "$TEST_BEAM" --eval_step "$EVAL_STEP" \
    --eval_rows "$EVAL_ROWS" --sample_train "$SAMPLE_TRAIN" --seed "$SEED" \
    --wandb_project "$WANDB_PROJECT" --wandb_run_name "$WANDB_RUN_NAME"
