"""Bad input of the stages that train, score and show models."""

from pathlib import Path

import numpy as np
from bad_inputs.bench import (
    Case,
    array,
    arrays,
    file_case,
    folder_there,
    half,
    json_edit,
    option_case,
    put,
    remove,
    tensors,
)

WEIGHTS = "sft/model.safetensors"


def set_nan(content: dict) -> None:
    next(iter(content.values())).fill_(float("nan"))


def edit_everywhere(old: str, new: str):
    """Replace a text in the index and in every CSV."""

    def write() -> None:
        for path in (Path("toy.index.json"), *Path().glob("*/toy.csv")):
            path.write_text(path.read_text().replace(old, new))

    return write


def checkpoint_cases(stage: str, flag: str) -> list[Case]:
    """What every stage refuses that loads a trained model."""
    return [
        file_case(stage, "weights", half(WEIGHTS), "sft: found no readable causal language model", f"check --{flag}"),
        file_case(stage, "weights", tensors(WEIGHTS, set_nan), "sft: the weight", "has NaN or infinite values"),
        file_case(stage, "weights", tensors(WEIGHTS, lambda c: c.popitem() and None), "1 weights of the model are missing"),
        file_case(stage, "weights", put("sft/config.json", "[]"), "sft: found no readable"),
        file_case(stage, "weights", put("sft/config.json", '{"model_type": "no_such"}'), "sft: found no readable"),
        file_case(stage, "weights", remove("sft/tokenizer.json"), "sft: found a tokenizer without any token"),
        file_case(stage, "weights", put("sft/tokenizer.json", "{}"), "sft: found no readable tokenizer"),
        file_case(stage, "JSON", put("sft/minionerec.json", "{}"), "sft/minionerec.json: found category None"),
        file_case(stage, "JSON", put("sft/minionerec.json", "["), "sft/minionerec.json: not valid JSON"),
        file_case(stage, "unfinished", put("sft/run.json", '{"stage": "sft", "complete": false}'), "sft", "not finished"),
    ]  # fmt: skip


SASREC = [
    option_case("sasrec", "--model lstm: expected one of popularity", model="lstm"),
    option_case("sasrec", "--learning_rate nan: expected a finite number", learning_rate="nan"),
    option_case("sasrec", "--learning_rate 0.0: expected more than 0", learning_rate=0),
    option_case("sasrec", "--hidden_size 9: expected a multiple of --num_heads 2", hidden_size=9),
    option_case("sasrec", "--dropout 1.5: expected 0 or more and below 1", dropout=1.5),
    option_case("sasrec", "--max_history 9223372036854775808: expected at most 2147483647", max_history=2**63),
    option_case("sasrec", "--max_history 0: expected at least 1", max_history=0),
    option_case("sasrec", "--eval_rows 0: expected at least 1, or -1", eval_rows=0),
    option_case("sasrec", "--num_filters 3: expected nothing: sasrec does not use it", num_filters=3),
    option_case("sasrec", "expected heights", model="caser", filter_sizes="2," + "9" * 5000),
    option_case("sasrec", "--filter_sizes 2,x: expected heights", model="caser", filter_sizes="2,x"),
    option_case("sasrec", "--seed -1: expected 0 to", seed=-1),
    option_case("sasrec", "nowhere.npy: no such file", item_features="nowhere.npy"),
    option_case("sasrec", "more.emb-x-td.npy: 50 rows, expected the 48 items", item_features="more.emb-x-td.npy"),
    option_case("sasrec", "learning_rate", learning_rate=1e30, epochs=3),
    file_case("sasrec", "path", put("out", "a file"), "out"),
    file_case("sasrec", "earlier result", put("out/metrics.json", "{}"), "out: holds another result"),
]

