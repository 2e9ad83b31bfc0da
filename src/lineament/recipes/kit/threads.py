"""Threads for small networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


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
