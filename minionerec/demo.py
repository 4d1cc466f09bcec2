"""A local page on which one picks a history from the catalog and sees what each model recommends, and why.

    pip install -r requirements-demo.txt
    python -m minionerec.demo --models output/quickstart/sft output/quickstart/rl output/quickstart/sasrec \\
        --info_file output/quickstart/data/info/ml-100k.txt --train_file output/quickstart/data/train/ml-100k.csv \\
        --test_data_path output/quickstart/data/test/ml-100k.csv

A language model's items come with the probability of each level of their SID given the levels before, whose product is the
probability of the SID; a baseline's with the softmax of its scores. The page is served on 127.0.0.1 only, has no script,
asks for nothing outside, and keeps the history in its address.
"""

import importlib.util
import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from minionerec.common import runs
from minionerec.common.errors import UserError
from minionerec.common.files import require_file
from minionerec.common.options import INPUT, RUNTIME, StageOptions, option, run
from minionerec.common.text import printable

MATCHES = 20  # items that a search lists


@dataclass
class Options(StageOptions):
    models: list[str] = option([], "folders of checkpoints: of sft.sh, rl.sh and sasrec.sh", role=INPUT)
    info_file: str = option("", "the catalog of these models: sid, title, item id per line", role=INPUT)
    train_file: str = option("", "train CSV: popularity, and whether items of the history are recommended", role=INPUT)
    test_data_path: str = option("", "test CSV, whose rows are offered as examples", role=INPUT)
    K: int = option(10, "items recommended by each model")
    num_beams: int = option(50, "beams of the language models")
    port: int = option(7860, "port on 127.0.0.1; 0: any free one", role=RUNTIME)

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "K")
        self.check(
            num_beams=(self.num_beams >= self.K, f"at least --K {self.K}"),
            port=(0 <= self.port < 2**16, f"0 to {2**16 - 1}"),
        )


class Level(NamedTuple):
    """A level of a SID: its token, and its probability given the levels before."""

    token: str
    probability: float


class Recommendation(NamedTuple):
    """An item with its probability; levels: why, empty for a baseline."""

    item: int
    title: str
    probability: float
    levels: Sequence[Level]


# ------------------------------------------------------------------------------------------------ models


class LanguageModel:
    """The recommendations of a checkpoint of SFT or RL."""

    def __init__(self, folder: str, options: Options):
        import recommend
        from minionerec.decoding.scoring import sid_paths

        runs.require_finished(folder)
        files = {"info_file": options.info_file, "train_file": options.train_file}
        self.recommender = recommend.Recommender(
            recommend.Options(base_model=folder, K=options.K, num_beams=options.num_beams, **files)
        )
        self.paths = sid_paths(self.recommender.loaded[0].trie)

    def __call__(self, history: list[int]) -> list[Recommendation]:
        [found] = self.recommender([history])
        levels = self._levels(history, [entry["sid"] for entry in found])
        return [
            Recommendation(entry["item_id"], entry["title"], math.exp(entry["score"]), each)
            for entry, each in zip(found, levels, strict=True)
        ]

    def _levels(self, history: list[int], sids: list[str]) -> list[list[Level]]:
        """The levels of each SID with their probabilities, under the trie in which the SIDs were searched."""
        import polars as pl
        import torch

        from data import next_sid_prompts
        from minionerec.catalog.sids import split_sid
        from minionerec.decoding.beam_search import left_pad
        from minionerec.decoding.scoring import level_scores

        if not sids:
            return []
        own = self.recommender
        engine, tokenizer = own.loaded
        model, trie = engine.model, engine.trie
        rows = pl.DataFrame({"history": [history[-own.settings.max_history :]]})
        [text] = next_sid_prompts(rows, own.items, own.prompts)
        ids, mask = left_pad([tokenizer(text)["input_ids"]], tokenizer.pad_token_id or 0, model.device)
        trie = trie.without([own.catalog.rows_of(history)] if own.unseen else None)
        sid_rows = torch.tensor([[own.catalog.row_of_sid[sid] for sid in sids]], device=model.device)
        scores = level_scores(model, trie, self.paths, ids, mask, sid_rows, engine.space)
        split = [split_sid(sid) for sid in sids]
        return [
            [Level(token, math.exp(score)) for token, score in zip(tokens, each, strict=False)]
            for tokens, each in zip(split, scores[0].tolist(), strict=True)
        ]


