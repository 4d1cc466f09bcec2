"""One GRPO step: seconds and memory of TRL's plain path and of ours in both spaces, side by side.

    python -m benchmarks.grpo_step            # 4 prompts of 97 tokens, 16 completions each
    python -m benchmarks.grpo_step --json     # the ratios, as JSON in the last line

A step is generation (16 beams under a catalog of 3,686 random SIDs of three tokens), the reference's log-probabilities,
the policy's forward and backward, and AdamW, on a Qwen2 of 45 million random weights (benchmarks/shared.py). The sides:

- trl: `transformers`' beam search with `prefix_allowed_tokens_fn`, the prompt repeated for every completion, and the
  log-probabilities of the installed TRL. Without Triton it projects every position, the prompt's too, to the vocabulary.
- logits: the same search; rows one by one with logits of only the completion's positions and a softmax over them, as
  TRL made them before its fused head.
- vocab, catalog: `beam_search` and `group_log_probs`, each prompt encoded once.
- vllm, if it is among `--sides`: as catalog, with beams from vLLM, which gets the weights in each step (docs/vllm.md).

Each side is a process. The processes take turns, one step each, so that other work on the machine slows all of them.
Times are medians over rounds after one round of warm-up. Memory is the process's peak (resident set, or allocated on the
GPU), weights and optimizer included. The ratios without `_to_` are to TRL as installed; `_to_logits` are to the other
plain side, which is much faster on a CPU.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from benchmarks.shared import (
    LEVELS,
    VOCABULARY,
    VOCABULARY_HELP,
    device_name,
    dtype_of,
    finish,
    first_sid_token,
    peak_memory,
    random_model,
    random_sids,
    transformers_search,
    vllm_engine_of,
)
from minionerec.catalog.trie import Trie
from minionerec.common.devices import pick_device
from minionerec.common.errors import UserError
from minionerec.common.options import option, run
from minionerec.decoding.beam_search import beam_search
from minionerec.decoding.group_log_probs import add_catalog_head, group_log_probs

SIDES = ("trl", "logits", "vocab", "catalog")
OPTIONAL = "vllm"
PLAIN = SIDES[:2]
PARTS = ("generation", "reference", "policy", "optimizer")
BETA = 0.04


@dataclass
class Options:
    device: str = option("", "cpu or cuda; default: cuda if there is a GPU")
    dtype: str = option("float32", "float32 or bfloat16, of weights and all work")
    prompts: int = option(4, "prompts per step")
    completions: int = option(16, "completions per prompt")
    prompt_tokens: int = option(97, "tokens per prompt")
    items: int = option(3686, "SIDs of the catalog")
    vocabulary: int = option(VOCABULARY, VOCABULARY_HELP)
    rounds: int = option(3, "rounds of which the median is taken")
    sides: str = option(",".join(SIDES), f"which sides, separated by commas; {OPTIONAL} is one more")
    threads: int = option(0, "CPU threads; 0: torch's default")
    json: bool = option(False, "print the ratios as JSON in the last line")
    side: str = option("", "internal: be the process of this side, one step per line of standard input")

    def __post_init__(self):
        for name in ("prompts", "completions", "prompt_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: expected at least 1")
        for side in (part.strip() for part in self.sides.split(",")):
            if side not in (*SIDES, OPTIONAL):
                expected = ", ".join((*SIDES, OPTIONAL))
                raise UserError(f"--sides {self.sides}: found {side!r}, expected some of {expected}")


# ------------------------------------------------------------------------------------------------ one side


def trl_log_probs(model, input_ids: torch.Tensor, attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """TRL's own, (rows, length)."""
    trainer = SimpleNamespace(accelerator=Accelerator(cpu=input_ids.device.type == "cpu"))
    return GRPOTrainer._get_per_token_logps_and_entropies(trainer, model, input_ids, attention_mask, length)[0]


