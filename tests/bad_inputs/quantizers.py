"""Bad input of the stages that build, extend and compare indexes."""

import numpy as np
from bad_inputs.bench import Case, array, arrays, file_case, half, json_edit, option_case, put, remove, tensors

EMBEDDINGS = "toy.emb-x-td.npy"
TRAINED, CLUSTERED = ("rqvae", "rqkmeans_plus"), ("rqkmeans_constrained", "rqkmeans_faiss")
QUANTIZERS = (*TRAINED, *CLUSTERED, "generate_indices")


def nan_row(matrix: np.ndarray) -> np.ndarray:
    matrix[7, 0] = np.nan
    return matrix


def embedding_cases() -> list[Case]:
    """Each damaged embedding at two quantizers, in turn; all five read it by one function."""
    damages = [
        (put(EMBEDDINGS, ""), "not a .npy array"),
        (put(EMBEDDINGS, "1,2\n3,4\n"), "not a .npy array"),
        (half(EMBEDDINGS), "not a .npy array"),
        (remove(EMBEDDINGS), "no such file or folder; check --data_path"),
        (array(EMBEDDINGS, lambda m: m[0]), "found float32 (8,), expected a 2-D float array"),
        (array(EMBEDDINGS, lambda m: m.astype(np.int64)), "found int64 (48, 8)"),
        (array(EMBEDDINGS, lambda m: m.astype(object)), "not a .npy array"),
        (array(EMBEDDINGS, lambda m: m[:1]), "expected at least 2 rows"),
        (array(EMBEDDINGS, lambda m: m[:, :0]), "expected at least 2 rows and 1 column"),
        (array(EMBEDDINGS, lambda m: np.ones_like(m)), "all 48 rows are equal"),
        (array(EMBEDDINGS, nan_row), "NaN or Inf in 1 of 48 rows, first row 7"),
        (array(EMBEDDINGS, lambda m: m * np.float32(np.inf)), "NaN or Inf in 48 of 48 rows"),
    ]
    cases = []
    for place, (damage, found) in enumerate(damages):
        for stage in (QUANTIZERS[place % 5], QUANTIZERS[(place + 1 + place // 5) % 5]):
            cases.append(file_case(stage, "array", damage, EMBEDDINGS, found))
    return cases


def trained_options(stage: str) -> list[Case]:
    return [
        option_case(stage, "--lr 0.0: expected more than 0", lr=0),
        option_case(stage, "--lr inf: expected a finite number", lr="inf"),
        option_case(stage, "--epochs 0: expected at least 1", epochs=0),
        option_case(stage, "--learner lion: expected one of adam", learner="lion"),
        option_case(stage, "--dropout_prob 1.0: expected 0 or more and below 1", dropout_prob=1),
        option_case(stage, "--layers [0]: expected sizes of at least 1", layers=0),
        option_case(stage, "--seed 4294967296: expected 0 to", seed=2**32),
        option_case(stage, "--sk_epsilons", "one per level", sk_epsilons="0.1 0.1 0.1"),
        option_case(stage, "--compile True is for cuda", compile=True),
        option_case(stage, "NaN or Inf", "lower --lr", lr=1e30, epochs=20, learner="sgd"),
        file_case(stage, "path", put("out", "a file"), "out"),
        file_case(stage, "earlier result", put("out/config.json", "{}"), "out: holds another result"),
    ]


def clustered_options(stage: str) -> list[Case]:
    return [
        option_case(stage, "--k 1: expected 2 to 65536", k=1),
        option_case(stage, "--l 0: expected 1 to 26", l=0),
        option_case(stage, "n=48 items are fewer than K=64", k=64),
        option_case(stage, "make 8 SIDs, fewer than the 48 items", l=1, collision="nearest_free"),
        option_case(stage, "--max_iter 0: expected at least 1", max_iter=0),
        option_case(stage, "--seed -1: expected 0 to", seed=-1),
        option_case(stage, "--output_file toy.txt: expected a name like <D>.index.json", output_file="toy.txt"),
        option_case(stage, "either --dataset and --root, or --data_path", dataset="toy", root="."),
        option_case(stage, "--dataset ../x/toy: expected a plain name", dataset="../x/toy", root=".", data_path=None),
        option_case(stage, "more.emb-x-td.npy", "items", item_meta_path="toy.item.json", data_path="more.emb-x-td.npy"),
        option_case(stage, "argument --collision: invalid choice", collision="sometimes"),
        file_case(stage, "earlier result", put("out/toy.index.json", "{}"), "out/toy.index.json: holds another result"),
    ]


RQVAE = [
    option_case("rqvae", "--num_emb_list [1, 8]: expected 2 to 65536 codes", num_emb_list="1 8"),
    option_case("rqvae", "fewer than K=64", num_emb_list="64 8"),
    option_case("rqvae", "--e_dim 0: expected at least 1", e_dim=0),
]

PLUS = [
    option_case("rqkmeans_plus", "nowhere.npz: no such file", pretrained_codebook_path="nowhere.npz"),
    option_case("rqkmeans_plus", "--e_dim 5: expected 8, the width of the embeddings", e_dim=5),
    option_case("rqkmeans_plus", "--num_emb_list [4, 4]: expected [8, 8]", num_emb_list="4 4"),
    *(
        file_case(stage, "array", damage, "books.npz", found, **options)
        for stage, options in (("rqkmeans_plus", {}), ("generate_indices", {"ckpt_path": "books.npz"}))
        for damage, found in (
            (put("books.npz", ""), "not an .npz of codebooks"),
            (half("books.npz"), "npz"),
            (arrays("books.npz", book=np.ones((8, 8))), "expected codebook_0"),
            (arrays("books.npz", codebook_0=np.ones((8, 5))), "width 5" if stage == "rqkmeans_plus" else "5"),
            (arrays("books.npz", codebook_0=np.ones((8, 8)), codebook_1=np.ones((8, 5))), "codebook_1 is"),
            (arrays("books.npz", codebook_0=np.full((8, 8), np.nan)), "codebook_0 is"),
            (arrays("books.npz", codebook_0=np.ones((1, 8))), "codebook_0 is"),
            (arrays("books.npz", codebook_0=np.ones((8, 8)), codes=np.full((48, 1), 8)), "codes do not fit"),
            (arrays("books.npz", codebook_0=np.array([{}], dtype=object)), "not an .npz of codebooks"),
        )
    ),
]

WEIGHTS, CONFIG = "rqvae/best_collision.safetensors", "rqvae/config.json"


def set_nan(content: dict) -> None:
    next(iter(content.values())).fill_(float("nan"))


GENERATE = [
    option_case("generate_indices", "nowhere: no such file or folder; check --ckpt_path", ckpt_path="nowhere"),
    option_case("generate_indices", "--batch_size 0: expected at least 1", batch_size=0),
    option_case("generate_indices", "--append_tokens used: expected codebook without --append", append_tokens="used"),
    option_case("generate_indices", "--output_file x: expected a name like <D>.index.json", output_file="x"),
    option_case("generate_indices", "--device", device="cuda:99"),
    file_case("generate_indices", "weights", half(WEIGHTS), WEIGHTS, "not a file of weights"),
    file_case("generate_indices", "weights", put(WEIGHTS, "x" * 100), WEIGHTS, "not a file of weights"),
    file_case("generate_indices", "weights", tensors(WEIGHTS, set_nan), WEIGHTS, "NaN or Inf in 1 of"),
    file_case("generate_indices", "weights", tensors(WEIGHTS, lambda c: c.popitem() and None), WEIGHTS, "does not fit its config.json"),
    file_case("generate_indices", "weights", remove(WEIGHTS), WEIGHTS, "no such file"),
    file_case("generate_indices", "weights", remove(CONFIG), CONFIG, "no such file"),
    file_case("generate_indices", "weights", put(CONFIG, "[]"), CONFIG, "found a JSON list"),
    file_case("generate_indices", "weights", json_edit(CONFIG, lambda c: c.update(architecture="resnet")), CONFIG, "architecture 'resnet'"),
    file_case("generate_indices", "weights", json_edit(CONFIG, lambda c: c.update(model={})), CONFIG, "expected model with in_dim"),
    file_case("generate_indices", "weights", json_edit(CONFIG, lambda c: c["model"].update(e_dim="x")), WEIGHTS, "does not fit"),
    file_case("generate_indices", "weights", json_edit(CONFIG, lambda c: c["model"].update(in_dim=9)), "8 columns, but", "trained on 9"),
    file_case("generate_indices", "unfinished", json_edit("rqvae/run.json", lambda c: c.update(complete=False)), "rqvae: the training there has not finished"),
    file_case("generate_indices", "earlier result", put("out/toy.index.json", "{}"), "out/toy.index.json: holds another result"),
    option_case("append", "--append keeps old SIDs", collision="sinkhorn"),
    option_case("append", "the index has 48 items and the embeddings 48 rows", data_path=EMBEDDINGS),
    option_case("append", "the index was not made by this quantizer", append="toy.index.json"),
    option_case("append", "another file than --append", output_file="rqvae.index.json"),
    file_case("append", "JSON", put("rqvae.index.json", "{}"), "rqvae.index.json"),
    file_case("append", "JSON", half("rqvae.index.json"), "rqvae.index.json: not valid JSON"),
    file_case("append", "JSON", json_edit("rqvae.index.json", lambda c: c.pop("5") and None), "item 5 is missing"),
    file_case("append", "JSON", json_edit("rqvae.index.json", lambda c: c.update({"5": ["<a_1>"]})), "rqvae.index.json"),
    file_case("append", "JSON", json_edit("rqvae.index.json", lambda c: c.update({"5": ["<a_99>", "<b_1>"]})), "--append"),
    option_case("fuse_embeddings", "--text_weight 2000.0: expected at most 1000", text_weight=2000),
    option_case("fuse_embeddings", "--behaviour_weight 2000.0: expected at most 1000", behaviour_weight=2000),
    option_case("sid_report", "one or more index files are required", index=None),
    option_case("sid_report", "nowhere.json: no such file", index="toy.index.json nowhere.json"),
    option_case("sid_report", "--output_file x.txt: expected a name like compare.json", output_file="x.txt"),
    file_case("sid_report", "earlier result", put("out/compare.json", '{"a": {"b": 1}}'), "out/compare.json: holds another result", "--overwrite True"),
    file_case("sid_report", "earlier result", put("out/compare.png", "mine"), "out/compare.png: holds another result"),
    option_case("sid_report", "48 items, but --data_path has 50 rows", data_path="more.emb-x-td.npy"),
    file_case("sid_report", "JSON", put("toy.index.json", "{}"), "toy.index.json: no item in it"),
    file_case("sid_report", "JSON", put("toy.index.quality.json", "{"), "toy.index.quality.json: not valid JSON"),
    file_case("sid_report", "JSON", put("toy.index.quality.json", '{"after": 3}'), "toy.index.quality.json"),
    file_case("sid_report", "JSON", json_edit("toy.index.json", lambda c: c.update({"5": {"a": 1}})), "item 5"),
]  # fmt: skip

CASES = [
    *embedding_cases(),
    *(case for stage in TRAINED for case in trained_options(stage)),
    *(case for stage in CLUSTERED for case in clustered_options(stage)),
    *RQVAE,
    *PLUS,
    *GENERATE,
]
