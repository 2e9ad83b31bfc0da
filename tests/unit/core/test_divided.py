"""Tables and class heads that lie with two and three processes are those of one: outputs, gradients, steps, checkpoints, files; and who is left names who died."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import free_port
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lineament.core.checks import InputError
from lineament.core.whole_files import local
from lineament.losses import ArcFace, ClassHead, CosFace
from lineament.modules import UnifiedEmbedding, multiplex
from lineament.optim import RowAdagrad, RowAdam, RowSGD

# What is divided how, and the optimizer of its rows. 23 rows make uneven parts, 5 columns, too.
TABLES = {
    "row": ({"sparse": True}, RowAdagrad, 0.1),
    "row, dense": ({}, torch.optim.Adam, 0.1),
    "row, own rows": ({"sparse": True, "reserve": [4, 7]}, lambda p, lr: RowSGD(p, lr, 0.9, 0.1), 0.1),
    "table": ({"sparse": True, "tables": 6}, RowAdam, 0.1),
    "column": ({"sparse": True}, RowAdagrad, 0.1),
    "column, dense": ({}, RowAdam, 0.1),
    "replicate": ({"sparse": True}, RowAdagrad, 0.1),
    "replicate, dense": ({}, torch.optim.Adam, 0.1),
}
HEADS = {
    "cosface": lambda: ClassHead(7, 64, CosFace(0.2), scale=8.0, seed=1),
    "sampled": lambda: ClassHead(40, 64, ArcFace(0.2), scale=8.0, sample=0.3, seed=1),
}
SIZES = {1: (8,), 2: (3, 5), 3: (3, 5, 0)}


def table(name: str, seed: int = 0, device: str = "cpu") -> UnifiedEmbedding:
    options: dict[str, Any] = dict(TABLES[name][0])
    reserve = options.pop("reserve", ())
    made = UnifiedEmbedding(23, 5, seed=seed, device=device, **options)
    made.add("user", 3, reserve=reserve)
    made.add("tags", 2, combiner="sqrtn", padding=0)
    made.add("words", 1)
    return made


def batch(step: int, rows: slice) -> dict[str, Any]:
    g = torch.Generator().manual_seed(step)
    user, tags, words = torch.randint(40, (8,), generator=g), torch.randint(9, (8, 3), generator=g), torch.randint(9, (16,), generator=g)  # fmt: skip
    n = len(range(8)[rows])
    return {
        "user": user[rows],
        "tags": tags[rows],
        "words": (words[rows.start * 2 : rows.stop * 2], torch.arange(0, 2 * n, 2)),
    }


def trained(made: UnifiedEmbedding, optimizer: Any, rows: slice, steps: range, count: int = 1) -> list[Any]:
    """The output of some samples in each step, whose loss is the mean over all processes' samples."""
    found = []
    for step in steps:
        goal = torch.randn(8, 30, generator=torch.Generator().manual_seed(step + 50))[rows]
        optimizer.zero_grad(set_to_none=True)
        output = made(batch(step, rows))
        # In two halves, which add up.
        for half in (output[:, :11] * goal[:, :11], output[:, 11:] * goal[:, 11:]):
            (half.sum() * count / 8).backward(retain_graph=True)
        optimizer.step()
        found.append(output.detach())
    return found


def losses(head: ClassHead, rows: slice) -> list[torch.Tensor]:
    """Losses and gradients of two steps."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    y = torch.tensor([0, 1, 2, 0, 1, -1, 0, 6])
    found = []
    for _ in range(2):
        value = head(x[rows], y[rows])
        found += [value.detach(), *torch.autograd.grad(value, [x, head.weight])]
    return found


def whole(module: Any) -> torch.Tensor:
    return module.weight.full_tensor().detach()


class Sent(TorchDispatchMode):
    """Counts the bytes that collectives are given, and of gathers what they give."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            which = func.__name__.split(".")[0]
            given = args[{"alltoall_base_": 1, "allreduce_": 0, "allgather_": 0}[which]]
            self.bytes += sum(t.numel() * t.element_size() for t in tree_leaves(given))
        return func(*args, **(kwargs or {}))


