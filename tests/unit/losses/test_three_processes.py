"""A class head among three processes of unequal shares: one process's loss and gradients, the bytes that travel, and a process that ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.processes import free_port

from lineament.losses import (
    UNPG,
    AdaFace,
    ArcFace,
    ClassHead,
    CosFace,
    CurricularFace,
    Elastic,
    MagFace,
    SphereFace,
)

COUNT, CLASSES, D = 3, 7, 5
SIZES = (2, 6, 3)
HEADS = {
    "arcface": lambda: ClassHead(CLASSES, D, ArcFace(0.3), 8.0, seed=1),
    "sphereface": lambda: ClassHead(CLASSES, D, SphereFace(2), seed=1),
    "magface": lambda: ClassHead(CLASSES, D, MagFace((0.1, 20.0)), 8.0, seed=1),
    "curricularface": lambda: ClassHead(CLASSES, D, CurricularFace(0.3, alpha=0.3), 8.0, seed=1),
    "adaface": lambda: ClassHead(CLASSES, D, AdaFace(alpha=0.5), 8.0, seed=1),
    "elastic, sampled": lambda: ClassHead(CLASSES, D, Elastic("cos", 0.2, 0.1), 8.0, sample=0.8, seed=1),
    "pairs": lambda: UNPG(ClassHead(CLASSES, D, CosFace(0.2), 8.0, seed=1)),
}

SCRIPT = """
import os, sys, torch, torch.distributed as dist
from lineament.core.shards import LostProcess
from lineament.losses import ClassHead
from lineament.modules import UnifiedEmbedding
from test_three_processes import COUNT, HEADS, SIZES, batch, two_steps

dist.init_process_group("gloo")
rank = dist.get_rank()
start = sum(SIZES[:rank])
found = {}
for name, made in HEADS.items():
    loss = made()
    head = getattr(loss, "head", loss)
    head.shard()
    values = two_steps(loss, slice(start, start + SIZES[rank]))
    dist.all_reduce(values[1])
    rows = values[2].full_tensor()
    found[name] = [values[0], values[1] / COUNT, rows]  # as DistributedDataParallel averages the network's

sent = []
def counted(function, which):
    def call(*arguments, **options):
        given = arguments[which]
        sent.append(sum(t.nbytes for t in (given if isinstance(given, list) else [given])))
        return function(*arguments, **options)
    return call
for name, which in (("all_gather", 0), ("all_reduce", 0), ("all_to_all_single", 1)):
    setattr(dist, name, counted(getattr(dist, name), which))
head = ClassHead(60, 64, scale=8.0)
head.shard()
sent.clear()
x = torch.randn(32, 64, generator=torch.Generator().manual_seed(rank)).requires_grad_()
head(x, torch.arange(32)).backward()
found["sent"] = sum(sent)
table = UnifiedEmbedding(300, 16)
table.add("user", lookups=1)
table.shard()
sent.clear()
ids = torch.randint(10_000, (400,), generator=torch.Generator().manual_seed(rank))
seen = table({"user": ids})
seen.sum().backward()
found["table"] = sum(sent), len(seen.unique(dim=0))
torch.save(found, sys.argv[1] + str(rank))
dist.barrier()
if rank == 1:
    os._exit(7)
try:
    for _ in range(50):
        head(x, torch.arange(32)).backward()
except LostProcess as error:
    open(sys.argv[1] + f"{rank}.txt", "w").write(str(error))
    os._exit(8)  # a process group that lost one of its own cannot be left in order
"""


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(sum(SIZES), 4, generator=torch.Generator().manual_seed(3))
    return x, torch.tensor([0, 6, 2, 3, 1, 1, 5, 6, -1, 0, 4])


def two_steps(loss: torch.nn.Module, rows: slice = slice(None)) -> list[torch.Tensor]:
    """The second step's loss of a linear encoder, and its gradients: draws and running means have moved."""
    weight = torch.randn(D, 4, generator=torch.Generator().manual_seed(4)).requires_grad_()
    x, y = (each[rows] for each in batch())
    loss(x @ weight.T, y)
    value = loss(x @ weight.T, y)
    return [value.detach(), *torch.autograd.grad(value, [weight, *loss.parameters()])]


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> tuple[Path, list[int]]:
    place = tmp_path_factory.mktemp("three")
    (place / "three.py").write_text(SCRIPT)
    paths = [str(Path(__file__).parent), *(str(Path(p).resolve()) for p in sys.path if p)]
    around = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    around |= {"WORLD_SIZE": str(COUNT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # fmt: skip
    command = [sys.executable, "three.py", str(place / "q")]
    runs = [subprocess.Popen(command, cwd=place, env={**around, "RANK": str(rank)}) for rank in range(COUNT)]
    return place, [run.wait(150) for run in runs]


@pytest.mark.parametrize("name", HEADS)
def test_three_processes_give_what_one_gives(processes, name):
    expected = two_steps(HEADS[name]())
    for rank in range(COUNT):
        found = torch.load(processes[0] / f"q{rank}")[name]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_step_sends_embeddings_twice_and_three_vectors(processes):
    whole, d = 32 * COUNT, 64
    bound = 4 * (2 * whole * d + 3 * whole)
    for rank in range(COUNT):
        sent = torch.load(processes[0] / f"q{rank}")["sent"]
        assert bound <= sent <= 1.05 * bound


def test_a_table_sends_each_different_row_once_there_and_back(processes):
    found = [torch.load(processes[0] / f"q{rank}")["table"] for rank in range(COUNT)]
    bound = sum(rows for _, rows in found) * (8 + 8 * 16)
    assert bound <= sum(sent for sent, _ in found) <= 1.05 * bound


def test_processes_that_are_left_end_and_name_the_one_that_is_gone(processes):
    place, codes = processes
    assert codes == [8, 7, 8]
    for rank in (0, 2):
        said = (place / f"q{rank}.txt").read_text()
        assert "rank 1 of 3 (process" in said and "ended or was stopped" in said
