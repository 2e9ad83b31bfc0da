"""Training with alignment in two processes."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tests.unit.modules.sparse_attention.models import made, prompts
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lineament.modules.sparse_attention import aligned

STEPS = 4
BUDGET: dict[str, Any] = {"block_size": 4, "blocks": 3, "seed": 5}


def gradients(model: Any, tokens: torch.Tensor, step: int) -> tuple[bool, dict[str, torch.Tensor]]:
    """The step's coin, and the gradients by name."""
    model.zero_grad()
    with aligned(model, **BUDGET, step=step) as branch:
        (model(input_ids=tokens, labels=tokens).loss + branch.loss).backward()
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return branch.coins[0], {name: whole(x) for name, x in found.items() if x is not None}


def whole(gradient: torch.Tensor) -> torch.Tensor:
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()


def test_two_processes_draw_one_coin_and_have_the_mean_of_their_gradients(tmp_path: Path):
    # Both are new: the name of a process group counts the groups that its process had before, and the two have to agree on it.
    mp.spawn(process, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    model, tokens = made("llama").train(), prompts(4, 26)
    known = [[gradients(model, x, step) for x in tokens.split(2)] for step in range(STEPS)]
    assert {coin for (coin, _), _ in known} == {True, False}
    for how in ("ddp", "fsdp"):
        for mine, yours, each in zip(one[how], two[how], known, strict=True):
            assert mine["coin"] == yours["coin"] == each[0][0]
            assert mine["gradients"].keys() == each[0][1].keys()
            for name, x in mine["gradients"].items():
                torch.testing.assert_close(x, yours["gradients"][name], rtol=0, atol=0)
                torch.testing.assert_close(x, (each[0][1][name] + each[1][1][name]) / 2, rtol=1e-4, atol=1e-5)


def process(rank: int, folder: str) -> None:
    # Each begins in a random state of its own, which the coin must not read.
    torch.manual_seed(rank)
    torch.set_num_threads(1)
    wait = timedelta(seconds=200)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=wait
    )
    try:
        sharded = made("llama").train()
        for layer in (*sharded.model.layers, sharded):
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        models = {"ddp": DistributedDataParallel(made("llama").train()), "fsdp": sharded}
        moved = {
            how: [gradients(model, prompts(4, 26).split(2)[rank], step) for step in range(STEPS)]
            for how, model in models.items()
        }
    finally:
        dist.destroy_process_group()
    held = {how: [{"coin": coin, "gradients": found} for coin, found in each] for how, each in moved.items()}
    torch.save(held, f"{folder}/{rank}.pt")