def work(folder: Path) -> None:
    """What each process does, run as a script."""
    import torch.distributed as dist
    import torch.distributed.checkpoint
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    from lineament.core.shards import LostProcess

    dcp: Any = torch.distributed.checkpoint
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    start = sum(SIZES[count][:rank])
    mine = slice(start, start + SIZES[count][rank])
    found: dict[Any, Any] = {"tables": {}, "heads": {}, "continued": {}, "refused": {}}

    for name, (_, made_by, lr) in TABLES.items():
        made = table(name, device="meta" if count == 3 else "cpu")  # three draw their parts
        made.shard(by=name.split(",")[0])  # pyright: ignore[reportArgumentType]
        optimizer = made_by(made.parameters(), lr)
        outputs = trained(made, optimizer, mine, range(2), count)
        weight: Any = made.weight
        part = weight.to_local()
        found["tables"][name] = [outputs, whole(made), part.shape, local(weight.grad).is_sparse]  # fmt: skip
        place = folder / name
        if count == 3:
            state = {"table": made.state_dict(), "optimizer": get_optimizer_state_dict(made, optimizer)}
            dcp.save(state, checkpoint_id=place)
            made.save(f"{place}.safetensors")
            continue
        # Two processes go on from what three have left, by a distributed checkpoint and by the file.
        for file in (False, True):
            made = table(name)
            made.shard(by=name.split(",")[0])  # pyright: ignore[reportArgumentType]
            optimizer = made_by(made.parameters(), lr)
            state = {"table": made.state_dict(), "optimizer": get_optimizer_state_dict(made, optimizer)}
            dcp.load(state, checkpoint_id=place)
            made.load_state_dict(state["table"])
            set_optimizer_state_dict(made, optimizer, state["optimizer"])
            if file:
                with torch.no_grad():
                    made.weight.zero_()
                made.load(f"{place}.safetensors")
            outputs = trained(made, optimizer, mine, range(2, 3), count)
            found["continued"][name, file] = [outputs, whole(made)]
        other = table(name, seed=11)
        other.shard(by=name.split(",")[0])  # pyright: ignore[reportArgumentType]
        for how in ("file", "checkpoint"):
            try:
                if how == "file":
                    other.load(f"{place}.safetensors")
                else:
                    state = {"table": other.state_dict()}
                    dcp.load(state, checkpoint_id=place)
                    other.load_state_dict(state["table"])
            except InputError as error:
                found["refused"][name, how] = str(error)

    net: Any = torch.nn.ModuleDict({"a": torch.nn.Embedding(30, 8), "b": torch.nn.EmbeddingBag(50, 16)})
    multiplex(net, rows=20)
    net["a"].table.shard()
    found["views"] = [net["a"](torch.arange(30)).detach(), net["b"](torch.arange(50).view(10, 5)).detach()]

    big = UnifiedEmbedding(3000, 16, sparse=True)
    big.add("user", 1)
    big.shard()
    ids = torch.randint(900, (800,), generator=torch.Generator().manual_seed(rank))
    with Sent() as sent:
        big({"user": ids}).sum().backward()
    unique = len(big.places_of("user", ids).unique())
    found["table bytes"] = [sent.bytes, unique * (8 + 8 * 16)]
    for name, make in HEADS.items():
        head = make()
        head.shard()
        with Sent() as sent:
            value, x, weight, second, x2, weight2 = tuple[Any, ...](losses(head, mine))
        found["head bytes", name] = sent.bytes / 2
        for each in (x, x2):
            dist.all_reduce(each)
        found["heads"][name] = [
            value,
            x / count,
            weight.full_tensor(),
            second,
            x2 / count,
            weight2.full_tensor(),
        ]
        if count == 3:
            head.save(folder / f"{name}.head.safetensors")
        else:
            head.load(folder / f"{name}.head.safetensors")
            found["heads", name] = whole(head)

    torch.save(found, folder / f"{count}.{rank}")
    dist.barrier()
    head = HEADS["cosface"]()
    head.shard()
    if rank == 1:
        os._exit(9)
    try:
        for _ in range(50):
            losses(head, mine) if count == 3 else big({"user": ids})
    except LostProcess as error:
        (folder / f"{count}.{rank}.lost").write_text(str(error))
        os._exit(3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("divided")
    paths = os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p)
    for count in (3, 2):
        around = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count)}
        around |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        runs = [
            subprocess.Popen([sys.executable, __file__, str(folder)], env={**around, "RANK": str(rank)})
            for rank in range(count)
        ]
        assert [run.wait(200) for run in runs] == [3, 9, 3][:count]
    return folder


