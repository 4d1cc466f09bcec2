"""What a trainer measures on validation rows: HR, NDCG and MRR of constrained beam search, shared among processes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from accelerate.utils import gather_object
from trl.models import unwrap_model_for_generation

from minionerec.catalog.catalog import Catalog
from minionerec.catalog.trie import Trie
from minionerec.decoding.beam_search import recommend
from minionerec.evaluation import metrics


@contextmanager
def model_for_search(trainer) -> Iterator:
    """A trainer's model out of its wrappers, its parameters gathered, in the precision that it is trained in."""
    gather = getattr(trainer.args, "ds3_gather_for_generation", True)
    with (
        unwrap_model_for_generation(
            trainer.model_wrapped, trainer.accelerator, gather_deepspeed3_params=gather
        ) as model,
        trainer.accelerator.autocast(),
    ):
        yield model


def cutoffs_of(beams: int) -> list[int]:
    """The K of the metrics: none beyond the beams, and the least of 10 and the beams among them."""
    return sorted({k for k in metrics.CUTOFFS if k <= beams} | {min(10, beams)})


class Validation(NamedTuple):
    """Validation rows and how to search them."""

    prompts: Sequence[str]  # (rows,)
    targets: Sequence[int]  # (rows,) item ids
    catalog: Catalog
    trie: Trie
    beams: int
    space: str = "vocab"

    @property
    def cutoffs(self) -> list[int]:
        return cutoffs_of(self.beams)

    def measure(self, trainer) -> dict[str, float]:
        """HR@K, NDCG@K and MRR by item of a `transformers.Trainer`'s model; exact sums over its processes."""
        accelerator = trainer.accelerator
        process, world = accelerator.process_index, accelerator.num_processes
        with model_for_search(trainer) as model:
            leaves, _ = recommend(
                model,
                trainer.processing_class,
                self.trie,
                self.prompts[process::world],
                self.beams,
                trainer.args.per_device_eval_batch_size,
                space=self.space,
            )
        _, ranks = metrics.sid_and_item_ranks(leaves, self.targets[process::world], self.catalog)
        return metrics.table(np.concatenate(gather_object([ranks])), self.cutoffs)
