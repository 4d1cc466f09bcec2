#!/usr/bin/env bash
# Stage 5: GRPO over catalog-constrained completions, by accelerate. Edit the variables here or set them in the environment.
# The defaults are the recipe of RESULTS.md, found with a small model: the reward is what a collaborative model thinks of
# each beam, as it is, against a strong KL term. It raised every metric on one data set, on the other HR@50 alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source launch.sh

MODEL_PATH=${MODEL_PATH:-}               # folder of the SFT checkpoint
TRAIN_FILE=${TRAIN_FILE:-}               # train CSV
EVAL_FILE=${EVAL_FILE:-}                 # valid CSV
INFO_FILE=${INFO_FILE:-}                 # info file: the catalog
OUTPUT_DIR=${OUTPUT_DIR:-output/rl}
CATEGORY=${CATEGORY:-}                   # what the prompts call the items

RL_TASKS=${RL_TASKS:-sid_seq}            # sid_seq, title2sid, title_seq2sid; title2sid:1000 takes 1000 rows of it
SAMPLE_TRAIN=${SAMPLE_TRAIN:--1}         # rows of TRAIN_FILE, drawn by seed; -1: all
NUM_GENERATIONS=${NUM_GENERATIONS:-32}   # wide groups hold the target more often
LOGP_SPACE=${LOGP_SPACE:-catalog}        # log-probabilities over what the trie allows, or over the vocabulary: vocab
BEAM_SEARCH=${BEAM_SEARCH:-True}         # False: the group is sampled
TEMPERATURE=${TEMPERATURE:-1.0}
TOP_P=${TOP_P:-1.0}
DYNAMIC_SAMPLING=${DYNAMIC_SAMPLING:-False}
ADD_GT=${ADD_GT:-False}

REWARD_TYPE=${REWARD_TYPE:-sasrec}       # rule, ndcg, prefix, semantic, sasrec; ranking: rule,ndcg; ranking_only: ndcg
REWARD_WEIGHTS=${REWARD_WEIGHTS:-}       # 1,0.5: a weight for each reward
REWARD_MODULE=${REWARD_MODULE:-}         # path.py:name: a reward of your own
SCALE_REWARDS=${SCALE_REWARDS:-none}     # divide advantages by the deviation of the group, the batch, or none
ADA_PATH=${ADA_PATH:-}                   # item embeddings, for semantic
CF_PATH=${CF_PATH:-}                     # folder of sasrec.sh (MODEL sasrec, gru4rec or caser), for sasrec

TRAIN_BATCH_SIZE=${TRAIN_BATCH_SIZE:-64} # completions of one forward on one process
EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-32}
GRADIENT_ACCUMULATION_STEPS=${GRADIENT_ACCUMULATION_STEPS:-8} # with 64 completions: 16 prompts a step
NUM_TRAIN_EPOCHS=${NUM_TRAIN_EPOCHS:-1}
NUM_ITERATIONS=${NUM_ITERATIONS:-1}      # optimizer steps on one generation
LEARNING_RATE=${LEARNING_RATE:-1e-4}     # measured with a model of a million weights alone
LR_SCHEDULER_TYPE=${LR_SCHEDULER_TYPE:-cosine}
WARMUP_RATIO=${WARMUP_RATIO:-0.03}
WEIGHT_DECAY=${WEIGHT_DECAY:-0.0}
MAX_GRAD_NORM=${MAX_GRAD_NORM:-1.0}
LOSS_TYPE=${LOSS_TYPE:-grpo}             # grpo, dapo, bnpo, dr_grpo, cispo, sapo, luspo, vespo
DAPO=${DAPO:-False}
GSPO=${GSPO:-False}
EPSILON=${EPSILON:-0.2}
EPSILON_HIGH=${EPSILON_HIGH:-0}          # 0: as EPSILON
BETA=${BETA:-2.0}                        # weight of the KL to the reference, in the unit of the rewards; 0: no reference
SYNC_REF_MODEL=${SYNC_REF_MODEL:-False}
REF_MODEL_SYNC_STEPS=${REF_MODEL_SYNC_STEPS:-512}
REF_MODEL_MIXUP_ALPHA=${REF_MODEL_MIXUP_ALPHA:-0.6}
MASK_ALL_ZERO=${MASK_ALL_ZERO:-False}    # True: groups without a difference in reward leave the loss
GRADIENT_CHECKPOINTING=${GRADIENT_CHECKPOINTING:-False}
USE_LORA=${USE_LORA:-False}
LORA_R=${LORA_R:-16}
LORA_ALPHA=${LORA_ALPHA:-32}
LORA_DROPOUT=${LORA_DROPOUT:-0.0}
LORA_TARGET_MODULES=${LORA_TARGET_MODULES:-all-linear}

