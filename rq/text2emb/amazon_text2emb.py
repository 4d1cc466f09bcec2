"""Item text to embeddings: `<root>/<dataset>.item.json` -> `<root>/<dataset>.emb-<plm_name>-td.npy`.

    python -m rq.text2emb.amazon_text2emb --dataset ml-100k --root output/quickstart/raw --plm_name minilm \
        --plm_checkpoint models/all-MiniLM-L6-v2

The text of an item is its title, description, brand and categories, those that are not empty, in this order. An item
without text is embedded as "item <id>", because items with equal embeddings get equal codes. sentence-transformers loads
the encoder, with its pooling, prompts and normalisation (`rq/text2emb/encoder.py`). Started by `accelerate launch` or
torchrun, the processes share the items (`rq/text2emb/parts.py`).
"""

import ast
import html
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minionerec.common import runs
from minionerec.common.errors import UserError
from minionerec.common.files import read_json, require_file
from minionerec.common.options import INPUT, RUNTIME, StageOptions, option, run
from minionerec.common.processes import on_main_process
from rq.options import DEVICE_HELP

POOLING = ("mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")
DTYPES = ("float32", "bfloat16", "float16")
CPU_TOKENS, GPU_TOKENS = 1024, 65536
FIELDS = ("title", "description", "brand", "categories")
_TAG = re.compile(r"</?[a-zA-Z][^>]*>")


@dataclass
class Options(StageOptions):
    dataset: str = option("", "name of the data set, <D> in the file names", role=RUNTIME)
    root: str = option("", "folder with <D>.item.json; the embeddings are written there", role=RUNTIME)
    plm_name: str = option("", "short name of the encoder, for the file name", role=RUNTIME)
    plm_checkpoint: str = option("", "folder of the encoder: sentence-transformers or Hugging Face", role=INPUT)
    max_sent_len: int = option(2048, "longest text in tokens; the encoder's limit applies too")
    pooling: str = option(
        "",
        f"{', '.join(POOLING)}; default: as the encoder's folder says, else mean, or lasttoken for a causal language model",
    )
    prompt: str = option("", "text before each item's text, such as an instruction")
    prompt_name: str = option("", "name of a prompt of the encoder; default: its default prompt, if it has one")
    dtype: str = option("", f"{', '.join(DTYPES)}; default: bfloat16 on a GPU that computes in it, else float32")
    word_drop_ratio: float = option(-1.0, "share of words to drop at random; 0 or less: none")
    seed: int = option(42, "seed of the dropped words")
    batch_size: int = option(1024, "most texts per step", role=RUNTIME)
    batch_tokens: int = option(
        0, f"most tokens per step, padding included; 0: {CPU_TOKENS} on a CPU, {GPU_TOKENS} on a GPU", role=RUNTIME
    )
    device: str = option("", DEVICE_HELP, role=RUNTIME)

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "max_sent_len", "batch_size")
        self.at_least(0, "batch_tokens")
        self.check(
            word_drop_ratio=(self.word_drop_ratio < 1, "below 1; 0 or less drops nothing"),
            pooling=(self.pooling in ("", *POOLING), " or ".join(POOLING)),
            dtype=(self.dtype in ("", *DTYPES), " or ".join(DTYPES)),
            prompt_name=(not (self.prompt and self.prompt_name), "nothing, because --prompt is given"),
        )
        self.plain_names("dataset", "plm_name")


def plain_text(value) -> str:
    """A field as one line of text; empty where it is missing, which NaN means too.

    The entries of lists and the values of dicts are joined, nested or written as a string. HTML tags and entities are
    removed.
    """
    if value is None or value != value or value == "nan":  # NaN, also as pandas writes it into a text
        return ""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return " ".join(filter(None, map(plain_text, value)))
    text = str(value).strip()
    if text[:1] + text[-1:] in ("[]", "{}"):
        for parse in (ast.literal_eval, json.loads):
            try:
                parsed = parse(text)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue  # not a list or dict after all
            if isinstance(parsed, list | dict):
                return plain_text(parsed)
    return " ".join(_TAG.sub(" ", html.unescape(text)).split())


