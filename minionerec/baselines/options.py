"""Options of the baselines, and which model uses which of them."""

from dataclasses import dataclass, fields

from minionerec.common.options import RUNTIME, option
from minionerec.common.tracking import TrackedOptions

COUNTS = ("popularity", "markov")  # nothing is trained
TRAINED = ("sasrec", "gru4rec", "caser")
NAMES = (*COUNTS, *TRAINED)
LOSSES = ("ce", "sampled_softmax", "bce")
CASER_WINDOW = 10  # items that caser reads; the paper's Markov order is 5 to 9
OWN_OPTIONS = {  # options that only some models use
    "num_heads": ("sasrec",),
    "num_layers": ("sasrec", "gru4rec"),
    "num_filters": ("caser",),
    "filter_sizes": ("caser",),
    "num_vertical": ("caser",),
}


@dataclass
class BaselineOptions(TrackedOptions):
    """What one baseline takes, files left out."""

    model: str = option("sasrec", f"one of {', '.join(NAMES)}, in any case; GRU is gru4rec")
    seed: int = option(42, "seed of initial weights, batches, dropout, negatives and bootstrap")
    max_history: int = option(50, "items of a history that are used, the latest ones")
    device: str = option("", "cpu, cuda, cuda:1, …; default: cuda if there is a GPU", role=RUNTIME)
    # architecture
    hidden_size: int = option(192, "width of embeddings and layers", aliases=["--hidden_factor"])
    dropout: float = option(0.4, "dropout on embeddings and inside the model", aliases=["--dropout_rate"])
    tie_embeddings: bool = option(True, "score items with the input embeddings; False: with a separate table")
    popularity_bias: bool = option(True, "item biases start at log popularity; False: at zero")
    num_layers: int = option(2, "sasrec: blocks; gru4rec: layers")
    num_heads: int = option(2, "sasrec: attention heads; must divide hidden_size")
    num_filters: int = option(16, "caser: horizontal filters of each height")
    filter_sizes: str = option(
        "2,3,4", f"caser: heights of the horizontal filters in items, at most {CASER_WINDOW} and max_history"
    )
    num_vertical: int = option(4, "caser: vertical filters")
    # training
    loss: str = option(
        "", f"{', '.join(LOSSES)}; default: ce, from 4,000 items on sampled_softmax", aliases=["--loss_type"]
    )
    negatives: int = option(2048, "sampled_softmax: items drawn for a step; bce: for each position")
    epochs: int = option(200, "most epochs; valid is scored after each", aliases=["--epoch"])
    time_budget: float = option(900.0, "seconds of training at most; 0: no limit")
    batch_size: int = option(128, "sequences per step")
    learning_rate: float = option(7e-4, "learning rate, constant", aliases=["--lr"])
    weight_decay: float = option(0.05, "AdamW weight decay of matrices")
    eval_rows: int = option(6000, "valid rows that are scored after each epoch, drawn by seed; -1: all")
    early_stop: int = option(5, "stop after this many epochs without a better valid NDCG@10; 0: never")

    def __post_init__(self):
        super().__post_init__()
        self.model = {"gru": "gru4rec"}.get(self.model.lower(), self.model.lower())
        self.check(
            model=(self.model in NAMES, f"one of {', '.join(NAMES)}"),
            loss=(self.loss in ("", *LOSSES), f"one of {', '.join(LOSSES)}"),
            learning_rate=(self.learning_rate > 0, "more than 0"),
            dropout=(0 <= self.dropout < 1, "0 or more and below 1"),
            eval_rows=(self.eval_rows >= 1 or self.eval_rows == -1, "at least 1, or -1 for all"),
        )
        sizes = ("hidden_size", "num_layers", "num_heads", "num_filters", "num_vertical")
        self.at_least(1, *sizes, "max_history", "negatives", "epochs", "batch_size")
        self.at_least(0, "weight_decay", "early_stop", "time_budget")
        if self.model == "sasrec":
            below = self.hidden_size // self.num_heads * self.num_heads
            nearest = [size for size in (below, below + self.num_heads) if size > 0]
            expected = f"a multiple of --num_heads {self.num_heads}, such as {nearest}"
            self.check(hidden_size=(self.hidden_size % self.num_heads == 0, expected))
        if self.model == "caser":
            heights = filter_heights(self.filter_sizes)
            window = min(CASER_WINDOW, self.max_history)
            fits = bool(heights) and 1 <= min(heights) and max(heights) <= window
            self.check(filter_sizes=(fits, f"heights like 2,3,4, each from 1 to {window}, the items that caser reads"))
        self.refuse_unused()

    def refuse_unused(self) -> None:
        """Raise `UserError` for an option that was set but that this model does not use."""
        own = OWN_OPTIONS | {"negatives": TRAINED if self.loss != "ce" else ()}
        for field in fields(self):
            used = self.model in own.get(field.name, TRAINED)
            if self.model in TRAINED and not used and getattr(self, field.name) != field.default:
                user = f"{self.model} with --loss {self.loss}" if field.name == "negatives" else self.model
                expected = f"nothing: {user} does not use it"
                self.check(**{field.name: (False, expected)})


def filter_heights(text: str) -> list[int]:
    """`"2,3,4"` or `"[2, 3, 4]"` -> `[2, 3, 4]`; empty if it is neither."""
    parts = text.strip().removeprefix("[").removesuffix("]").split(",")
    return [int(part) for part in parts] if all(part.strip().isdecimal() and len(part) < 10 for part in parts) else []