SFT = [
    option_case("sft", "unknown option --base", base="x"),
    option_case("sft", "exclude each other", freeze_LLM=True, use_lora=True, train_from_scratch=False),
    option_case("sft", "--freeze_LLM True would freeze the random weights", freeze_LLM=True),
    option_case("sft", "nearest valid batch sizes: 8 or 16", batch_size=12),
    option_case("sft", "--learning_rate -1.0: expected at least 0", learning_rate=-1),
    option_case("sft", "--eval_step 1.5: expected a number of steps", eval_step=1.5),
    option_case("sft", "--warmup_ratio 1.0: expected 0 or more and below 1", warmup_ratio=1),
    option_case("sft", "--train_rows 0: expected at least 1, or -1", train_rows=0),
    option_case("sft", "--max_history 9223372036854775808: expected at most 2147483647", max_history=2**63),
    option_case("sft", "--max_history 0: expected at least 1", max_history=0),
    option_case("sft", "--lr_scheduler_type steps: expected one of linear", lr_scheduler_type="steps"),
    option_case("sft", "--sft_tasks dance: no task 'dance'", sft_tasks="dance"),
    option_case("sft", "'many' is no weight", sft_tasks="sid_seq:many"),
    option_case("sft", "weight 0 of sid_seq", sft_tasks="sid_seq:0"),
    option_case("sft", "--sft_tasks sid_seq:0.001: none of", sft_tasks="sid_seq:0.001,title2sid"),
    option_case("sft", "--sft_tasks title2sid:0.001: none of", sft_tasks="sid_seq,title2sid:0.001"),
    option_case("sft", "the preference tasks need --user_preference_file", sft_tasks="sid_seq2preference"),
    option_case("sft", "--metric_for_best_model HR@7: expected eval_loss", metric_for_best_model="HR@7"),
    option_case("sft", "--sid_init codebook", sid_init="codebook"),
    option_case("sft", "--packing True with --history_drop", packing=True, history_drop=0.5),
    option_case("sft", "--seed 4294967296: expected 0 to", seed=2**32),
    option_case("sft", "nowhere: no such file", train_file="nowhere"),
    option_case("sft", "nowhere: found no readable", base_model="nowhere"),
    option_case("sft", "--resume_from_checkpoint nowhere: found no complete checkpoint", resume_from_checkpoint="nowhere"),
    option_case("sft", "--lora_target_modules dance_proj", use_lora=True, train_from_scratch=False, lora_target_modules="dance_proj"),
    option_case("sft", "--lora_target_modules embed_tokens", use_lora=True, train_from_scratch=False, lora_target_modules="embed_tokens"),
    option_case("sft", "--lora_target_modules lm_head", use_lora=True, train_from_scratch=False, lora_target_modules="lm_head"),
    file_case("sft", "array", half("books.npz"), "books.npz", sid_init="codebook", sid_codebooks="books.npz"),
    option_case("sft", "loss", "learning_rate", learning_rate=1e30, num_epochs=5, eval_step=100),
    option_case("sft", "cutoff_len", cutoff_len=2),
    file_case("sft", "JSON", put("likes.json", '{"train0": 3}'), "likes.json: user 'train0' has '3', expected a text", user_preference_file="likes.json"),
    file_case("sft", "JSON", edit_everywhere("<a_3>", "<a_20000000>"), "<a_20000000>", "expected codes below 65,536"),
    file_case("sft", "path", put("out", "a file"), "out"),
    file_case("sft", "earlier result", put("out/model.safetensors", ""), "out: holds another result", "--overwrite True"),
    file_case("sft", "weights", put("base/config.json", "[]"), "base: found no readable tokenizer"),
    file_case("sft", "weights", remove("base/tokenizer.json"), "base: found a tokenizer without any token"),
    file_case("sft", "weights", half("base/model.safetensors"), "base: found no readable causal language model", train_from_scratch=False),
    file_case("sft", "weights", tensors("base/model.safetensors", set_nan), "base: the weight", train_from_scratch=False),
    file_case("sft", "JSON", json_edit("base/tokenizer_config.json", lambda c: c.update(eos_token=None)), "base", "end-of-sequence"),
]  # fmt: skip

