"""Threads for small networks, and the device that an option names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lineament.core.checks import InputError


@contextmanager
def few_threads(inputs: Tensor, device: str) -> Iterator[None]:
    """One thread for inputs so small that handing the work to another costs more than it saves; as before afterwards."""
    before = torch.get_num_threads()
    if device == "cpu" and inputs[0].numel() < 1000:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def usable_device(name: str) -> torch.device:
    """The device of that name, once it is clear that it can be used; ``"auto"``: a GPU where there is one."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(
            f"device: got {name!r}, which cannot be used here; expected auto, cpu, cuda or cuda:0"
        ) from None
    return device
