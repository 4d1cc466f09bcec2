"""Small models with random weights, SIDs and prompts for the tests of decoding, and slow reference scores."""

import random

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from minionerec.decoding.beam_search import left_pad

VOCABULARY = 160
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "qwen2": lambda: Qwen2Config(vocab_size=VOCABULARY, num_key_value_heads=2, **SMALL),
    "qwen3": lambda: Qwen3Config(vocab_size=VOCABULARY, num_key_value_heads=2, head_dim=8, **SMALL),
    "llama": lambda: LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=4, **SMALL),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
}


MIXED = [(10, 50), (10, 51, 90), (10, 51, 91, 120), (11,), (12, 50, 90), (12, 50, 91), (13, 10, 50)]


def random_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    model.generation_config.pad_token_id = 0
    return model


def random_sids(n, seed=0):
    rng = random.Random(seed)
    return sorted({(10 + rng.randrange(20), 50 + rng.randrange(20), 90 + rng.randrange(20)) for _ in range(n)})


def prompts_of(lengths):
    return left_pad([[1 + (7 * i + length) % 9 for i in range(length)] for length in lengths], 0, "cpu")


def log_prob(model, prompt, sid, temperature=1.0):
    """Sum of a SID's token log-probabilities after a prompt, by one plain forward."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + list(sid)])).logits[0].float() / temperature
    picked = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return picked[range(len(sid)), list(sid)].sum().item()


def catalog_log_prob(model, prompt, sid, sids, temperature=1.0):
    """A SID's log-probability renormalised, token by token, over what the SIDs allow: plain forwards, a Python set."""
    total = 0.0
    for depth in range(len(sid)):
        allowed = sorted({other[depth] for other in sids if other[:depth] == sid[:depth] and len(other) > depth})
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + list(sid[:depth])])).logits[0, -1].float() / temperature
        total += torch.log_softmax(logits[allowed], -1)[allowed.index(sid[depth])].item()
    return total
