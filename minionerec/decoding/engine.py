"""Engines that generate SIDs: `transformers` (this project's tree search) and vLLM. Both return the same `Beams`.

An engine holds a model, the trie of a catalog and the space that scores are normalised over. Search and merging of beams
are one function (beam_search.py); an engine only computes the log-probabilities of what may follow.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from minionerec.catalog.trie import Trie
from minionerec.decoding.beam_search import Beams, beam_searches, left_pad, length_batches, sample

Excluded = Sequence[Sequence[int]] | None  # for each prompt, rows of SIDs that it must not get


class Engine(Protocol):
    """Generates SIDs of `trie` after prompts given as token lists."""

    trie: Trie

    def beam_search(
        self,
        prompts: Sequence[Sequence[int]],
        num_beams: int,
        *,
        exclusions: Sequence[Excluded] = (None,),
        temperature: float = 1.0,
        length_penalty: float = 0.0,
    ) -> list[Beams]:
        """The `num_beams` most probable SIDs of each prompt, one search for each entry of `exclusions`."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        excluded: Excluded = None,
    ) -> Beams:
        """`num_samples` independent draws of a SID after each prompt; the same for the same seed and engine."""

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take over the weights of the model that is trained, under their names in `transformers`."""


class TransformersEngine(NamedTuple):
    """Tree search over the model itself, in evaluation mode. Its weights are always the model's own."""

    model: torch.nn.Module
    trie: Trie
    pad_token_id: int
    space: str = "vocab"

    def beam_search(self, prompts, num_beams, *, exclusions=(None,), temperature=1.0, length_penalty=0.0):
        tries = [self.trie.without(excluded) for excluded in exclusions]
        options = {"temperature": temperature, "length_penalty": length_penalty, "space": self.space}
        return self._evaluating(beam_searches, tries, prompts, num_beams, **options)

    def sample(self, prompts, num_samples, *, temperature=1.0, top_p=1.0, seed=0, excluded=None):
        generator = torch.Generator(self.model.device).manual_seed(seed)
        options = {"temperature": temperature, "top_p": top_p, "space": self.space, "generator": generator}
        return self._evaluating(sample, self.trie.without(excluded), prompts, num_samples, **options)

    def sync(self, weights) -> None:
        pass

    def _evaluating(self, generate, tries, prompts, count: int, **options):
        ids, mask = left_pad(prompts, self.pad_token_id, self.model.device)
        was_training = self.model.training
        self.model.eval()
        found = generate(self.model, tries, ids, mask, count, **options)
        self.model.train(was_training)
        return found


def recommend(
    engine: Engine,
    tokenizer,
    prompts: Sequence[str],
    num_beams: int,
    batch_size: int,
    length_penalty: float = 0.0,
    *,
    batch_tokens: int = 1 << 14,
    excluded: Excluded = None,
    progress: Callable[[int], object] = lambda prompts: None,
) -> tuple[np.ndarray, np.ndarray]:
    """`beam_search` for any number of prompts, in batches of about equal length.

    progress: called with the number of prompts of each batch. Returns (SID rows, scores), both (prompts, min(num_beams, catalog)), in the order of
    `prompts`.
    """
    tokens = tokenizer(list(prompts))["input_ids"] if len(prompts) else []
    width = min(num_beams, engine.trie.n_leaves)
    sid_rows, scores = np.zeros((len(tokens), width), dtype=np.int64), np.zeros((len(tokens), width))
    batches = length_batches([len(t) for t in tokens], batch_size, batch_tokens)
    for batch in batches:
        exclusions = [excluded and [excluded[i] for i in batch]]
        [found] = engine.beam_search(
            [tokens[i] for i in batch], num_beams, exclusions=exclusions, length_penalty=length_penalty
        )
        sid_rows[batch], scores[batch] = found.row.cpu().numpy(), found.score.cpu().numpy()
        progress(len(batch))
    return sid_rows, scores


VLLM_VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: weights are handed over in memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout of recommend.py is for answers
    "VLLM_NO_USAGE_STATS": "1",
}


def vllm_engine(folder: str, trie: Trie, end_token: int, space: str, **options) -> Engine:
    """A `VLLMEngine` for the checkpoint in `folder`; the arguments are those of its constructor.

    Sets environment variables that vLLM reads, unless they are set.
    """
    for name, value in VLLM_VARIABLES.items():
        os.environ.setdefault(name, value)
    from minionerec.decoding.vllm_engine import VLLMEngine

    return VLLMEngine(folder, trie, end_token, space, **options)
