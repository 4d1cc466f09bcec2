"""Small language models with random weights, rows of random tokens, and a short training for the tests of this room."""

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from minionerec.language_model.batches import Collator, EpochOrder, Lines
from minionerec.language_model.sft_trainer import SFTTrainer
from minionerec.language_model.tokenizing import Rows

VOCABULARY = 120
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
LLAMA = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
ARCHITECTURES = {  # name: (model type, settings)
    "qwen2": ("qwen2", LLAMA | {"tie_word_embeddings": True}),
    "llama": ("llama", LLAMA | {"tie_word_embeddings": False}),
    "mistral": ("mistral", LLAMA | {"sliding_window": None}),
    "phi3": ("phi3", LLAMA | {"pad_token_id": 0}),
    "gpt2": ("gpt2", GPT2),
    "opt": ("opt", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt projected": ("opt", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 16}),  # embeddings narrower than the layers
    "gpt_neox": ("gpt_neox", SMALL | {"intermediate_size": 48}),
    "gemma": ("gemma", LLAMA | {"head_dim": 8}),  # scales its embeddings
    "gemma2": ("gemma2", LLAMA | {"head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 256}),  # caps logits
    "cohere": ("cohere", LLAMA | {"logit_scale": 0.25}),  # scales logits
    "granite": ("granite", LLAMA | {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "phi": ("phi", SMALL | {"intermediate_size": 48}),  # LM head with a bias, as the next two
    "gptj": ("gptj", GPT2 | {"rotary_dim": 4, "tie_word_embeddings": False}),
    "codegen": ("codegen", GPT2 | {"rotary_dim": 4, "tie_word_embeddings": False}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),  # ALiBi
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),  # recurrent
}
WITH_BIAS = ("phi", "gptj", "codegen")  # architectures whose LM head has a bias


def config_of(name: str, vocab_size: int = VOCABULARY):
    kind, settings = ARCHITECTURES[name]
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    return AutoConfig.for_model(kind, vocab_size=vocab_size, **ids | settings)


def random_model(name: str, std: float = 0.0, vocab_size: int = VOCABULARY):
    """A model in evaluation mode; with `std`, all matrices and the head's bias are drawn with it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name, vocab_size), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters() if std else ():
            if parameter.ndim > 1:
                parameter.normal_(0, std)
        bias = getattr(model.get_output_embeddings(), "bias", None)
        if bias is not None:
            bias.normal_()
    return model


def rows_of(lengths, answers=None) -> Rows:
    """Rows of given lengths whose tokens count up from 0."""
    answers = answers or [min(2, n - 1) for n in lengths]
    return Rows(np.arange(sum(lengths), dtype=np.int32), np.concatenate([[0], np.cumsum(lengths)]), np.array(answers))


def random_rows(n: int = 21, vocab_size: int = VOCABULARY) -> Rows:
    generator = np.random.default_rng(3)
    rows = rows_of(generator.integers(6, 20, n).tolist(), generator.integers(1, 5, n).tolist())
    return rows._replace(tokens=generator.integers(1, vocab_size, len(rows.tokens)).astype(np.int32))


def train(folder, model, rows: Rows, valid: Rows | None = None, capacity: int = 0, callbacks=None, **arguments):
    """The `SFTTrainer` after two epochs on given rows; `capacity` packs them."""
    lines = Lines(rows, capacity)
    defaults = {"num_train_epochs": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "save_strategy": "no"}
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, seed=1, logging_steps=1, report_to=[], remove_unused_columns=False,
        disable_tqdm=True, **defaults | arguments,
    )  # fmt: skip
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=lines, eval_dataset=Lines(valid or rows),
        data_collator=Collator(0, packed=capacity > 0), order=EpochOrder(lines.lengths, size, 1, by_length=True),
        callbacks=callbacks,
    )  # fmt: skip
    trainer.train()
    return trainer


def plain_loss(model, rows: Rows) -> float:
    """Mean loss of the answers in nats per token, row by row with full logits."""
    nats = count = 0
    for start, end, answer in zip(rows.start, rows.start[1:], rows.answer, strict=False):
        ids = torch.from_numpy(rows.tokens[start:end]).long()[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -answer - 1 : -1].float()
        nats += torch.nn.functional.cross_entropy(logits, ids[0, -answer:], reduction="sum").item()
        count += answer
    return nats / count
