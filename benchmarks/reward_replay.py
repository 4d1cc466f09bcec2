"""Rewards side by side on the groups that RL would start from: what share of the groups has a signal. Nothing is trained.

    R=output/quickstart
    python -m benchmarks.reward_replay --model_path $R/sft --baseline_path $R/sasrec \\
        --train_file $R/data/train/ml-100k.csv --info_file $R/data/info/ml-100k.txt --json

The group of a prompt is its beam list, as in rl.py, whose functions read the data, make the prompts and load the rewards.
Each group is generated once and scored by every reward. `semantic` needs --ada_path, `sasrec` and `dense` need
--baseline_path; without these files they are left out. `ranking` is rule + ndcg.

    signal     share of groups whose rewards are not all equal: only these have a gradient
    mean       of all completions
    std        within a group (unbiased, as TRL divides by it), mean over groups
    spearman   rank correlation with `ranking` within a group, ties with their mean rank; mean over the groups in which
               both have a signal
    groups     number of groups of this mean

The share of groups that contain the target is printed above the table. A completion is no draw of the policy: with beams,
a group has no repetition.
"""

import json
import time
from dataclasses import dataclass

import numpy as np

from minionerec.common.options import INPUT, RUNTIME, StageOptions, option, run

COLUMNS = ("signal", "mean", "std", "spearman")


@dataclass
class Options(StageOptions):
    model_path: str = option("", "folder of the SFT checkpoint", role=INPUT)
    train_file: str = option("", "CSV of the prompts and their targets", role=INPUT)
    info_file: str = option("", "info file: the catalog", role=INPUT)
    baseline_path: str = option("", "folder of a baseline of sasrec.sh, for the rewards sasrec and dense", role=INPUT)
    ada_path: str = option("", ".npy of item embeddings, for the reward semantic", role=INPUT)
    reward_module: str = option("", "path.py:name, your own reward, in addition to the built-in ones", role=RUNTIME)
    category: str = option("", "what the prompts call the items; default: as the checkpoint was trained")
    prompt_template: str = option("", "wording of the prompts; default: the checkpoint's", role=INPUT)
    max_history: int = option(0, "items of history in a prompt; 0: as the checkpoint was trained")
    rl_tasks: str = option("sid_seq", "as in rl.py")
    rows: int = option(2000, "rows of --train_file, drawn by seed; -1: all")
    seed: int = option(42, "seed of the drawn rows")
    num_generations: int = option(32, "completions per prompt: its group")
    space: str = option("catalog", "what beam scores are normalised over: vocab or catalog")
    batch_size: int = option(32, "prompts per search", role=RUNTIME)
    json: bool = option(False, "print the results as JSON in the last line", role=RUNTIME)

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "batch_size")
        self.check(rows=(self.rows >= 1 or self.rows == -1, "at least 1, or -1 for all"))


# ------------------------------------------------------------------------------------------------ groups and rewards


def rl_options(options: Options):
    """The options of rl.py that read the same data and the rewards whose files are given; checked as rl.py checks them."""
    import rl
    from minionerec.rewards.functions import NEEDS, REWARDS

    names = [name for name in REWARDS if name not in NEEDS or getattr(options, NEEDS[name])]
    shared = ("model_path", "train_file", "info_file", "baseline_path", "ada_path", "reward_module", "category")
    shared += ("prompt_template", "max_history", "rl_tasks", "seed", "num_generations", "space")
    values = {name: getattr(options, name) for name in shared}
    values |= {"reward_type": ",".join(names), "train_rows": options.rows}
    # What rl.py requires for training and validation, and what is not used here.
    values |= {"eval_file": options.train_file, "output_dir": "none", "train_batch_size": options.num_generations}
    found = rl.Options(**values)
    rl.check(found)
    return found


def groups_of(options: Options, data, prompts: list[str]) -> np.ndarray:
    """The beams of each prompt, most probable first: (prompts, num_generations) rows of the catalog's SIDs."""
    import torch

    from minionerec.common.console import Progress
    from minionerec.decoding.engine import TransformersEngine, recommend
    from minionerec.language_model.checkpoints import load_model, load_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(options.model_path, "model_path").to(device)
    tokenizer = load_tokenizer(options.model_path, "model_path")
    trie = data.catalog.trie(tokenizer).to(device)
    engine = TransformersEngine(model, trie, tokenizer.pad_token_id, options.space)
    arguments = (engine, tokenizer, prompts, options.num_generations, options.batch_size)
    with Progress(len(prompts), "groups", unit="prompts") as progress:
        return recommend(*arguments, progress=progress.update)[0]


