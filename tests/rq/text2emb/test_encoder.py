"""Encoders: embeddings are those of sentence-transformers' `encode`, for every kind of folder.

Invariants: pooling, dense layers, normalisation, prompts and cuts are those that the folder declares; no text is longer
than the position table; padding does not change an embedding; what follows the transformer is computed in float32; a
batch that does not fit the GPU is halved; no code of a folder is executed.
"""

import json
import random
import shutil

import numpy as np
import pytest
import small_encoders
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from minionerec.common.errors import UserError
from rq.text2emb.encoder import Encoder, dtype_of
from rq.text2emb.parts import batches

PLAIN = {"max_length": 2048, "dtype": "", "pooling": "", "prompt": "", "name": ""}
CUTS = {"bert": 12, "roberta": 12, "sentence_t5": 2048, "prompted": 9, "instructor": 12, "decoder": 40}


def texts(n: int = 30) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(small_encoders.WORDS[4:], k=1 + i)) for i in range(n)]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of an encoder by name."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = small_encoders.write(name, tmp_path_factory.mktemp("encoders") / name)
        return made[name]

    return get


def encoder(folder, **options) -> Encoder:
    return Encoder(folder, torch.device("cpu"), **PLAIN | options)


def embed(model: Encoder, given: list[str], budget: int) -> np.ndarray:
    """As rq/text2emb/parts.py does it: batches of similar lengths."""
    rows, shared = model.tokenize(given)
    found = np.zeros((len(given), model.dim()), dtype=np.float32)
    for batch in batches([model.length(row) for row in rows], budget, 1000):
        found[batch] = model.embed([rows[i] for i in batch], shared).numpy()
    return found


def reference(folder, cut: int, **options) -> np.ndarray:
    """sentence-transformers' own, one text at a time; `cut` is a limit that it does not know of."""
    model = SentenceTransformer(str(folder), device="cpu")
    if cut:
        model.max_seq_length = cut
        model.tokenizer.pad_token = model.tokenizer.pad_token or model.tokenizer.eos_token
    return model.encode(texts(), batch_size=1, **options)


@pytest.mark.parametrize("name", small_encoders.ENCODERS)
def test_equal_to_sentence_transformers(name, folder_of):
    model = encoder(folder_of(name))
    expected = reference(folder_of(name), CUTS.get(name))
    assert name not in CUTS or model.max_length == CUTS[name]
    assert np.ptp(expected, axis=0).min() > 1e-3  # texts differ
    for budget in (1, 40, 10_000):
        np.testing.assert_allclose(embed(model, texts(), budget), expected, atol=1e-5)


def test_pooling_of_a_plain_folder(folder_of):
    """The last token of a causal language model, the mean of an encoder; --pooling overrides either."""
    model, expected = encoder(folder_of("decoder")), AutoModel.from_pretrained(folder_of("decoder")).eval()
    ids = model.tokenizer(["lamp desk light"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = expected(ids).last_hidden_state[0]  # (tokens, dim)
    assert model.modules == "Transformer, Pooling (lasttoken)"
    np.testing.assert_allclose(embed(model, ["lamp desk light"], 99)[0], hidden[-1], atol=1e-5)
    mean = encoder(folder_of("decoder"), pooling="mean")
    np.testing.assert_allclose(embed(mean, ["lamp", "lamp desk light"], 99)[1], hidden.mean(0), atol=1e-5)
    with pytest.raises(UserError, match="--pooling mean: .* does not pool tokens"):
        encoder(folder_of("static"), pooling="mean")


def test_prompts(folder_of):
    folder = folder_of("prompted")
    found = embed(encoder(folder, prompt="light "), texts(), 99)
    np.testing.assert_allclose(found, reference(folder, 0, prompt="light "), atol=1e-5)
    found = embed(encoder(folder, name="short"), texts(), 99)
    np.testing.assert_allclose(found, reference(folder, 0, prompt_name="short"), atol=1e-5)
    assert encoder(folder).prompt == "query : "
    with pytest.raises(UserError, match="--prompt_name x: .* has the prompts document, query, short"):
        encoder(folder, name="x")


def test_length(folder_of):
    model = encoder(folder_of("bert"), max_length=5)
    assert max(map(model.length, model.tokenize(texts())[0])) == 5
    np.testing.assert_allclose(embed(model, texts(), 99), reference(folder_of("bert"), 5), atol=1e-5)
    with pytest.raises(UserError, match="--max_sent_len 2: expected at least 3, because each text of .* has 2 special"):
        encoder(folder_of("bert"), max_length=2)


def test_an_encoder_that_cannot_embed_is_one_line(folder_of, tmp_path):
    shutil.copytree(folder_of("sentence_t5"), tmp_path / "wide")
    dense = tmp_path / "wide" / "2_Dense"
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"in_features": 15}))
    torch.save({"linear.weight": torch.randn(6, 15)}, dense / "pytorch_model.bin")
    with pytest.raises(UserError, match="wide: cannot embed a text .*; check --plm_checkpoint"):
        encoder(tmp_path / "wide").dim()


def test_what_follows_the_transformer_is_in_float32(folder_of):
    exact = embed(encoder(folder_of("sentence_t5")), texts(), 99)
    half = embed(encoder(folder_of("sentence_t5"), dtype="bfloat16"), texts(), 99)
    assert 1e-5 < np.abs(half - exact).max() < 0.1
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1, atol=1e-6)
    assert dtype_of("", torch.device("cpu")) == "float32" and dtype_of("float16", torch.device("cpu")) == "float16"


def test_a_batch_that_does_not_fit_is_halved(folder_of, monkeypatch):
    model = encoder(folder_of("bert"))
    expected, plain = embed(model, texts(), 10_000), model._embed

    def small(rows, shared):
        if len(rows) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(rows, shared)

    monkeypatch.setattr(model, "_embed", small)
    np.testing.assert_allclose(embed(model, texts(), 10_000), expected, atol=1e-5)
    monkeypatch.setattr(model, "_embed", lambda rows, shared: small(rows * 5, shared))
    with pytest.raises(UserError, match=r"one text of \d+ tokens does not fit the GPU; lower --max_sent_len"):
        model.embed(model.tokenize(["desk lamp"])[0], {})


def test_no_code_of_the_folder_is_executed(tmp_path):
    folder = small_encoders.write("prompted", tmp_path / "code")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "evil.Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="not an encoder that can be loaded .*evil.Pooling"):
        encoder(folder)
    assert not (tmp_path / "executed").exists()
