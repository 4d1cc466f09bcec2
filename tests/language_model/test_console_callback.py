"""The line of an evaluation of SFT and RL, and the log of their trainers.

Invariants: the line has step, figures of the training, metric and best so far, earlier runs included, and the end, which a
time budget brings forward; every entry is in the log once, also after a resume; only the first process does it.
"""

import json
from types import SimpleNamespace

import pytest

from minionerec.common import console
from minionerec.common.tracking import TrackedOptions
from minionerec.language_model.console_callback import ConsoleCallback


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    for name in ("perf_counter", "monotonic"):
        monkeypatch.setattr(console.time, name, lambda: now[0])
    return now


def state_of(history=(), step=0, budget=None, first=True):
    return SimpleNamespace(
        log_history=list(history),
        global_step=step,
        max_steps=100,
        is_world_process_zero=first,
        stateful_callbacks={"TimeBudget": {"args": budget}} if budget else {},
    )


def trained(folder, state, clock, *evaluations: float, larger=True) -> None:
    """Ten steps of a second each before every evaluation."""
    callback = ConsoleCallback(TrackedOptions(), {"loss": "loss", "reward": "reward"})
    args = SimpleNamespace(output_dir=str(folder), metric_for_best_model="eval_NDCG@10", greater_is_better=larger)
    callback.on_train_begin(args, state, None)
    for value in evaluations:
        for _ in range(10):
            clock[0] += 1
            state.global_step += 1
            callback.on_step_end(args, state, None)
        for entry in ({"loss": 0.01541, "reward": None, "grad_norm": 2.0}, {"eval_NDCG@10": value}):
            state.log_history.append(entry | {"step": state.global_step})
            callback.on_log(args, state, None)
        callback.on_evaluate(args, state, None, metrics={"eval_NDCG@10": value})
    callback.on_train_end(args, state, None)


def logged(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_line_at_each_evaluation_and_every_figure_in_the_log(tmp_path, clock, capsys):
    trained(tmp_path, state_of(), clock, 0.0732, 0.0723)
    assert capsys.readouterr().out.splitlines() == [
        "step 10/100  loss .0154  valid NDCG@10 .0732 (best .0732)  2 min left",
        "step 20/100  loss .0154  valid NDCG@10 .0723 (best .0732)  80 s left",
    ]
    assert [entry["step"] for entry in logged(tmp_path)] == [10, 10, 20, 20] and logged(tmp_path)[0]["grad_norm"] == 2


def test_a_resumed_run_knows_its_best_and_has_no_entry_twice(tmp_path, clock, capsys):
    (tmp_path / "log.jsonl").write_text('{"step": 50}\n{"step": 60}\n')  # killed after step 60, resumed from 50
    trained(tmp_path, state_of([{"step": 50, "eval_NDCG@10": 0.9}], step=50), clock, 0.5)
    assert "step 60/100" in (line := capsys.readouterr().out) and "(best .9)  40 s left" in line
    assert [entry["step"] for entry in logged(tmp_path)] == [50, 60, 60]


def test_a_smaller_loss_is_better_and_a_time_budget_ends_earlier(tmp_path, clock, capsys):
    trained(tmp_path, state_of(budget={"seconds": 40, "spent": 5}), clock, 3.0, 4.0, larger=False)
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("25 s left") and second.endswith("4 (best 3)  15 s left")


def test_other_processes_are_silent(tmp_path, clock, capsys):
    trained(tmp_path, state_of(first=False), clock, 0.5)
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())