class Baseline:
    """The recommendations of a checkpoint of sasrec.sh."""

    def __init__(self, folder: str, options: Options, titles: Sequence[str], unseen: bool):
        from minionerec.baselines.models import load_checkpoint

        self.model = load_checkpoint(folder, "models", len(titles))
        self.titles, self.unseen, self.count = titles, unseen, options.K

    def __call__(self, history: list[int]) -> list[Recommendation]:
        scores = self.model.scores([history])[0].double()
        if self.unseen:
            scores[history] = -math.inf
        best = scores.softmax(dim=0).topk(min(self.count, len(scores)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [Recommendation(item, self.titles[item], p, []) for item, p in pairs if p > 0]


class World:
    """The catalog, the models by name, and example rows."""

    def __init__(self, options: Options):
        from data import load
        from minionerec.catalog.catalog import target_counts
        from minionerec.evaluation.protocols import headline
        from recommend import Titles

        files = {"info_file": options.info_file, "train": options.train_file, "test": options.test_data_path}
        data = load(**files, max_history=10**6)
        n_items = data.catalog.n_items
        popularity = [0] * n_items if data.train is None else target_counts(data.train, n_items)
        self.titles, self.examples = Titles(data.items.titles, popularity), data.test
        unseen = headline(data.train) == "unseen"
        self.models = {
            name: Baseline(folder, options, data.items.titles, unseen)
            if is_baseline(folder)
            else LanguageModel(folder, options)
            for name, folder in zip(names_of(options.models), options.models, strict=True)
        }

    def history_of(self, text: str) -> list[int]:
        """The item ids in `"3,17"`, those of the catalog."""
        return [item for item in numbers(text) if item < len(self.titles.titles)]


def numbers(text: str) -> list[int]:
    """The whole numbers below 10^9 in `"3,17"`; other parts are left out."""
    return [int(part) for part in text.split(",") if part.isascii() and part.isdecimal() and len(part) < 10]


def is_baseline(folder: str) -> bool:
    """Whether a folder holds a model of sasrec.sh. Language models have a tokenizer."""
    return not (require_file(folder, "models") / "tokenizer.json").exists()


def names_of(folders: Sequence[str]) -> list[str]:
    """The last part of each path, or the whole path where two share that."""
    last = [Path(folder).resolve().name for folder in folders]
    return [name if last.count(name) == 1 else str(folder) for name, folder in zip(last, folders, strict=True)]


# ------------------------------------------------------------------------------------------------ the page


def build_app(world: World):
    """The Flask application: one page, whose address holds the history (`?history=3,17`) and a search (`&q=words`)."""
    from flask import Flask, request

    from minionerec.report import page

    template = page.environment().get_template("demo.html")
    app = Flask(__name__, static_folder=None)
    app.config["TRUSTED_HOSTS"] = ["127.0.0.1", "localhost"]  # no other name may lead here

    @app.get("/")
    def show():
        query, history = request.args.get("q", "")[:200], world.history_of(request.args.get("history", ""))
        titles, target, next_row = world.titles.titles, None, 0
        if world.examples is not None and (row := numbers(request.args.get("row", ""))):
            example, next_row = row[0] % len(world.examples), (row[0] + 1) % len(world.examples)
            history, target = world.examples["seen"][example].to_list(), world.examples["target"][example]
        return template.render(
            style=page.read("page.css"),
            query=query,
            matches=[(item, titles[item]) for item in world.titles.matches(query)[:MATCHES]],
            history=[(place, item, titles[item]) for place, item in enumerate(history)],
            ids=",".join(map(str, history)),
            without=[",".join(map(str, history[:place] + history[place + 1 :])) for place in range(len(history))],
            target=None if target is None else (target, titles[target]),
            next_row=None if world.examples is None else next_row,
            answers={name: model(history) for name, model in world.models.items()} if history else {},
        )

    @app.after_request
    def restrict(response):
        response.headers["Content-Security-Policy"] = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
        return response

    return app


def listen(port: int) -> socket.socket:
    """A socket that listens on 127.0.0.1. Raises `UserError` where the port is taken."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen()
    except OSError as error:
        raise UserError(f"--port {port}: {error.strerror}; choose another one, or 0 for any free one") from None
    return listener


def main(options: Options) -> None:
    if not options.models:
        raise UserError("--models is required")
    options.require("info_file")
    for folder in options.models:
        require_file(folder, "models")
    if importlib.util.find_spec("flask") is None:
        raise UserError("the demo needs Flask; pip install -r requirements-demo.txt")
    from werkzeug.serving import make_server

    listener = listen(options.port)
    app = build_app(World(options))
    server = make_server("127.0.0.1", options.port, app, fd=listener.fileno())
    names = ", ".join(printable(name) for name in names_of(options.models))
    print(f"{names} at http://127.0.0.1:{listener.getsockname()[1]}/ ; Ctrl-C ends it", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    run(main, Options)
