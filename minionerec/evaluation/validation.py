"""What a trainer measures on validation rows: HR, NDCG and MRR of constrained beam search, shared among processes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from accelerate.utils import gather_object
from trl.models import unwrap_model_for_generation

from minionerec.catalog.catalog import Catalog
from minionerec.catalog.trie import Trie
from minionerec.decoding.engine import TransformersEngine, recommend
from minionerec.evaluation import metrics
from minionerec.evaluation.metrics import cutoffs_of


@contextmanager
def model_for_search(trainer) -> Iterator:
    """A trainer's model without its wrappers, with its parameters gathered, in the precision that it is trained in."""
    gather = getattr(trainer.args, "ds3_gather_for_generation", True)
    with (
        unwrap_model_for_generation(
            trainer.model_wrapped, trainer.accelerator, gather_deepspeed3_params=gather
        ) as model,
        trainer.accelerator.autocast(),
    ):
        yield model


class Validation(NamedTuple):
    """Validation rows and how to search them."""

    prompts: Sequence[str]  # (rows,)
    targets: Sequence[int]  # (rows,) item ids
    catalog: Catalog
    trie: Trie
    beams: int
    space: str = "vocab"
    seen: Sequence[Sequence[int]] | None = None  # (rows, …) items that are not ranked; None: all items are ranked

    @property
    def cutoffs(self) -> list[int]:
        return cutoffs_of(self.beams)

    def measure(self, trainer) -> dict[str, float]:
        """HR@K, NDCG@K and MRR by item of a `transformers.Trainer`'s model; exact sums over its processes."""
        return metrics.table(self.ranks(trainer), self.cutoffs)

    def ranks(self, trainer) -> np.ndarray:
        """Rank of each row's target by item, (rows,), in every process."""
        accelerator = trainer.accelerator
        own = slice(accelerator.process_index, None, accelerator.num_processes)  # empty where rows are few
        seen = None if self.seen is None else self.seen[own]
        with model_for_search(trainer) as model:
            tokenizer = trainer.processing_class
            sid_rows, _ = recommend(
                TransformersEngine(model, self.trie.to(model.device), tokenizer.pad_token_id or 0, self.space),
                tokenizer,
                self.prompts[own],
                self.beams,
                trainer.args.per_device_eval_batch_size,
                excluded=seen and [self.catalog.rows_of(items) for items in seen],
            )
        _, ranks = metrics.sid_and_item_ranks(sid_rows, self.targets[own], self.catalog, seen)
        every = np.empty(len(self.targets), dtype=np.int64)
        for process, part in enumerate(gather_object([ranks])):
            every[process :: accelerator.num_processes] = part
        return every
