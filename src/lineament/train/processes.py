"""One process or several: what Hugging Face Accelerate says about where a training runs, and what its processes tell each other.

`accelerate launch` starts the same command in several processes; the first one reads and writes the files. Batches and weights are
placed here rather than by Accelerate, so that one process can use any device by name.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from lineament.core import shards
from lineament.core.checks import InputError, require
from lineament.core.models import usable


class OneProcess:
    """A training in this process alone; what :class:`Processes` has for several."""

    rank, count = 0, 1

    def __init__(self, device: torch.device):
        self.device = device

    @property
    def first(self) -> bool:
        """Whether this is the process that reads and writes files."""
        return self.rank == 0

    def wrapped(self, model: nn.Module, *, unused: bool = False) -> nn.Module:
        return model

    def unwrapped(self, model: nn.Module) -> None:
        pass

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def summed(self, values: Sequence[float]) -> list[float]:
        """Each number's sum over the processes."""
        return list(values)

    def agreed(self, value: Any) -> Any:
        """What the first process passed, in all of them."""
        return value


class Processes(OneProcess):
    """This process among those that train together.

    Attributes:
        device: where this process trains.
        rank, count: its number and how many there are.

    Args:
        device: ``"cpu"``, ``"cuda:1"``, ...; by default what Accelerate chooses. Only for a single process.

    Raises:
        InputError: Accelerate is not installed, the device cannot be used, a configuration of Accelerate that this training does not
            serve (sharded parameters, float16 with a gradient scaler, gradient accumulation).

    >>> alone = Processes("cpu")
    >>> alone.count, alone.first, alone.summed([1.5, 2.0]), alone.agreed("x")
    (1, True, [1.5, 2.0], 'x')
    """

    def __init__(self, device: str | torch.device | None = None):
        try:
            import accelerate
        except ImportError as error:
            raise InputError(
                "training needs the package 'accelerate', which is not installed; install lineament[train]"
            ) from error
        started = int(os.environ.get("WORLD_SIZE", "1"))
        # Several processes of torchrun on a machine without an accelerator: Accelerate has to be told that the CPU is meant.
        cpu = started > 1 and not torch.accelerator.is_available()
        here, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.accelerator.device_count()
        require(
            cpu or here <= max(devices, 1),
            f"torchrun: started {here} processes on this machine, which has {devices} accelerator{'s' * (devices > 1)}, one for each process; start no more "
            "than that, or train on the CPU with CUDA_VISIBLE_DEVICES=''",
        )
        self._averaging = accelerate.DistributedDataParallelKwargs()
        self.accelerator = accelerate.Accelerator(
            device_placement=False, cpu=cpu, kwargs_handlers=[self._averaging]
        )
        self.rank, self.count = self.accelerator.process_index, self.accelerator.num_processes
        require(
            self.count == started,
            f"accelerate: sees {self.count} of the {started} processes that were started; start them by accelerate launch or torchrun",
        )
        kind = str(self.accelerator.distributed_type.value)
        require(
            kind in ("NO", "MULTI_GPU", "MULTI_CPU"),
            f"accelerate: configured for {kind}, expected one process, MULTI_GPU or MULTI_CPU",
        )
        require(
            self.accelerator.mixed_precision in ("no", "bf16"),
            f"accelerate: configured for mixed precision {self.accelerator.mixed_precision}, expected no or bf16 (float16 would need a "
            "gradient scaler around every optimizer)",
        )
        require(
            self.accelerator.gradient_accumulation_steps == 1,
            "accelerate: configured for gradient accumulation, expected 1 step; lower the batch size instead",
        )
        require(
            device is None or self.count == 1,
            f"device: got {str(device)!r} with {self.count} processes, which have one device each; leave it out",
        )
        if self.count > 1:
            shards.introduce(torch.distributed.new_group(backend="gloo"))
        self.device = self.accelerator.device
        if device is not None:
            with usable(device):
                self.device = torch.device(device)

    def wrapped(self, model: nn.Module, *, unused: bool = False) -> nn.Module:
        """The model that averages gradients over the processes; itself where there is one.

        ``unused``: it has parameters that its output does not hang on, which every step then looks for.
        """
        self._averaging.find_unused_parameters = unused
        return self.accelerator.prepare_model(model)

    def unwrapped(self, model: nn.Module) -> None:
        """Let go of the model, whose forward Accelerate may have wrapped for mixed precision."""
        inner = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        # The method of the class is the same; the instance need not hold a copy of it.
        if getattr(vars(inner).get("forward"), "__func__", None) is type(inner).forward:
            del inner.forward

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def summed(self, values: Sequence[float]) -> list[float]:
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def agreed(self, value: Any) -> Any:
        if self.count == 1:
            return value
        held = [value]
        torch.distributed.broadcast_object_list(held, src=0)
        return held[0]


@contextmanager
def randomness(*numbers: int) -> Iterator[None]:
    """The global random states of Python, NumPy and PyTorch as some numbers together decide, and as they were afterwards.

    >>> with randomness(0):
    ...     a = torch.rand(1)
    >>> with randomness(0):
    ...     bool(torch.rand(1) == a)
    True
    """
    before = random.getstate(), np.random.get_state()  # noqa: NPY002  (a user's network may draw from it)
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
        try:
            seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            # Where there is no accelerator, this is the same in a thousandth of the time.
            (torch.manual_seed if devices else torch.default_generator.manual_seed)(seed)
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
