"""Devices and precision: what a name means, and that emulated bf16 does not count.

Invariants: an empty name is the GPU or the CPU; a device that is not there is one line; bf16 is chosen only where the
device computes in it or an accelerate config asks for it.
"""

import pytest
import torch

from minionerec.common import devices
from minionerec.common.errors import UserError


def test_an_empty_name_is_what_is_there(monkeypatch):
    for there, kind in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert devices.pick_device("") == torch.device(kind)


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cpu:x", "mps"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(UserError, match=f"--device {name} is not on this machine .*; leave it out or use cpu"):
        devices.pick_device(name)
    assert devices.pick_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    "there, emulated, computed, asked, expected",
    [
        (False, False, False, "", False),
        (True, True, False, "", False),  # T4, V100
        (True, True, True, "", True),
        (False, False, False, "bf16", True),
        (False, False, False, "fp16", False),
    ],
)
def test_bf16(monkeypatch, there, emulated, computed, asked, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: emulated if including_emulation else computed
    )
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    assert devices.device_has_bf16() == computed and devices.wants_bf16() == expected
