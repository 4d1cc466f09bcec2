"""Item text to embedding: `<root>/<dataset>.item.json` -> `<root>/<dataset>.emb-<plm_name>-td.npy`.

    python -m rq.text2emb.amazon_text2emb --dataset Industrial_and_Scientific --root data/industrial/index \
        --plm_name minilm --plm_checkpoint models/all-MiniLM-L6-v2

An item's text is its title, description, brand and categories, those that are not empty, in this order. An item
without any text is embedded as "item <id>": equal embeddings could not be told apart by any code, and these are equal
for no two items. The embedding is the mean of the last hidden states over the attention mask, scaled to length 1 where
the encoder's `modules.json` (sentence-transformers) ends in a Normalize module.
"""

import ast
import html
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers.hf_argparser import HfArg

from minionerec.common.devices import pick_device
from minionerec.common.errors import UserError
from minionerec.common.files import atomic_file, read_json, require_file
from minionerec.common.options import run

FIELDS = ("title", "description", "brand", "categories")
_TAG = re.compile(r"</?[a-zA-Z][^>]*>")


@dataclass
class Options:
    dataset: str = HfArg(default="", help="name of the data set, <D> in the file names")
    root: str = HfArg(default="", help="folder with <D>.item.json; the embedding is written there")
    plm_name: str = HfArg(default="", help="short name of the encoder, for the file name")
    plm_checkpoint: str = HfArg(default="", help="Hugging Face folder of the encoder")
    max_sent_len: int = HfArg(default=2048, help="longest text in tokens; the encoder's own limit holds too")
    batch_size: int = HfArg(default=64, help="texts a step")
    word_drop_ratio: float = HfArg(default=-1.0, help="share of words left out at random; 0 or less: none")
    seed: int = HfArg(default=42, help="seed of the words left out")
    device: str = HfArg(default="", help="cpu, cuda, cuda:1, ...; empty: cuda if there is one")

    def __post_init__(self):
        for flag in ("dataset", "plm_name"):
            if not getattr(self, flag):
                raise UserError(f"--{flag} is required")
        for flag in ("max_sent_len", "batch_size"):
            if getattr(self, flag) < 1:
                raise UserError(f"--{flag} is {getattr(self, flag)}, expected at least 1")
        if self.word_drop_ratio >= 1:
            raise UserError(f"--word_drop_ratio is {self.word_drop_ratio}, expected below 1; 0 or less drops nothing")


def plain_text(value) -> str:
    """A field as one line of text. Lists, nested or written out as a string, are joined; tags and entities go."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return " ".join(filter(None, map(plain_text, value)))
    text = str(value).strip()
    if text.startswith("[") and text.endswith("]"):
        try:
            return plain_text(ast.literal_eval(text))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass  # a text that only looks like a list
    return " ".join(_TAG.sub(" ", html.unescape(text)).split())


def item_texts(path: Path) -> list[str]:
    """One text an item, entry i is item i. Raises `UserError` if ids are not 0..n-1 or an item is not an object."""
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
        text = " ".join(filter(None, (plain_text(fields.get(field)) for field in FIELDS)))
        texts.append(text or f"item {item}")
    return texts


def drop_words(texts: list[str], ratio: float, seed: int) -> list[str]:
    """Each word of each text left out with probability `ratio`; a text that would end empty stays whole."""
    rng = np.random.default_rng(seed)
    kept = (" ".join(w for w in text.split() if rng.random() >= ratio) or text for text in texts)
    return list(kept)


def load_encoder(folder: Path, device: torch.device):
    """Tokenizer and model of a Hugging Face folder; nothing is fetched, no code of the folder is executed."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        dtype = torch.float32 if device.type == "cpu" else "auto"
        model = AutoModel.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: not an encoder that can be loaded ({reason}); check --plm_checkpoint") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer, model.to(device).eval()


def _read_optional(path: Path):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def length_limit(folder: Path, tokenizer, model, asked: int) -> int:
    """Tokens a text may have: the least of what was asked for and what the encoder can take or was made for."""
    own = [tokenizer.model_max_length, _read_optional(folder / "sentence_bert_config.json").get("max_seq_length")]
    own.append(getattr(model.config, "max_position_embeddings", None))
    limit = min([asked, *filter(None, own)])
    if limit < asked:
        print(f"texts are cut at {limit} tokens, the limit of this encoder (--max_sent_len {asked})")
    return limit


def normalizes(folder: Path) -> bool:
    """Whether the folder is a sentence-transformers model that scales its embeddings to length 1."""
    pooling = _read_optional(folder / "1_Pooling" / "config.json")
    if pooling and not pooling.get("pooling_mode_mean_tokens"):
        print("this encoder declares another pooling than the mean; the mean is taken all the same")
    return any(str(module.get("type", "")).endswith("Normalize") for module in _read_optional(folder / "modules.json"))


@torch.inference_mode()
def embed(texts: list[str], tokenizer, model, *, max_length: int, batch_size: int, normalize: bool) -> np.ndarray:
    """Mean-pooled last hidden states, float32 (texts, dim), in the order of `texts`.

    Batches are cut from the texts sorted by length, so that padding is rare; memory shows its peak at once.
    """
    ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    embeddings = np.empty((len(texts), model.config.hidden_size), dtype=np.float32)
    for begin in tqdm(range(0, len(order), batch_size), desc="embedding", unit="batch"):
        rows = order[begin : begin + batch_size]
        batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt").to(model.device)
        hidden = model(**batch).last_hidden_state.float()  # (batch, tokens, dim)
        mask = batch["attention_mask"].unsqueeze(-1).float()
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
        if normalize:
            pooled = torch.nn.functional.normalize(pooled, dim=-1)
        embeddings[rows] = pooled.cpu().numpy()
    return embeddings


def main(options: Options) -> None:
    folder = require_file(options.plm_checkpoint, "plm_checkpoint")
    root = require_file(options.root, "root")
    device = pick_device(options.device)
    texts = item_texts(root / f"{options.dataset}.item.json")
    blank = sum(text == f"item {i}" for i, text in enumerate(texts))
    print(f"{len(texts)} items, {blank} without any text (embedded as 'item <id>')")
    if options.word_drop_ratio > 0:
        texts = drop_words(texts, options.word_drop_ratio, options.seed)

    tokenizer, model = load_encoder(folder, device)
    max_length = length_limit(folder, tokenizer, model, options.max_sent_len)
    embeddings = embed(
        texts,
        tokenizer,
        model,
        max_length=max_length,
        batch_size=options.batch_size,
        normalize=normalizes(folder),
    )
    bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(bad):
        raise UserError(f"{folder}: NaN or Inf for {len(bad)} items, first item {bad[0]}; use another encoder or dtype")
    path = root / f"{options.dataset}.emb-{options.plm_name}-td.npy"
    with atomic_file(path, "wb") as f:
        np.save(f, embeddings, allow_pickle=False)
    print(f"wrote {path}: {embeddings.shape[0]} items x {embeddings.shape[1]}")


if __name__ == "__main__":
    run(main, Options)
