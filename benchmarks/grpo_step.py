"""One GRPO step: seconds and memory of TRL's plain path and of ours in both spaces, side by side.

    python -m benchmarks.grpo_step            # 4 prompts of 97 tokens, 16 completions each
    python -m benchmarks.grpo_step --json     # the ratios, as JSON in the last line

A step is generation (16 beams under a catalog of 3,686 random SIDs of three tokens), the reference's log-probabilities,
the policy's forward and backward, and AdamW, on a Qwen2 of 45 million random weights (benchmarks/decode.py). The sides:

- trl: `transformers`' beam search with `prefix_allowed_tokens_fn`, the prompt repeated for every completion, and the
  installed TRL's own log-probabilities. Without Triton those project every position, the prompt's too, to the vocabulary.
- logits: the same search; rows one by one with logits of the completion's positions alone, whole, and a softmax over
  them, as TRL made them before its fused head.
- vocab, catalog: `beam_search` and `ReReTrainer`'s log-probabilities, each prompt encoded once.

Every side is a process of its own; the processes take turns, a step each, so that a busy machine slows all of them.
Times are medians over rounds after one that is not counted. Memory is the process's peak (resident set, or allocated on
the GPU), weights and optimizer included. The ratios without `_to_` are to TRL as it is installed; `_to_logits` is what
remains of them against the other plain side, which is much faster on a CPU.
"""

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import torch
from accelerate import Accelerator
from transformers.hf_argparser import HfArg
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from benchmarks.decode import FIRST_TOKEN, LEVELS, random_model, random_trie, transformers_search
from minionerec.catalog.trie import Trie
from minionerec.common.errors import UserError
from minionerec.common.options import run
from minionerec.decoding.beam_search import beam_search
from minionerec_trainer import ReReTrainer, add_catalog_head

SIDES = ("trl", "logits", "vocab", "catalog")
PLAIN = SIDES[:2]
PARTS = ("generation", "reference", "policy", "optimizer")
BETA = 0.04


@dataclass
class Options:
    device: str = HfArg(default="", help="cpu or cuda; default: cuda where there is one")
    dtype: str = HfArg(default="float32", help="float32 or bfloat16, of weights and all work")
    prompts: int = HfArg(default=4, help="prompts a step")
    completions: int = HfArg(default=16, help="completions a prompt")
    prompt_tokens: int = HfArg(default=97, help="tokens a prompt")
    items: int = HfArg(default=3686, help="SIDs of the catalog")
    rounds: int = HfArg(default=3, help="rounds of which the median is taken")
    sides: str = HfArg(default=",".join(SIDES), help="which sides, by commas")
    threads: int = HfArg(default=0, help="CPU threads of a process; 0: torch's own choice")
    json: bool = HfArg(default=False, help="print the ratios as JSON in the last line")
    side: str = HfArg(default="", help="be this side's process: a step for each line of standard input")


# ------------------------------------------------------------------------------------------------ one side


class Step(ReReTrainer):
    """The trainer's log-probabilities without the trainer's data, arguments and logs."""

    def __init__(self, space: str, completions: int, device: str):
        self.accelerator = Accelerator(cpu=device == "cpu")
        self.logp_space = space
        self.num_generations = completions
        self._seconds = dict.fromkeys(("generation", "log_probs", "update"), 0.0)

    def plain(self, *arguments) -> tuple:
        return GRPOTrainer._get_per_token_logps_and_entropies(self, *arguments)


def sids_of(trie: Trie) -> torch.Tensor:
    """The tokens of each leaf: (leaves, levels)."""
    token, start, leaf = trie.child_token.tolist(), trie.start.tolist(), trie.leaf.tolist()
    path: dict[int, list[int]] = {0: []}
    for node in range(len(leaf)):
        for edge in range(start[node], start[node + 1]):
            path[edge + 1] = [*path[node], token[edge]]
    return torch.tensor([path[node] for _, node in sorted((row, node) for node, row in enumerate(leaf) if row >= 0)])


