"""Item text to embeddings: `<root>/<dataset>.item.json` -> `<root>/<dataset>.emb-<plm_name>-td.npy`.

    python -m rq.text2emb.amazon_text2emb --dataset ml-100k --root output/quickstart/raw --plm_name minilm \
        --plm_checkpoint models/all-MiniLM-L6-v2

The text of an item is its title, description, brand and categories, those that are not empty, in this order. An item
without text is embedded as "item <id>", because items with equal embeddings get equal codes. The embedding is the mean
of the last hidden states over the attention mask. It is scaled to length 1 where the encoder's `modules.json`
(sentence-transformers) ends in a Normalize module.
"""

import ast
import html
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minionerec.common import runs
from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file, read_json, require_file
from minionerec.common.options import INPUT, RUNTIME, StageOptions, option, run
from rq.options import DEVICE_HELP

FIELDS = ("title", "description", "brand", "categories")
_TAG = re.compile(r"</?[a-zA-Z][^>]*>")


@dataclass
class Options(StageOptions):
    dataset: str = option("", "name of the data set, <D> in the file names", role=RUNTIME)
    root: str = option("", "folder with <D>.item.json; the embeddings are written there", role=RUNTIME)
    plm_name: str = option("", "short name of the encoder, for the file name", role=RUNTIME)
    plm_checkpoint: str = option("", "Hugging Face folder of the encoder", role=INPUT)
    max_sent_len: int = option(2048, "longest text in tokens; the encoder's limit applies too")
    batch_size: int = option(64, "texts per step", role=RUNTIME)
    word_drop_ratio: float = option(-1.0, "share of words to drop at random; 0 or less: none")
    seed: int = option(42, "seed of the dropped words")
    device: str = option("", DEVICE_HELP, role=RUNTIME)

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "max_sent_len", "batch_size")
        self.check(
            word_drop_ratio=(self.word_drop_ratio < 1, "below 1; 0 or less drops nothing"),
            plm_name=("/" not in self.plm_name, "a short name without /, which becomes part of the file name"),
        )


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


def load_encoder(folder: Path, device):
    """Tokenizer and model of a Hugging Face folder; nothing is downloaded, no code of the folder is executed."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        dtype = torch.float32 if device.type == "cpu" else "auto"
        model = AutoModel.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except Exception as error:  # transformers, tokenizers and safetensors raise many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: not an encoder that can be loaded ({reason}); check --plm_checkpoint") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise UserError(f"{folder}: its tokenizer has no token to pad with; set pad_token in tokenizer_config.json")
    tokenizer.padding_side = "right"
    return tokenizer, model.to(device).eval()


def read_optional(path: Path, kind: type):
    """The JSON in `path`, empty where there is no file; raises `UserError` where it is broken or no `kind`."""
    if not path.is_file():
        return kind()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); check --plm_checkpoint") from None
    if not isinstance(content, kind):
        raise UserError(f"{path}: found a {type(content).__name__}, expected a {kind.__name__}; check --plm_checkpoint")
    return content


def length_limit(folder: Path, tokenizer, model, asked: int) -> int:
    """Most tokens of a text: the smallest of `asked`, the encoder's positions and the length that it declares."""
    own = [tokenizer.model_max_length, read_optional(folder / "sentence_bert_config.json", dict).get("max_seq_length")]
    own.append(getattr(model.config, "max_position_embeddings", None))
    limit = min([asked, *(n for n in own if isinstance(n, int) and n > 0)])
    if limit < asked:
        print(f"texts are cut at {limit} tokens, the limit of this encoder (--max_sent_len {asked})")
    return limit


def normalizes(folder: Path) -> bool:
    """Whether the folder is a sentence-transformers model that scales its embeddings to length 1."""
    pooling = read_optional(folder / "1_Pooling" / "config.json", dict)
    if pooling and not pooling.get("pooling_mode_mean_tokens"):
        print("note: this encoder declares another pooling; the mean of the tokens is used")
    modules = read_optional(folder / "modules.json", list)
    return any(isinstance(m, dict) and str(m.get("type", "")).endswith("Normalize") for m in modules)


def embed(texts: list[str], tokenizer, model, *, max_length: int, batch_size: int, normalize: bool) -> np.ndarray:
    """Mean-pooled last hidden states, float32 (texts, dim), in the order of `texts`.

    Batches hold texts of similar length, the longest first: little padding, and memory peaks in the first batch.
    """
    import torch
    from tqdm import tqdm

    ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    embeddings = np.empty((len(texts), model.config.hidden_size), dtype=np.float32)
    for begin in tqdm(range(0, len(order), batch_size), desc="embedding", unit="batch"):
        rows = order[begin : begin + batch_size]
        batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state.float()  # (batch, tokens, dim)
        mask = batch["attention_mask"].unsqueeze(-1).float()
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
        if normalize:
            pooled = torch.nn.functional.normalize(pooled, dim=-1)
        embeddings[rows] = pooled.cpu().numpy()
    return embeddings


def main(options: Options) -> None:
    options.require("dataset", "root", "plm_name", "plm_checkpoint")
    o = options
    root, folder = require_file(o.root, "root"), Path(o.plm_checkpoint)
    items, path = root / f"{o.dataset}.item.json", root / f"{o.dataset}.emb-{o.plm_name}-td.npy"
    texts = item_texts(items)
    record = runs.begin(o, "text2emb", files=[path], inputs={"items": items})
    if record.complete:
        return

    from minionerec.common.devices import pick_device

    blank = sum(text == f"item {i}" for i, text in enumerate(texts))
    print(f"{len(texts)} items, {blank} without any text (embedded as 'item <id>')")
    if o.word_drop_ratio > 0:
        texts = drop_words(texts, o.word_drop_ratio, o.seed)
    tokenizer, model = load_encoder(folder, pick_device(o.device))
    max_length, normalize = length_limit(folder, tokenizer, model, o.max_sent_len), normalizes(folder)
    embeddings = embed(texts, tokenizer, model, max_length=max_length, batch_size=o.batch_size, normalize=normalize)
    bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(bad):
        raise UserError(f"{folder}: NaN or Inf for {len(bad)} items, first item {bad[0]}; use another encoder or dtype")
    with atomic_file(path, "wb") as f:
        np.save(f, embeddings, allow_pickle=False)
    record.finish()
    print(f"wrote {path}: {embeddings.shape[0]} items x {embeddings.shape[1]}")


if __name__ == "__main__":
    run(main, Options)