RL = [
    option_case("rl", "invalid int value", num_generations="many"),
    option_case("rl", "--num_generations 1: expected at least 2", num_generations=1),
    option_case("rl", "the nearest products that are: 15 or 18", num_generations=3),
    option_case("rl", "found 47 distinct SIDs, expected at least --num_generations 64", num_generations=64, train_batch_size=64),
    option_case("rl", "60 RL rows, expected at least 64", train_batch_size=256),
    option_case("rl", "--beta -1.0: expected at least 0", beta=-1),
    option_case("rl", "--temperature 0.0: expected more than 0", temperature=0),
    option_case("rl", "--top_p 0.5: expected 1 with beams", top_p=0.5),
    option_case("rl", "--space words: expected vocab or catalog", space="words"),
    option_case("rl", "--loss_type ppo: expected one of grpo", loss_type="ppo"),
    option_case("rl", "--epsilon_high 0.3: expected at least 1 with --loss_type cispo", loss_type="cispo", epsilon_high=0.3),
    option_case("rl", "--sync_ref_model True: expected False with --beta 0", sync_ref_model=True, beta=0),
    option_case("rl", "--reward_type fame: no reward 'fame'", reward_type="fame"),
    option_case("rl", "a reward is named twice", reward_type="ranking,rule"),
    option_case("rl", "--reward_type semantic needs --ada_path", reward_type="semantic"),
    option_case("rl", "--ada_path toy.emb-x-td.npy: no reward reads it", ada_path="toy.emb-x-td.npy"),
    option_case("rl", "50 rows, expected the catalog's 48 items", reward_type="semantic", ada_path="more.emb-x-td.npy"),
    option_case("rl", "found 1 weights, expected 2 finite ones", reward_weights="1"),
    option_case("rl", "expected numbers as in 1,0.5", reward_weights="a,b"),
    option_case("rl", "--reward_module mine: expected path.py:name", reward_module="mine"),
    option_case("rl", "--rl_tasks sid2title: found 'sid2title'", rl_tasks="sid2title"),
    option_case("rl", "--max_history 9223372036854775808: expected at most 2147483647", max_history=2**63),
    option_case("rl", "is no number of rows", rl_tasks="sid_seq:" + "9" * 5000),
    option_case("rl", "'all' is no number of rows", rl_tasks="sid_seq:all"),
    option_case("rl", "--metric_for_best_model MRR", metric_for_best_model="MRR"),
    option_case("rl", "transformers refuses these options", lr_scheduler_type="steps"),
    option_case("rl", "--eval_rows -2: expected at least 1, or -1", eval_rows=-2),
    option_case("rl", "--resume_from_checkpoint nowhere", resume_from_checkpoint="nowhere"),
    option_case("rl", "--lora_target_modules dance_proj", use_lora=True, lora_target_modules="dance_proj"),
    option_case("rl", "--lora_target_modules embed_tokens", use_lora=True, lora_target_modules="embed_tokens"),
    option_case("rl", "lower --learning_rate", learning_rate=1e30, num_train_epochs=2, keep_start=False),
    file_case("rl", "user's code", put("mine.py", "def f(dance): return []"), "f asks for 'dance'", reward_module="mine.py:f"),
    file_case("rl", "user's code", put("mine.py", "import nothing_like_it"), "fails with ModuleNotFoundError", reward_module="mine.py:f"),
    file_case("rl", "user's code", put("mine.py", "x = 1"), "has no function 'f'", reward_module="mine.py:f"),
    file_case("rl", "user's code", put("mine.py", "def f(completions): return [float('nan')] * len(completions)"), "reward f returned nan for row 0", reward_module="mine.py:f"),
    file_case("rl", "user's code", put("mine.py", "def f(completions): return [1.0]"), "reward f returned values of shape (1,)", reward_module="mine.py:f"),
    file_case("rl", "weights", half("sasrec/model.safetensors"), "sasrec: not a model that sasrec.py saved", reward_type="sasrec", baseline_path="sasrec"),
    file_case("rl", "weights", json_edit("sasrec/config.json", lambda c: c.update(n_items=9)), "sasrec", reward_type="sasrec", baseline_path="sasrec"),
    file_case("rl", "weights", json_edit("sasrec/config.json", lambda c: c.update(model_type="dance")), "sasrec: not a model", reward_type="sasrec", baseline_path="sasrec"),
    file_case("rl", "weights", tensors("sasrec/model.safetensors", set_nan), "sasrec: the weight", reward_type="sasrec", baseline_path="sasrec"),
    file_case("rl", "array", array("toy.emb-x-td.npy", lambda m: m * (m != m[3])), "row 3 is all zeros", reward_type="semantic", ada_path="toy.emb-x-td.npy"),
    file_case("rl", "path", put("out", "a file"), "out"),
    file_case("rl", "earlier result", put("out/config.json", "{}"), "out: holds another result"),
    *checkpoint_cases("rl", "model_path"),
]  # fmt: skip