def item_texts(path: Path) -> list[str]:
    """One text per item; entry i is item i. Raises `UserError` if ids are not 0..n-1 or an item is not an object."""
    items = read_json(path, "root")
    if not items:
        raise UserError(f"{path}: no item in it; run the preprocessing first")
    texts = []
    for item in range(len(items)):
        fields = items.get(str(item))
        if fields is None:
            raise UserError(f"{path}: item {item} is missing, expected ids 0..{len(items) - 1} without gaps")
        if not isinstance(fields, dict):
            raise UserError(f'{path}: item {item} is a {type(fields).__name__}, expected an object with a "title"')
        try:
            text = " ".join(filter(None, (plain_text(fields.get(field)) for field in FIELDS)))
        except RecursionError:
            raise UserError(f"{path}: item {item} has lists in lists in lists without end; expected a text") from None
        texts.append(text or f"item {item}")
    return texts


def drop_words(texts: list[str], ratio: float, seed: int) -> list[str]:
    """The texts with each word dropped with probability `ratio`; a text that would become empty is kept."""
    rng = np.random.default_rng(seed)
    kept = (" ".join(w for w in text.split() if rng.random() >= ratio) or text for text in texts)
    return list(kept)


# ------------------------------------------------------------------------------------------------ the command


def join_processes(device: str):
    """This process among those of the launch, as an `accelerate.PartialState`; None if it is the only one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    if device and device not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: several processes use one GPU each; leave it out")
    timeout = timedelta(hours=2)  # a process waits while others embed a part of long texts
    return PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=timeout)


def load_encoder(o: Options, process):
    """The encoder on this process's device, as the options ask for it."""
    import torch

    from minionerec.common.devices import pick_device
    from rq.text2emb.encoder import Encoder

    if process is None:
        device = pick_device(o.device)
    else:  # "cpu", not a rank's "cpu:0"
        device = process.device if process.device.type != "cpu" else torch.device("cpu")
    encoder = Encoder(
        Path(o.plm_checkpoint),
        device,
        max_length=o.max_sent_len,
        dtype=o.dtype,
        pooling=o.pooling,
        prompt=o.prompt,
        name=o.prompt_name,
    )
    if process is None or process.is_main_process:
        prompt = f"; prompt {encoder.prompt!r}" if encoder.prompt else ""
        print(f"encoder: {encoder.modules}; {encoder.dtype} on {device.type}{prompt}")
        if encoder.max_length < o.max_sent_len:
            print(f"texts are cut at {encoder.max_length} tokens, the limit of this encoder")
    return encoder


def main(options: Options) -> None:
    options.require("dataset", "root", "plm_name", "plm_checkpoint")
    o = options
    root = require_file(o.root, "root")
    items, path = root / f"{o.dataset}.item.json", root / f"{o.dataset}.emb-{o.plm_name}-td.npy"
    texts = item_texts(items)
    process = join_processes(o.device)
    is_main = process is None or process.is_main_process
    record = on_main_process(lambda: runs.begin(o, "text2emb", files=[path], inputs={"items": items}))
    if record.complete:
        return
    if is_main:
        blank = sum(text == f"item {i}" for i, text in enumerate(texts))
        print(f"{len(texts)} items, {blank} without any text (embedded as 'item <id>')")
    if o.word_drop_ratio > 0:
        texts = drop_words(texts, o.word_drop_ratio, o.seed)

    from rq.text2emb.parts import PartialMatrix, embed_texts

    encoder = load_encoder(o, process)
    identity = {key: record.record[key] for key in ("settings", "inputs")}
    matrix = PartialMatrix(path, identity, (len(texts), encoder.dim()))
    budget = o.batch_tokens or (GPU_TOKENS if encoder.device.type == "cuda" else CPU_TOKENS)
    embed_texts(texts, encoder, matrix, process, resume=record.resume, budget=budget, most=o.batch_size)
    if is_main:
        matrix.finish()
        record.record["processes"] = process.num_processes if process else 1
        record.finish()
        matrix.remove_progress()
        print(f"wrote {path}: {matrix.shape[0]} items x {matrix.shape[1]}")


if __name__ == "__main__":
    run(main, Options)