def rewards_of(rewards, columns: dict[str, list], groups: np.ndarray, catalog) -> dict[str, np.ndarray]:
    """Each reward of every completion, (prompts, group); `ranking` is added. columns: of `rl.rows_of`."""
    size, row = groups.shape[1], groups.ravel().tolist()
    batch = {name: [value for value in values for _ in range(size)] for name, values in columns.items()}
    targets = [catalog.row_of_sid[sid] for sid in batch["target_sid"]]
    batch |= {"prompts": batch.pop("prompt"), "completions": [catalog.sids[r] for r in row]}
    batch |= {"row": row, "target_row": targets}
    found = {}
    for reward in rewards:
        # In single precision, in which the trainer compares the rewards of a group.
        found[reward.__name__] = np.float32(reward(**batch)).reshape(groups.shape)
        if reward.__name__ == "ndcg":
            found["ranking"] = found["rule"] + found["ndcg"]
    return found


# ------------------------------------------------------------------------------------------------ figures


def has_signal(rewards: np.ndarray) -> np.ndarray:
    """(groups,) whether the rewards (groups, completions) of a group differ."""
    return rewards.max(axis=1) != rewards.min(axis=1)


def spearman(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Rank correlation of each row of `one` and `other`, (rows, n), in [-1, 1]; ties have their mean rank, rows a signal."""
    from scipy.stats import rankdata

    one, other = rankdata(one, axis=1), rankdata(other, axis=1)
    one, other = one - one.mean(axis=1, keepdims=True), other - other.mean(axis=1, keepdims=True)
    return (one * other).sum(axis=1) / np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))


def figures(rewards: np.ndarray, ranking: np.ndarray) -> dict:
    """The table's row of a reward. rewards, ranking: (groups, completions)."""
    signal = has_signal(rewards)
    both = signal & has_signal(ranking)
    return {
        "signal": float(signal.mean()),
        "mean": float(rewards.mean(dtype=float)),
        "std": float(rewards.std(axis=1, ddof=1, dtype=float).mean()),
        "spearman": float(spearman(rewards[both], ranking[both]).mean()) if both.any() else None,
        "groups": int(both.sum()),
    }


def format_rows(rows: dict[str, dict]) -> str:
    """The table as text."""
    width = max(map(len, rows)) + 2
    lines = [" " * width + "".join(f"{name:>10}" for name in (*COLUMNS, "groups"))]
    for name, values in rows.items():
        cells = ["-" if values[column] is None else f"{values[column]:.4f}" for column in COLUMNS]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>10}" for cell in [*cells, f"{values['groups']:,}"]))
    return "\n".join(lines)


def main(options: Options) -> None:
    options.require("model_path", "train_file", "info_file")
    import rl

    started, settings = time.perf_counter(), rl_options(options)
    of_model = rl.settings_of(settings)
    data, _ = rl.read_data(settings, of_model.max_history)
    rewards = rl.read_rewards(settings, data.catalog)
    columns = rl.rows_of(settings, data, rl.prompts_of(settings, of_model))
    groups = groups_of(options, data, columns["prompt"])
    found = rewards_of(rewards, columns, groups, data.catalog)
    rows = {name: figures(values, found["ranking"]) for name, values in found.items()}
    targets = np.array([data.catalog.row_of_sid[sid] for sid in columns["target_sid"]])
    result = {"prompts": len(groups), "num_generations": groups.shape[1]}
    result |= {"target_in_group": float((groups == targets[:, None]).any(axis=1).mean()), "rewards": rows}
    result["seconds"] = round(time.perf_counter() - started, 1)
    print(
        f"{len(groups):,} groups of {groups.shape[1]} completions; {result['target_in_group']:.4f} contain the target\n"
    )
    print(format_rows(rows))
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run(main, Options)