def of(folder: Path, count: int) -> list[dict[Any, Any]]:
    return [torch.load(folder / f"{count}.{rank}", weights_only=False) for rank in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_a_divided_table_is_that_of_one_process(folder, name):
    import torch.distributed.checkpoint
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    dcp: Any = torch.distributed.checkpoint
    _, made_by, lr = TABLES[name]
    made = table(name)
    optimizer = made_by(made.parameters(), lr)
    outputs = trained(made, optimizer, slice(0, 8), range(2))
    after = made.weight.detach().clone()
    later = trained(made, optimizer, slice(0, 8), range(2, 3))
    for count in (2, 3):
        found = of(folder, count)
        for step in range(2):
            joined = torch.cat([each["tables"][name][0][step] for each in found])
            torch.testing.assert_close(joined, outputs[step], rtol=1e-5, atol=1e-6)
        for each in found:
            _, weight, _, sparse = each["tables"][name]
            torch.testing.assert_close(weight, after, rtol=1e-5, atol=1e-6)
            assert sparse == bool(TABLES[name][0].get("sparse"))
        along = {"row": 0, "table": 0, "column": 1}.get(name.split(",")[0])
        if along is not None:
            parts = [each["tables"][name][2][along] for each in found]
            assert sum(parts) == after.shape[along] and max(parts) < after.shape[along]
    for file in (False, True):
        found = [each["continued"][name, file] for each in of(folder, 2)]
        torch.testing.assert_close(torch.cat([f[0][0] for f in found]), later[0], rtol=1e-5, atol=1e-6)
        for each in found:
            torch.testing.assert_close(each[1], made.weight.detach(), rtol=1e-5, atol=2e-6)
    alone = table(name)
    alone.load(folder / f"{name}.safetensors")
    torch.testing.assert_close(alone.weight.detach(), after, rtol=1e-5, atol=1e-6)
    # The three processes' checkpoint, opened by this one, which has no process group, with the optimizer's state: it goes on as they would have.
    alone = table(name)
    optimizer = made_by(alone.parameters(), lr)
    state = {"table": alone.state_dict(), "optimizer": get_optimizer_state_dict(alone, optimizer)}
    dcp.load(state, checkpoint_id=folder / name, no_dist=True)
    alone.load_state_dict(state["table"])
    set_optimizer_state_dict(alone, optimizer, state["optimizer"])
    torch.testing.assert_close(alone.weight.detach(), after, rtol=1e-5, atol=1e-6)
    outputs = trained(alone, optimizer, slice(0, 8), range(2, 3))
    torch.testing.assert_close(outputs, later, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone.weight.detach(), made.weight.detach(), rtol=1e-5, atol=2e-6)
    other = table(name, seed=11)
    state = {"table": other.state_dict()}
    dcp.load(state, checkpoint_id=folder / name, no_dist=True)
    with pytest.raises(InputError, match=r"saved with seed 0 .here 11."):
        other.load_state_dict(state["table"])
    for each in of(folder, 2):
        for how in ("file", "checkpoint"):
            assert "saved with seed 0 (here 11)" in each["refused"][name, how]


@pytest.mark.slow
def test_views_read_a_divided_table(folder):
    net = torch.nn.ModuleDict({"a": torch.nn.Embedding(30, 8), "b": torch.nn.EmbeddingBag(50, 16)})
    multiplex(net, rows=20)
    expected = [net["a"](torch.arange(30)).detach(), net["b"](torch.arange(50).view(10, 5)).detach()]
    for count in (2, 3):
        for each in of(folder, count):
            torch.testing.assert_close(each["views"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_uneven_parts_is_that_of_one_process(folder, name):
    from safetensors.torch import load_file

    head = HEADS[name]()
    expected = losses(head, slice(0, 8))
    for count in (2, 3):
        for each in of(folder, count):
            torch.testing.assert_close(each["heads"][name], expected, rtol=1e-5, atol=1e-6)
    for each in of(folder, 2):
        assert each["heads", name].equal(head.weight)
    path = folder / f"{name}.head.safetensors"
    assert load_file(path)["weight"].equal(head.weight)
    again = HEADS[name]()
    torch.nn.init.zeros_(again.weight)
    again.load(path)
    # The draws that come next are those of the head that was saved.
    assert all(a.equal(b) for a, b in zip(losses(again, slice(0, 8)), losses(head, slice(0, 8))))


@pytest.mark.slow
def test_what_is_sent_is_what_was_said(folder):
    for count in (2, 3):
        for each in of(folder, count):
            sent, bound = each["table bytes"]
            assert 0.9 * bound < sent <= 1.05 * bound
            # The batch's seven labelled samples are gathered, padded to as many with each process.
            for name in HEADS:
                n, most = 7, {2: 4, 3: 4}[count] * count
                bound = 4 * ((most + n) * 64 + 3 * n)
                sent = each["head bytes", name] - 8 * (most + 4 * count)  # labels and sizes
                assert 0.9 * bound < sent <= 1.05 * bound


@pytest.mark.slow
def test_who_is_left_ends_and_names_who_died(folder):
    for count, left in ((2, [0]), (3, [0, 2])):
        for rank in left:
            said = (folder / f"{count}.{rank}.lost").read_text()
            assert f"rank 1 of {count} (process" in said and "ended or was stopped" in said


def test_what_cannot_be_divided_is_refused():
    for words, call in (
        ("there is no process group", lambda: table("row").shard()),
        ("by: got 'rows'", lambda: table("row").shard(object(), by="rows")),  # pyright: ignore
        ("expected one dimension", lambda: table("row").shard(Mesh())),
        ("rows of their own do not divide", lambda: table("row, own rows").shard(Mesh(), by="table")),
    ):
        with pytest.raises(InputError, match=words):
            call()


class Mesh:
    """A mesh of two dimensions."""

    ndim = 2

    def size(self) -> int:
        return 4


if __name__ == "__main__":
    work(Path(sys.argv[1]))