def logits_log_probs(model, input_ids: torch.Tensor, attention_mask: torch.Tensor, kept: int) -> tuple:
    """Log-probabilities and entropies, (rows, kept), from whole logits of the last positions."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=kept + 1).logits[:, :-1]
    log_probs = logits.float().log_softmax(dim=-1)
    entropy = -(log_probs.detach().exp() * log_probs.detach()).sum(dim=-1)
    return log_probs.gather(2, input_ids[:, -kept:].unsqueeze(-1)).squeeze(-1), entropy


def be_side(options: Options, device: str) -> None:
    """Take a step for each line of standard input and answer with a line of JSON: seconds of each part, peak bytes."""
    side, dtype = options.side, getattr(torch, options.dtype)
    trie = random_trie(options.items).to(device)
    policy, reference = random_model(device, dtype), random_model(device, dtype)
    space = "catalog" if side == "catalog" else "vocab"
    for model, outputs in ((policy, ("log_probs", "entropy")), (reference, ("log_probs",))):  # as TRL has them
        add_fused_lm_head(model, outputs=outputs)
        add_catalog_head(model, trie, 1.0)
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)
    step, sids = Step(space, options.completions, device), sids_of(trie).to(device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(FIRST_TOKEN, (options.prompts, options.prompt_tokens), generator=generator).to(device)
    mask = torch.ones_like(ids)
    advantages = torch.randn(options.prompts * options.completions, 1, generator=generator).to(device)
    rows, rows_mask = (x.repeat_interleave(options.completions, 0) for x in (ids, mask))
    log_probs_of = {"trl": step.plain, "logits": logits_log_probs}.get(side, step._get_per_token_logps_and_entropies)
    if side in PLAIN:
        search = transformers_search(policy, trie, ids, mask, options.completions)

    def now() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in sys.stdin:
        times = [now()]
        with torch.no_grad():
            policy.eval()
            if side in PLAIN:
                completions = search().sequences[:, -LEVELS:]
            else:
                completions = sids[beam_search(policy, trie, ids, mask, options.completions, space=space).row.flatten()]
            policy.train()
        times.append(now())
        inputs = torch.cat([rows, completions], 1), torch.cat([rows_mask, torch.ones_like(completions)], 1), LEVELS
        with torch.no_grad():
            expected = log_probs_of(reference, *inputs)[0]
        times.append(now())
        log_probs = log_probs_of(policy, *inputs)[0]
        ratio, apart = (log_probs - log_probs.detach()).exp(), expected - log_probs
        loss = (-ratio * advantages + BETA * (apart.exp() - apart - 1)).mean()
        loss.backward()
        times.append(now())
        optimizer.step()
        optimizer.zero_grad()
        times.append(now())
        if device.startswith("cuda"):
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        seconds = {part: end - start for part, start, end in zip(PARTS, times, times[1:], strict=False)}
        print(json.dumps({"seconds": seconds, "peak": peak, "loss": loss.item()}), flush=True)


# ------------------------------------------------------------------------------------------------ all sides


def measure(options: Options, sides: list[str]) -> dict[str, list[dict]]:
    """What each side answers, round by round, the first left out."""
    given = asdict(options) | {"json": False}
    arguments = [f"--{name}={value}" for name, value in given.items() if name != "side"]
    command = [sys.executable, "-m", "benchmarks.grpo_step", *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = {side: subprocess.Popen([*command, f"--side={side}"], **pipes) for side in sides}
    answers: dict[str, list[dict]] = {side: [] for side in sides}
    try:
        for _ in range(options.rounds + 1):
            for side, process in processes.items():
                process.stdin.write("step\n")
                process.stdin.flush()
                # Libraries greet on standard output; an answer is an object.
                line = next((line for line in process.stdout if line.startswith("{")), "")
                if not line:
                    raise UserError(f"the process of side {side} ended; its error stands above")
                answers[side].append(json.loads(line))
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return {side: values[1:] for side, values in answers.items()}


def main(options: Options) -> None:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.side:
        return be_side(options, device)
    sides = [side.strip() for side in options.sides.split(",")]
    if not set(sides) <= set(SIDES) or options.dtype not in ("float32", "bfloat16") or options.rounds < 1:
        raise UserError(
            f"--sides {options.sides} --dtype {options.dtype} --rounds {options.rounds}: expected some of "
            f"{', '.join(SIDES)}; float32 or bfloat16; at least 1"
        )
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "cpu"
    print(f"{name}, {torch.get_num_threads()} threads, {options.dtype}, torch {torch.__version__}")
    print(
        f"{options.prompts} prompts of {options.prompt_tokens} tokens x {options.completions} completions, in seconds\n"
    )
    answers = measure(options, sides)
    print(f"{'side':<10}" + "".join(f"{part:>12}" for part in (*PARTS, "step")) + f"{'peak MiB':>12}")
    total, peak = {}, {}
    for side, rounds in answers.items():
        median = {part: statistics.median(r["seconds"][part] for r in rounds) for part in PARTS}
        total[side] = statistics.median(sum(r["seconds"].values()) for r in rounds)
        peak[side] = max(r["peak"] for r in rounds)
        cells = "".join(f"{value:>12.3f}" for value in (*median.values(), total[side]))
        print(f"{side:<10}{cells}{peak[side] / 2**20:>12,.0f}")
    result = {"device": name}
    for plain in set(PLAIN) & set(total):
        for side in set(total) - set(PLAIN):
            result[f"{side}_ratio_to_{plain}"] = round(total[plain] / total[side], 2)
            result[f"{side}_memory_ratio_to_{plain}"] = round(peak[side] / peak[plain], 3)
    for side in ("vocab", "catalog"):
        result[f"{side}_ratio"] = result.get(f"{side}_ratio_to_trl")
    result["memory_ratio"] = result.get("vocab_memory_ratio_to_trl")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run(main, Options)