TEST_DURING_TRAINING=${TEST_DURING_TRAINING:-False}
TEST_BEAM=${TEST_BEAM:-50}               # beams of the evaluations: as many as will be scored in the end
EVAL_STEP=${EVAL_STEP:-0.2}
EVAL_ROWS=${EVAL_ROWS:--1}               # validation rows of an evaluation, drawn by SEED; -1: all
METRIC_FOR_BEST_MODEL=${METRIC_FOR_BEST_MODEL:-NDCG@50} # or HR@K, NDCG@K; the whole list is the steadiest judge of few rows
KEEP_START=${KEEP_START:-True}           # the start's weights are kept where RL does not help on valid
SEED=${SEED:-42}
REPORT_TO=${REPORT_TO:-}                 # wandb or tensorboard; empty: the console, and wandb if WANDB_PROJECT is set
WANDB_PROJECT=${WANDB_PROJECT:-}
WANDB_RUN_NAME=${WANDB_RUN_NAME:-}
ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-} # default: config/zero2_opt.yaml, without a GPU config/cpu.yaml

usage() {
    cat <<'TEXT'
usage: MODEL_PATH=… TRAIN_FILE=… EVAL_FILE=… INFO_FILE=… CF_PATH=… bash rl.sh

reads   MODEL_PATH TRAIN_FILE EVAL_FILE INFO_FILE   (required)   CF_PATH   (for REWARD_TYPE sasrec, the default)
writes  OUTPUT_DIR   a Hugging Face checkpoint; started again, it goes on where it was killed

Hyper-parameters are the variables at the top of rl.sh; `python rl.py --help` explains them and lists the rest.
NPROC processes (default: one a GPU, or 1); for several nodes set NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT on each.
ACCELERATE_CONFIG names another file of config/.
TEXT
}

refuse_arguments "$@"
require MODEL_PATH TRAIN_FILE EVAL_FILE INFO_FILE
case ",$REWARD_TYPE," in *,sasrec,*) require CF_PATH ;; esac
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
    --rl_tasks "$RL_TASKS" --sample_train "$SAMPLE_TRAIN" --num_generations "$NUM_GENERATIONS" \
    --logp_space "$LOGP_SPACE" --beam_search "$BEAM_SEARCH" --temperature "$TEMPERATURE" --top_p "$TOP_P" \
    --dynamic_sampling "$DYNAMIC_SAMPLING" --add_gt "$ADD_GT" --reward_type "$REWARD_TYPE" \
    --reward_weights "$REWARD_WEIGHTS" --reward_module "$REWARD_MODULE" --scale_rewards "$SCALE_REWARDS" \
    --ada_path "$ADA_PATH" --cf_path "$CF_PATH" --train_batch_size "$TRAIN_BATCH_SIZE" \
    --eval_batch_size "$EVAL_BATCH_SIZE" --gradient_accumulation_steps "$GRADIENT_ACCUMULATION_STEPS" \
    --num_train_epochs "$NUM_TRAIN_EPOCHS" --num_iterations "$NUM_ITERATIONS" --learning_rate "$LEARNING_RATE" \
    --lr_scheduler_type "$LR_SCHEDULER_TYPE" --warmup_ratio "$WARMUP_RATIO" --weight_decay "$WEIGHT_DECAY" \
    --max_grad_norm "$MAX_GRAD_NORM" --loss_type "$LOSS_TYPE" --dapo "$DAPO" --gspo "$GSPO" --epsilon "$EPSILON" \
    --epsilon_high "$EPSILON_HIGH" --beta "$BETA" --sync_ref_model "$SYNC_REF_MODEL" \
    --ref_model_sync_steps "$REF_MODEL_SYNC_STEPS" --ref_model_mixup_alpha "$REF_MODEL_MIXUP_ALPHA" \
    --mask_all_zero "$MASK_ALL_ZERO" --gradient_checkpointing "$GRADIENT_CHECKPOINTING" --use_lora "$USE_LORA" \
    --lora_r "$LORA_R" --lora_alpha "$LORA_ALPHA" --lora_dropout "$LORA_DROPOUT" \
    --lora_target_modules "$LORA_TARGET_MODULES" --test_during_training "$TEST_DURING_TRAINING" \
    --test_beam "$TEST_BEAM" --eval_step "$EVAL_STEP" --eval_rows "$EVAL_ROWS" --seed "$SEED" \
    --metric_for_best_model "$METRIC_FOR_BEST_MODEL" --keep_start "$KEEP_START" \
    --report_to "$REPORT_TO" --wandb_project "$WANDB_PROJECT" --wandb_run_name "$WANDB_RUN_NAME"