def logits_log_probs(model, input_ids: torch.Tensor, attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """From whole logits of the last positions, (rows, length)."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=length + 1).logits[:, :-1]
    log_probs = logits.float().log_softmax(dim=-1)
    return log_probs.gather(2, input_ids[:, -length:].unsqueeze(-1)).squeeze(-1)


def log_probs_of(side: str, model, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the last LEVELS tokens of each row, (rows, LEVELS), as `side` computes them."""
    arguments = (input_ids, attention_mask, LEVELS)
    if side in PLAIN:
        return {"trl": trl_log_probs, "logits": logits_log_probs}[side](model, *arguments)
    space = "catalog" if side == OPTIONAL else side
    return group_log_probs(model, model, *arguments, space=space, chunk_rows=len(input_ids)).log_probs


def be_side(options: Options, device: str) -> None:
    """Take a step for each line of standard input; answer with a line of JSON: seconds of each part, peak bytes, loss."""
    side, dtype, completions = options.side, dtype_of(options.dtype), options.completions
    sids = torch.from_numpy(random_sids(options.items, options.vocabulary)).to(device)  # (items, LEVELS)
    trie = Trie.build(sids.cpu().numpy()).to(device)
    policy, reference = (random_model(device, dtype, options.vocabulary) for _ in range(2))
    for model, outputs in ((policy, ("log_probs", "entropy")), (reference, ("log_probs",))):  # as TRL has them
        add_fused_lm_head(model, outputs=outputs)
        add_catalog_head(model, trie, 1.0)
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)

    generator = torch.Generator().manual_seed(0)
    shape = (options.prompts, options.prompt_tokens)
    ids = torch.randint(first_sid_token(options.vocabulary), shape, generator=generator).to(device)
    mask = torch.ones_like(ids)
    advantages = torch.randn(options.prompts * completions, 1, generator=generator).to(device)
    rows, rows_mask = (x.repeat_interleave(completions, 0) for x in (ids, mask))
    if side in PLAIN:
        search = transformers_search(policy, trie, ids, mask, completions)
    if side == OPTIONAL:
        engine = vllm_engine_of(policy, trie, dtype)

    def now() -> float:
        finish(device)
        return time.perf_counter()

    for _ in sys.stdin:
        times = [now()]
        with torch.no_grad():
            policy.eval()
            if side in PLAIN:
                drawn = search().sequences[:, -LEVELS:]
            elif side == OPTIONAL:
                engine.sync(policy.named_parameters())
                drawn = sids[engine.beam_search(ids.tolist(), completions)[0].row.flatten()]
            else:
                drawn = sids[beam_search(policy, trie, ids, mask, completions, space=side).row.flatten()]
            policy.train()
        times.append(now())
        inputs = torch.cat([rows, drawn], 1), torch.cat([rows_mask, torch.ones_like(drawn)], 1)
        with torch.no_grad():
            expected = log_probs_of(side, reference, *inputs)
        times.append(now())
        log_probs = log_probs_of(side, policy, *inputs)
        ratio, apart = (log_probs - log_probs.detach()).exp(), expected - log_probs
        loss = (-ratio * advantages + BETA * (apart.exp() - apart - 1)).mean()
        loss.backward()
        times.append(now())
        optimizer.step()
        optimizer.zero_grad()
        times.append(now())
        seconds = {part: end - start for part, start, end in zip(PARTS, times, times[1:], strict=False)}
        print(json.dumps({"seconds": seconds, "peak": peak_memory(device), "loss": loss.item()}), flush=True)


# ------------------------------------------------------------------------------------------------ all sides


def measure(options: Options, sides: list[str]) -> dict[str, list[dict]]:
    """What each side answers, round by round, without the first."""
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
                # Libraries also write to standard output; an answer is an object.
                line = next((line for line in process.stdout if line.startswith("{")), "")
                if not line:
                    raise UserError(f"the process of side {side} ended; its error is printed above")
                answers[side].append(json.loads(line))
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return {side: values[1:] for side, values in answers.items()}


def main(options: Options) -> None:
    device = str(pick_device(options.device))
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.side:
        return be_side(options, device)
    dtype_of(options.dtype)
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, {options.dtype}, torch {torch.__version__}")
    print(f"{options.prompts} prompts of {options.prompt_tokens} tokens x {options.completions} completions, seconds\n")
    answers = measure(options, [side.strip() for side in options.sides.split(",")])

    print(f"{'side':<10}" + "".join(f"{part:>12}" for part in (*PARTS, "step")) + f"{'peak MiB':>12}")
    total, peak = {}, {}
    for side, rounds in answers.items():
        median = {part: statistics.median(r["seconds"][part] for r in rounds) for part in PARTS}
        total[side] = statistics.median(sum(r["seconds"].values()) for r in rounds)
        peak[side] = max(r["peak"] for r in rounds)
        cells = "".join(f"{value:>12.3f}" for value in (*median.values(), total[side]))
        print(f"{side:<10}{cells}{peak[side] / 2**20:>12,.0f}")
    result = {"device": device_name(device)}
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
