"""Small base models.

Invariants: the command writes a model that loads, is skipped when re-run, and never deletes or overwrites a file that it
did not make.
"""

import json

import pytest
from helpers import ROOT

from minionerec.common.errors import UserError
from minionerec.language_model.base_model import Options, main
from minionerec.language_model.checkpoints import load_model, load_tokenizer


@pytest.fixture
def options(world, tmp_path):
    small = json.loads((ROOT / "config" / "tiny_qwen2.json").read_text()) | {"hidden_size": 32, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(small))

    def make(output, **more):
        files = {"item_meta_path": str(world.items), "config_file": str(tmp_path / "config.json")}
        return Options(output_dir=str(output), vocab_size=300, **files | more)

    return make


@pytest.mark.parametrize("ending", ["", "/"])
def test_files_of_others_stay(options, tmp_path, ending):
    output = tmp_path / "output"
    (output / "sft").mkdir(parents=True)
    (output / "sft" / "model.safetensors").write_text("days of training")
    (output / "notes.txt").write_text("mine")
    main(options(f"{output}{ending}"))
    assert (output / "sft" / "model.safetensors").read_text() == "days of training"
    assert (output / "notes.txt").read_text() == "mine"
    model, tokenizer = load_model(output, "x"), load_tokenizer(output, "x")
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) <= 300


def test_a_finished_model_is_skipped_and_another_one_refused(options, tmp_path, capsys):
    output = tmp_path / "base"
    main(options(output))
    before = (output / "model.safetensors").read_bytes()
    capsys.readouterr()
    main(options(output))
    assert "complete with these options" in capsys.readouterr().out
    with pytest.raises(UserError, match="seed is 42 there and 7 now.*--overwrite True"):
        main(options(output, seed=7))
    assert (output / "model.safetensors").read_bytes() == before
    main(options(output, seed=7, overwrite=True))
    assert (tmp_path / "base.1" / "model.safetensors").read_bytes() == before
    assert (output / "model.safetensors").read_bytes() != before


def test_a_folder_with_another_model_is_refused(options, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="config.json was not made by this stage"):
        main(options(tmp_path / "mine"))


@pytest.mark.parametrize(
    "setting, expected",
    [({"kind": "huge"}, "tiny or smollm2"), ({"layers": -1}, "at least 0"), ({"vocab_size": 9}, "257")],
)
def test_options_that_cannot_work(setting, expected):
    with pytest.raises(UserError, match=expected):
        Options(output_dir="x", **setting)
