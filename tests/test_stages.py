"""Every stage's command line: an invalid one ends with exit code 2 and a one-line error."""

import pytest
from helpers import run_stage


@pytest.mark.parametrize(
    "arguments, found",
    [
        (["sft.py", "--no_such_flag", "1"], "unknown option --no_such_flag"),
        (["sft.py", "--base", "x"], "unknown option --base"),  # no abbreviations
        (["sft.py", "--freeze_LLM", "True", "--use_lora", "True"], "exclude each other"),
        (["rl.py", "--num_generations", "many"], "invalid int value"),
        (["sasrec.py", "--train_file", "nowhere.csv"], "nowhere.csv"),
        (["evaluate.py", "--num_beams", "0"], "--num_beams 0: expected at least 1"),
        (["convert_dataset.py"], "required"),
    ],
)
def test_errors_are_one_line(arguments, found):
    done = run_stage(*arguments, check=False)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and found in lines[0]