EVALUATE = [
    option_case("evaluate", "--num_beams 0: expected at least 1", num_beams=0),
    option_case("evaluate", "--batch_size -4: expected at least 1", batch_size=-4),
    option_case("evaluate", "--max_history 9223372036854775808: expected at most 2147483647", max_history=2**63),
    option_case("evaluate", "--K -1: expected at least 0", K=-1),
    option_case("evaluate", "--test_rows 0: expected at least 1, or -1", test_rows=0),
    option_case("evaluate", "--space x: expected vocab or catalog", space="x"),
    option_case("evaluate", "--dtype float8: expected float32 or bfloat16", dtype="float8"),
    option_case("evaluate", "--length_penalty inf: expected a finite number", length_penalty="inf"),
    option_case("evaluate", "--max_new_tokens 2: the catalog's SIDs have up to 3 tokens", max_new_tokens=2),
    option_case("evaluate", "--blend_valid_file is required", blend_path="sasrec"),
    option_case("evaluate", "expected auto, user, or 1 numbers", blend_path="sasrec", blend_weight="1 2"),
    option_case("evaluate", "nowhere", blend_path="nowhere", blend_weight="1"),
    option_case("evaluate", "nowhere: no such file or folder; check --base_model", base_model="nowhere"),
    option_case("evaluate", "--result_json_data .: found a folder", result_json_data="."),
    option_case("evaluate", "--result_json_data out/: found a folder", result_json_data="out/"),
    option_case("evaluate", "--length_penalty 90.0: expected -10 to 10", length_penalty=90),
    option_case("evaluate", "--length_penalty -1000.0: expected -10 to 10", length_penalty=-1000),
    option_case("evaluate", "--blend_rows 0: expected at least 1, or -1", blend_path="sasrec", blend_valid_file="valid/toy.csv", blend_rows=0),
    option_case("evaluate", "--blend_rows -5: expected at least 1, or -1", blend_path="sasrec", blend_valid_file="valid/toy.csv", blend_rows=-5),
    option_case("evaluate", "1 numbers, 0 to 1000", blend_path="sasrec", blend_weight="1e308"),
    option_case("evaluate", "1 numbers, 0 to 1000", blend_path="sasrec", blend_weight="-1"),
    option_case("evaluate", "--blend_weight ['user']: expected nothing without --blend_path", blend_weight="user"),
    option_case("evaluate", "--blend_valid_file nowhere.csv: expected nothing without --blend_path", blend_valid_file="nowhere.csv"),
    option_case("evaluate", "--blend_rows 5: expected nothing without --blend_path", blend_rows=5),
    file_case("evaluate", "path", folder_there("out/p.json"), "--result_json_data out/p.json: found a folder"),
    file_case("evaluate", "path", put("out", "a file"), "out"),
    file_case("evaluate", "earlier result", put("out/p.json", "{}"), "out/p.json: holds another result"),
    file_case("evaluate", "weights", half("sasrec/model.safetensors"), "sasrec: not a model that sasrec.py saved", blend_path="sasrec", blend_weight="1"),
    *checkpoint_cases("evaluate", "base_model"),
]  # fmt: skip

