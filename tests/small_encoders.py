"""Tiny encoders on disk: plain Hugging Face folders and sentence-transformers folders."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)

WORDS = ["<s>", "<pad>", "</s>", "<unk>", "desk", "lamp", "light", "bulb", "item", "query", ":", *map(str, range(10))]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def write_tokenizer(folder: Path, form: str, **settings) -> None:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<s>", 0), ("</s>", 2)])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"} | settings
    PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(folder)


def write_modules(folder: Path, modules: dict[str, dict], **config) -> None:
    """`modules.json` with a Transformer, and the given modules with their configs."""
    names = {"": "Transformer"} | {f"{i}_{name}": name for i, name in enumerate(modules, start=1)}
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(names.items())
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    for path, name in list(names.items())[1:]:
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(modules[name]))


def bert(folder: Path) -> None:
    """No modules.json: the mean of the tokens."""
    write_tokenizer(folder, "<s> $A </s>")
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=12, pad_token_id=1, **SIZES)).save_pretrained(
        folder
    )


def roberta(folder: Path) -> None:
    """Positions start after the padding id 1: 14 rows are 12 positions."""
    write_tokenizer(folder, "<s> $A </s>")
    config = RobertaConfig(vocab_size=len(WORDS), max_position_embeddings=14, pad_token_id=1, **SIZES)
    RobertaModel(config).save_pretrained(folder)


def sentence_t5(folder: Path) -> None:
    """Mean, a dense layer without bias, length 1; no limit of positions."""
    write_tokenizer(folder, "$A </s>")
    config = T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    dense = {"in_features": 16, "out_features": 6, "bias": False}
    dense |= {"activation_function": "torch.nn.modules.linear.Identity"}
    write_modules(folder, {"Pooling": pooling, "Dense": dense, "Normalize": {}})
    torch.save({"linear.weight": torch.randn(6, 16)}, folder / "2_Dense" / "pytorch_model.bin")


def prompted(folder: Path) -> None:
    """First token, prompts, a short limit, embeddings cut to 10 numbers."""
    bert(folder)
    pooling = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    prompts = {"query": "query : ", "short": "item "}
    write_modules(folder, {"Pooling": pooling}, prompts=prompts, default_prompt_name="query", truncate_dim=10)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 9}))


def instructor(folder: Path) -> None:
    """The mean of the tokens after the prompt."""
    bert(folder)
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True, "include_prompt": False}
    write_modules(folder, {"Pooling": pooling}, prompts={"query": "query : "}, default_prompt_name="query")


def decoder(folder: Path) -> None:
    """A causal language model with absolute positions, whose tokenizer pads on the left and has no padding token."""
    write_tokenizer(folder, "$A", pad_token=None, padding_side="left")
    config = GPTNeoConfig(
        vocab_size=len(WORDS), hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]],
        max_position_embeddings=40, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    GPTNeoForCausalLM(config).save_pretrained(folder)


def static(folder: Path) -> None:
    """Token embeddings without a transformer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    write_tokenizer(folder / "plain", "$A")
    backend = Tokenizer.from_file(str(folder / "plain" / "tokenizer.json"))
    SentenceTransformer(modules=[StaticEmbedding(backend, embedding_dim=8)], device="cpu").save(str(folder))


ENCODERS = {f.__name__: f for f in (bert, roberta, sentence_t5, prompted, instructor, decoder, static)}


def write(name: str, folder: Path) -> Path:
    """The encoder `name` in a new folder, with large random weights, so that texts differ."""
    folder.mkdir()
    torch.manual_seed(0)
    ENCODERS[name](folder)
    return folder
