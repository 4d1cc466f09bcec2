"""Bad input of the stages that read or write the data set: texts, samples, items, the catalog, prompts."""

from bad_inputs.bench import Case, array, cell, edit, file_case, folder_there, half, json_edit, option_case, put, remove
from bad_inputs.bench import replace as swap

TRAIN, VALID, TEST = "train/toy.csv", "valid/toy.csv", "test/toy.csv"
INDEX, ITEMS, INFO = "toy.index.json", "toy.item.json", "info/toy.txt"
HEADER = "user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid\n"
READERS = {  # stages that read a CSV, and one that each reads
    "sft": TRAIN,
    "rl": VALID,
    "evaluate": TEST,
    "sasrec": TEST,
    "fuse_embeddings": TRAIN,
    "recommend": TRAIN,
}


def csv_cases() -> list[Case]:
    """Each damage of a CSV at two of the stages that read one, in turn."""
    ids, sids = "ids of the catalog, 0..47", "the catalog's SIDs of these items"
    damages = [
        (lambda path: put(path, ""), "the file is empty, expected a header and rows"),
        (lambda path: put(path, HEADER), "found no rows, expected at least one"),
        (lambda path: swap(path, "Item", b"\xe9tem"), "line 2: found the byte 0xe9, which is not UTF-8"),
        (lambda path: swap(path, "Item", b"\xed\xa0\x80"), "which is not UTF-8"),
        (lambda path: edit(path, lambda data: data.decode().encode("utf-16")), "found UTF-16 or binary data"),
        (lambda path: edit(path, lambda data: data + b"u,[],x\n"), "found 3 cells, expected 7 as in the header"),
        (lambda path: edit(path, lambda data: data + b'u,"[]\n'), "quotes are not closed"),
        (lambda path: half(path), "row"),
        (lambda path: swap(path, ",item_id,", ",item,"), "no column 'item_id'"),
        (lambda path: swap(path, "item_title", "item_id"), "is there twice"),
        (lambda path: cell(path, 2, "item_id", "48"), f"row 2, column item_id: found '48', expected {ids}"),
        (lambda path: cell(path, 3, "item_id", "-1"), f"row 3, column item_id: found '-1', expected {ids}"),
        (lambda path: cell(path, 2, "item_id", "1.7"), f"row 2, column item_id: found '1.7', expected {ids}"),
        (lambda path: cell(path, 2, "item_id", "9" * 30), f"row 2, column item_id: found '{'9' * 30}'"),
        (lambda path: cell(path, 2, "item_id", ""), f"row 2, column item_id: found '', expected {ids}"),
        (lambda path: cell(path, 2, "history_item_id", "[1.7]"), "row 2, column history_item_id: found '[1.7]'"),
        (lambda path: cell(path, 2, "history_item_id", "'12'"), "column history_item_id: found", "a list literal"),
        (lambda path: cell(path, 2, "history_item_id", "{1: 2}"), "column history_item_id: found '{1: 2}'"),
        (lambda path: cell(path, 2, "history_item_id", "[48]"), f"column history_item_id: found '[48]', expected {ids}"),
        (lambda path: cell(path, 2, "history_item_id", "open('x', 'w')"), "column history_item_id", "a list literal"),
        (lambda path: cell(path, 2, "item_sid", "<a_9><b_9><c_9>"), f"column item_sid: found '<a_9><b_9><c_9>', {'expected'}", sids),
        (lambda path: cell(path, 2, "history_item_sid", "[]"), "row 2, column history_item_sid", sids),
        (folder_there, "found a folder, expected a file"),
        (remove, "no such file or folder"),
    ]  # fmt: skip
    names, cases = [*READERS], []
    for place, (damage, *found) in enumerate(damages):
        for stage in (names[place % len(names)], names[(place + 1 + place // len(names)) % len(names)]):
            cases.append(file_case(stage, "CSV", damage(READERS[stage]), READERS[stage], *found))
    return cases


def json_cases(stage: str, path: str, wrong_value: str) -> list[Case]:
    """What every reader of an item or index file refuses."""
    return [
        file_case(stage, "JSON", put(path, ""), path, "not valid JSON"),
        file_case(stage, "JSON", half(path), path, "not valid JSON"),
        file_case(stage, "JSON", put(path, "[]"), path, "found a JSON list, expected an object"),
        file_case(stage, "JSON", put(path, "{}"), path, "no item in it"),
        file_case(stage, "JSON", put(path, b"\xff\xfe{"), path, "not valid JSON"),
        file_case(stage, "JSON", swap(path, '"1":', '"0":'), path, "key '0' is there twice"),
        file_case(stage, "JSON", json_edit(path, lambda c: c.pop("7") and None), path, "item 7 is missing"),
        file_case(stage, "JSON", json_edit(path, lambda c: c.update({"3": None})), path, "item 3"),
        file_case(stage, "JSON", json_edit(path, lambda c: c.update({"3": "x"})), path, "item 3", wrong_value),
    ]


PREPROCESS = [
    option_case("preprocess", "--max_history 0: expected at least 1", max_history=0),
    option_case("preprocess", "invalid int value", max_history="1.5"),
    option_case("preprocess", "--max_history 9223372036854775808: expected at most 2147483647", max_history=2**63),
    option_case("preprocess", "--output_dir is required", output_dir=None),
    option_case("preprocess", "nowhere/ml-100k.inter: no such file", input_dir="nowhere"),
    option_case("preprocess", "unknown option --sample", sample=1),
    option_case("preprocess", "--dataset_name ../toy: expected a plain name, without slashes", dataset_name="../toy"),
    file_case("preprocess", "path", put("out", "a file"), "out"),
    file_case("preprocess", ".inter", remove("ml/ml-100k.item"), "ml-100k.item: no such file or folder; check --input_dir"),
    file_case("preprocess", ".inter", put("ml/ml-100k.inter", ""), "ml-100k.inter: the file is empty"),
    file_case("preprocess", ".inter", swap("ml/ml-100k.inter", "timestamp", "time"), "no column 'timestamp'"),
    file_case("preprocess", ".inter", swap("ml/ml-100k.inter", "101", "noon"), "row 6, column timestamp: found 'noon'"),
    file_case("preprocess", ".inter", swap("ml/ml-100k.inter", "101", "inf"), "row 6, column timestamp: found 'inf'"),
    file_case("preprocess", ".inter", swap("ml/ml-100k.inter", "0\t1\t", "0\t9\t"), "1 interactions are of items without a title, the first of item 9"),
    file_case("preprocess", ".inter", swap("ml/ml-100k.item", "2\tF", "1\tF"), "row 3, column item_id: found '1', expected each item once"),
    file_case("preprocess", ".inter", swap("ml/ml-100k.item", "2\tF", "two\tF"), "interactions are of items without a title, the first of item 2"),
    file_case("preprocess", ".inter", swap("ml/ml-100k.item", "Film 2", ""), "interactions are of items without a title, the first of item 2"),
    file_case("preprocess", ".inter", half("ml/ml-100k.inter"), "ml-100k.inter, row"),
    file_case("preprocess", ".inter", put("ml/ml-100k.inter", "user_id\titem_id\ttimestamp\nu\t1\t5\n"), "none of 1 users has 3 interactions"),
]  # fmt: skip

CONVERT = [
    option_case("convert_dataset", "--max_history -3: expected at least 1", max_history=-3),
    option_case("convert_dataset", "--max_history 99999999999999999999: expected at most 2147483647", max_history="9" * 20),
    option_case("convert_dataset", "--dataset_name is required", dataset_name=None),
    option_case("convert_dataset", "other.item.json: no such file or folder; check --data_dir", dataset_name="other"),
    option_case("convert_dataset", "nowhere/train: found 0 files *.csv, expected one", csv_dir="nowhere"),
    option_case("convert_dataset", "unknown option --K", K=3),
    option_case("convert_dataset", "--max_history 1: expected nothing with --to_inter True", csv_dir=".", to_inter=True, max_history=1),
    option_case("convert_dataset", "--dataset_name ../x/toy: expected a plain name, without slashes", dataset_name="../x/toy"),
    option_case("convert_dataset", "--dataset_name ../toy: expected a plain name", dataset_name="../toy", csv_dir=".", to_inter=True),
    file_case("convert_dataset", "path", put("out", "a file"), "out"),
    file_case("convert_dataset", "contradiction", json_edit(ITEMS, lambda c: c.pop("47") and None), INDEX, "48 items, expected the 47"),
    *json_cases("convert_dataset", INDEX, "expected a list"),
    *json_cases("convert_dataset", ITEMS, 'expected an object with a string "title"'),
    file_case("convert_dataset", "JSON", json_edit(ITEMS, lambda c: c["3"].update(title=5)), ITEMS, "item 3"),
    file_case("convert_dataset", "JSON", swap(ITEMS, "Item number 3", "\\ud800"), ITEMS, "surrogates not allowed"),
    file_case("convert_dataset", "JSON", json_edit(INDEX, lambda c: c.update({"3": [-1, 2, 3]})), INDEX, "item 3"),
    file_case("convert_dataset", "JSON", json_edit(INDEX, lambda c: c.update({"3": []})), INDEX, "item 3"),
    file_case("convert_dataset", "JSON", json_edit(INDEX, lambda c: c.update({"3": ["<a_1>", "x"]})), INDEX, "item 3"),
    file_case("convert_dataset", ".inter", put("toy.valid.inter", ""), "toy.valid.inter: the file is empty"),
    file_case("convert_dataset", ".inter", swap("toy.test.inter", "item_id:token\n", "item:token\n"), "toy.test.inter: found columns"),
    file_case("convert_dataset", ".inter", edit("toy.test.inter", lambda d: d + b"u\t1,2\t3\n"), "toy.test.inter, row 14, column item_id_list:token_seq", "blanks"),
    file_case("convert_dataset", ".inter", edit("toy.train.inter", lambda d: d + b"u\t1 99\t3\n"), "row 62, column item_id_list:token_seq: found '1 99'"),
    file_case("convert_dataset", ".inter", edit("toy.train.inter", lambda d: d + b"u\t1 -2\t3\n"), "row 62, column item_id_list:token_seq"),
    file_case("convert_dataset", ".inter", edit("toy.train.inter", lambda d: d + b"u\t1\t\n"), "row 62, column item_id:token: found ''"),
    file_case("convert_dataset", ".inter", edit("toy.train.inter", lambda d: d + b"u\t1\t3.5\n"), "row 62, column item_id:token: found '3.5'"),
    file_case("convert_dataset", ".inter", edit("toy.train.inter", lambda d: d + b"u\t1\n"), "toy.train.inter, row 62: found 2 cells"),
    file_case("convert_dataset", ".inter", edit("toy.train.inter", lambda d: d + b"\xff\t1\t2\n"), "toy.train.inter, line 62: found the byte 0xff"),
    file_case("convert_dataset", ".inter", remove("toy.test.inter"), "toy.test.inter: no such file or folder"),
    file_case("convert_dataset", "CSV", cell(TEST, 2, "item_id", "99"), TEST, "row 2, column item_id", csv_dir="."),
    file_case("convert_dataset", "CSV", put("test/more.csv", HEADER), "found 2 files *.csv, expected one", csv_dir="."),
    file_case("convert_dataset", "earlier result", put("out/train/toy.csv", "precious"), "out/train/toy.csv: holds another result", "--overwrite True"),
]  # fmt: skip

CATALOG = [
    file_case("evaluate", "info file", put(INFO, ""), INFO, "line 1: found ''"),
    file_case("evaluate", "info file", swap(INFO, "\t3\n", "\t2\n"), INFO, "line 4: item 2 is also in line 3"),
    file_case("evaluate", "info file", swap(INFO, "\t47\n", "\t48\n"), INFO, "expected each of 0..n-1 once"),
    file_case("rl", "info file", swap(INFO, "\t3\n", "\tthree\n"), INFO, "line 4: found"),
    file_case("recommend", "info file", swap(INFO, "<a_0><b_0><c_3>", "<a_0><b_0>"), "item 3", "prefix", train_file=None),
    file_case("rl", "info file", swap(INFO, "<a_0><b_0><c_3>", ""), INFO, "line 4: found"),
    file_case("sasrec", "info file", swap(INFO, "Item number 3", b"\xff"), INFO, "line 4: found the byte 0xff"),
    file_case("sasrec", "info file", half(INFO), INFO),
    file_case("recommend", "info file", swap(INFO, "<a_0><b_0><c_3>", "<a_0><b_0><c_3>\x00"), INFO),
    file_case("recommend", "info file", folder_there(INFO), INFO, "found a folder"),
    file_case("fuse_embeddings", "info file", edit(INFO, lambda d: d.replace(b"\t", b" ")), INFO, "line 1: found"),
    file_case("sft", "contradiction", json_edit(INDEX, lambda c: c.pop("47") and None), ITEMS, "48 items, expected the 47"),
    file_case("sft", "JSON", half(ITEMS), ITEMS, "not valid JSON"),
    file_case("rl", "contradiction", json_edit(INDEX, lambda c: c.update({"3": c["4"]})), INDEX, "differ", sid_index_path=INDEX),
    file_case("rl", "contradiction", json_edit(ITEMS, lambda c: c.pop("47") and None), ITEMS, "found 47 items", item_meta_path=ITEMS),
    *json_cases("text2emb", ITEMS, "expected an object"),
    *json_cases("base_model", ITEMS, "expected an object"),
]  # fmt: skip


def template_cases() -> list[Case]:
    """Damaged prompt templates, at the three stages that read one."""
    own = "sft/prompt.yaml"
    return [
        file_case("evaluate", "template", put(own, ""), own, "the file is"),
        file_case("evaluate", "template", put(own, "- a\n"), own, "not a prompt template"),
        file_case("evaluate", "template", put(own, "a: [1"), own, "not a prompt template"),
        file_case("evaluate", "template", put(own, "a: !!python/object/apply:os.mkdir ['x']"), own, "not a prompt template"),
        file_case("rl", "template", swap(own, '"{history}"', '"{hist}"'), own, "tasks: sid_seq: input"),
        file_case("rl", "template", swap(own, '"{history}"', '"{history.__class__}"'), own, "tasks: sid_seq: input"),
        file_case("rl", "template", swap(own, '"{history}"', '"{history"'), own, "tasks: sid_seq: input"),
        file_case("recommend", "template", swap(own, "sid_separator:", "separator:"), own, "sid_separator is 'missing'"),
        file_case("recommend", "template", swap(own, "sid_separator:", "colour: red\nsid_separator:"), own, "colour"),
        file_case("sft", "template", put("own.yaml", "tasks: 3"), "own.yaml", "not a prompt template", prompt_template="own.yaml"),
        file_case("sft", "template", put("own.yaml", b"\xff\xfea"), "own.yaml: found UTF-16", prompt_template="own.yaml"),
        option_case("sft", "nowhere.yaml: no such file or folder; check --prompt_template", prompt_template="nowhere.yaml"),
    ]  # fmt: skip


EMBEDDING = [
    option_case("text2emb", "--max_sent_len 0: expected at least 1", max_sent_len=0),
    option_case("text2emb", "--batch_size -1: expected at least 1", batch_size=-1),
    option_case("text2emb", "--word_drop_ratio 1.0: expected below 1", word_drop_ratio=1),
    option_case("text2emb", "--word_drop_ratio nan: expected a finite number", word_drop_ratio="nan"),
    option_case("text2emb", "--plm_name a/b: expected a plain name, without slashes", plm_name="a/b"),
    option_case("text2emb", "--dataset ../x/toy: expected a plain name, without slashes", dataset="../x/toy"),
    option_case("text2emb", "--device", device="tpu"),
    option_case("text2emb", "no such file or folder", dataset="other"),
    option_case("text2emb", "nowhere: no such file or folder; check --plm_checkpoint", plm_checkpoint="nowhere"),
    option_case("text2emb", "--seed -1: expected 0 to 4294967295", seed=-1),
    file_case("text2emb", "weights", half("encoder/model.safetensors"), "encoder: not an encoder that can be loaded"),
    file_case("text2emb", "weights", put("encoder/config.json", "[]"), "encoder: not an encoder that can be loaded"),
    file_case("text2emb", "weights", remove("encoder/tokenizer.json"), "encoder: not an encoder that can be loaded"),
    file_case("text2emb", "weights", put("encoder/modules.json", "{"), "encoder/modules.json: not valid JSON"),
    file_case("text2emb", "earlier result", put("toy.emb-y-td.npy", "precious"), "holds another result"),
    option_case("base_model", "--vocab_size", vocab_size=-5),
    option_case("base_model", "--kind", kind="huge"),
    option_case("base_model", "nowhere.json: no such file or folder; check --config_file", config_file="nowhere.json"),
    file_case("base_model", "JSON", put("own.json", '{"model_type": "no_such"}'), "own.json", config_file="own.json"),
    file_case("base_model", "JSON", put("own.json", '{"hidden_size": 3}'), "own.json", config_file="own.json"),
    file_case("base_model", "JSON", put("own.json", '{"model_type": "qwen2", "hidden_size": "wide"}'), "own.json", config_file="own.json"),
    file_case("base_model", "earlier result", put("out/config.json", "{}"), "out: holds another result"),
    option_case("fuse_embeddings", "--ridge 0.0: expected more than 0", ridge=0),
    option_case("fuse_embeddings", "--pca_dim -1: expected at least 0", pca_dim=-1),
    option_case("fuse_embeddings", "nothing is left", text_weight=0, behaviour_weight=0),
    option_case("fuse_embeddings", "nowhere: no such file or folder; check --baseline_path", baseline_path="nowhere"),
    file_case("fuse_embeddings", "array", array("toy.emb-x-td.npy", lambda m: m[:40]), "48 items", "40"),
    file_case("fuse_embeddings", "array", put("toy.emb-x-td.npy", ""), "toy.emb-x-td.npy: not a .npy array"),
    file_case("fuse_embeddings", "weights", half("sasrec/model.safetensors"), "sasrec"),
    file_case("fuse_embeddings", "weights", put("sasrec/config.json", "[]"), "sasrec/config.json: found a JSON list"),
]  # fmt: skip

CASES = [*PREPROCESS, *csv_cases(), *CONVERT, *CATALOG, *template_cases(), *EMBEDDING]