RECOMMEND = [
    option_case("recommend", "history: no item 48, expected ids 0..47", history="48"),
    option_case("recommend", "history: no title has the words 'zebra'", history="zebra"),
    option_case("recommend", "history: no item -5, expected ids 0..47", history=" -5"),
    option_case("recommend", "history: no item -5, expected ids 0..47", history="3, -5"),
    option_case("recommend", "0 to 1000", blend_path="sasrec", blend_weight="1e308"),
    option_case("recommend", "--history is empty", history=" ; "),
    option_case("recommend", "--K 0: expected at least 1", K=0),
    option_case("recommend", "--num_beams 5: expected at least --K 10", num_beams=5),
    option_case("recommend", "no item is left by --title_words 'zebra'", title_words="zebra"),
    option_case("recommend", "no item 99", only_items="1,99"),
    option_case("recommend", "--jsonl True: expected False with --history", jsonl=True),
    option_case(
        "recommend", "--blend_weight", "1 numbers, one for each --blend_path", blend_path="sasrec", blend_weight="1 2"
    ),
    option_case("recommend", "nowhere", blend_path="nowhere"),
    option_case("recommend", "--info_file is required", info_file=None),
    option_case("recommend", "--space x: expected vocab or catalog", space="x"),
    *checkpoint_cases("recommend", "base_model"),
]

METRICS, RANKS = "run/sasrec/metrics.json", "run/sasrec/ranks.npz"
REPORT = [
    option_case("report", "--output_dir is required", output_dir=None),
    option_case("report", "nowhere: no such file or folder", output_dir="nowhere"),
    option_case("report", "train: found no metrics of a model", output_dir="train"),
    option_case("report", "--seed -1: expected 0 to", seed=-1),
    file_case("report", "JSON", put(METRICS, "{"), METRICS, "not valid JSON"),
    file_case("report", "JSON", put(METRICS, "[]"), METRICS, "found a JSON list"),
    file_case("report", "JSON", json_edit(METRICS, lambda c: c["item"].update({"HR@5": "high"})), METRICS),
    file_case("report", "JSON", json_edit(METRICS, lambda c: c.update(unseen=3)), METRICS),
    file_case("report", "JSON", json_edit(METRICS, lambda c: c.update(headline="best")), METRICS),
    file_case("report", "JSON", json_edit(METRICS, lambda c: c.update(intervals=[])), METRICS),
    option_case("report", "toy.item.json: holds another result (toy.item.json was not made by this command)", report_file="toy.item.json"),
    option_case("report", "--report_file run/results.json: the table goes there", report_file="run/results.json"),
    option_case("report", "train: found a folder, expected the name of a file", report_file="train"),
    file_case("report", "earlier result", put("run/results.json", '{"mine": 1}'), "run/results.json: holds another result", "--overwrite True"),
    file_case("report", "earlier result", put("run/report.html", "<html>mine</html>"), "run/report.html: holds another result"),
    file_case("report", "JSON", json_edit(METRICS, lambda c: c.update(intervals={"NDCG@10": 3})), METRICS),
    file_case("report", "JSON", json_edit(METRICS, lambda c: c["unseen"].update(slices={"popularity": 3})), METRICS),
    file_case("report", "JSON", json_edit(METRICS, lambda c: c.update(slices={"popularity": {"head": {"rows": 3}}})), METRICS),
    file_case("report", "JSON", put("run/sasrec/run.json", '{"complete": true}'), "run/sasrec/run.json: stage is None"),
    file_case("report", "JSON", put("run/unseen/metrics.json", '{"item": {"HR@5": 0.1}}'), "a model cannot be named 'unseen'", "rename it"),
    file_case("report", "JSON", put("run/seconds.metrics.json", '{"item": {"HR@5": 0.1}}'), "a model cannot be named 'seconds'"),
    file_case("report", "array", arrays(RANKS, all_item=np.zeros((3, 2), dtype=int)), RANKS, "all_item has shape (3, 2)"),
    file_case("report", "array", arrays(RANKS, all_item=np.array(["a", "b", "c"])), RANKS, "all_item has shape (3,) of <U1"),
    file_case("report", "array", arrays(RANKS, all_item=np.array(3)), RANKS, "all_item has shape ()"),
    file_case("report", "array", arrays(RANKS, all_item=np.arange(3), target=np.arange(2)), RANKS, "target has shape (2,)"),
    file_case("report", "array", half(RANKS), RANKS),
    file_case("report", "array", put(RANKS, ""), RANKS),
]  # fmt: skip

CASES = [*SASREC, *SFT, *RL, *EVALUATE, *RECOMMEND, *REPORT]
