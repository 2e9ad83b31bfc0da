"""Mixtures of hard negatives, keys and pairs of several processes, gradients without the margin's derivative."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.processes import free_port
from torch.nn import functional as F

from lineament.core.checks import InputError
from lineament.losses import (
    UNPG,
    ArcFace,
    ClassHead,
    Combined,
    CosFace,
    CosineAlignment,
    Elastic,
    HardMixing,
    InfoNCE,
    MagFace,
    NTXent,
    PositiveExtrapolation,
    Queue,
    SupCon,
)  # fmt: skip
from lineament.losses.sharded import shard


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_hard_negatives_join_the_denominator():
    query, key, mixing = unit(5, 8), unit(5, 8, seed=1), HardMixing(6, mixed=4, with_query=3)
    loss = InfoNCE(0.2, queue=Queue(40, 8), transform=[mixing], seed=3)
    positive, negatives = loss.scores(query, key)
    assert negatives.shape == (5, 47)
    again = InfoNCE(0.2, queue=Queue(40, 8), transform=[mixing], seed=3)
    expected = F.cross_entropy(
        torch.cat([positive[:, None], negatives], 1) / 0.2, torch.zeros(5, dtype=torch.long)
    )
    assert torch.allclose(again(query, key), expected, atol=1e-5)
    # Mixtures of the hardest are on average harder than the queue, and those with the query harder still.
    assert negatives[:, 40:44].mean() > negatives[:, :40].mean() + 0.2
    assert negatives[:, 44:].mean() > negatives[:, 40:44].mean()
    plain = InfoNCE(0.2, queue=Queue(40, 8), transform=[HardMixing(6, start=2)], seed=3)
    assert plain(query, key).equal(InfoNCE(0.2, queue=Queue(40, 8))(query, key)), "before its start"
    with pytest.raises(InputError, match="but there is none"):
        InfoNCE(transform=[mixing])


def test_views_without_negatives_are_pushed_apart_by_the_same_identity():
    p, t = (
        torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).double().requires_grad_(),
        3 * unit(5, 8, seed=2).double(),
    )
    similar = F.cosine_similarity(p, t)
    plain = CosineAlignment()(p, t)
    torch.testing.assert_close(plain, (2 - 2 * similar).mean())
    loss = CosineAlignment(PositiveExtrapolation(start=2), seed=4)
    torch.testing.assert_close(loss(p, t), plain)
    loss.set_epoch(2)
    state = loss.state_dict()
    lam = PositiveExtrapolation().draw((5, 8), torch.Generator().manual_seed(4), p)
    harder = similar + 2 * lam * (1 - lam) * (1 - similar)
    found = loss(p, t)
    torch.testing.assert_close(found, (2 - 2 * harder).mean())
    # Both ends of the extrapolated pair have the prediction in them: its gradient is 1 + 2 λ (λ - 1) times that of the plain loss.
    one, other = (torch.autograd.grad(each, p, retain_graph=True)[0] for each in (found, plain))
    torch.testing.assert_close(one, (1 + 2 * lam * (lam - 1)) * other)
    resumed = CosineAlignment(PositiveExtrapolation())
    resumed.load_state_dict(state)
    assert resumed(p, t) == found != loss(p, t)
    assert loss.eval()(p, t) == plain
    with pytest.raises(InputError, match="the shape of the prediction"):
        loss(p, t[:2])
    with pytest.raises(InputError, match="as there are no negatives"):
        CosineAlignment(HardMixing())


def test_one_hard_key_alone_is_itself():
    query, queue = unit(3, 4), unit(9, 4, seed=2)
    found = HardMixing(1, mixed=2, with_query=0)(query, queue, torch.Generator().manual_seed(0))
    assert torch.allclose(found, queue[(query @ queue.T).argmax(1)][:, None].expand(-1, 2, -1), atol=1e-6)


@pytest.mark.parametrize("kind", [ArcFace, lambda **o: Combined(1.0, 0.3, 0.1, **o), lambda **o: Combined(1.2, 0.3, 0.1, **o)])  # fmt: skip
@pytest.mark.parametrize("chunk", [None, 3])
def test_a_straight_gradient_is_that_of_no_margin_at_the_same_value(kind, chunk):
    x, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    heads = [ClassHead(3, 4, kind(gradient=g), 8.0, chunk=chunk) for g in ("exact", "straight")]
    values = [head(x, y) for head in heads]
    assert torch.allclose(*values)
    exact, straight = (torch.autograd.grad(v, head.weight)[0] for v, head in zip(values, heads))
    assert not torch.allclose(exact, straight, atol=1e-4)
    # By hand: d loss / d cosine is scale (p - one hot) / n, with p of the logits with their margin.
    head = heads[0]
    logits = head.margin_logits(x, y).detach()
    blame = (logits.softmax(1) - F.one_hot(y, 3)) * 8.0 / 6
    cosines = F.normalize(x, dim=1) @ F.normalize(head.weight, dim=1).T
    assert torch.allclose(torch.autograd.grad((blame * cosines).sum(), head.weight)[0], straight, atol=1e-5)


SCRIPT = """
import sys, torch, torch.distributed as dist
from torch.nn import functional as F
from lineament.losses import InfoNCE, Queue
from test_contrastive_negatives import JOINED, SHARDED, batch, gradients

dist.init_process_group("gloo")
rank = dist.get_rank()
loss = InfoNCE(0.2, queue=Queue(10, 4))
keys = F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
for step in range(2):
    own = keys[rank * 3 : rank * 3 + 3].roll(step, 0)
    loss(own, own)
queue = loss.queue
found = {}
for name, (made, sizes) in JOINED.items():
    start = sum(sizes[:rank])
    value, grads = gradients(made(), *batch(name, slice(start, start + sizes[rank])))
    for each in (value, *grads):
        dist.all_reduce(each)
    found[name] = [value / 2, *(grad / 2 for grad in grads)]  # as DistributedDataParallel averages
divided = {}
for name, made in SHARDED.items():
    loss = made()
    head = getattr(loss, "head", loss)
    head.shard()
    for step in range(2):
        start = rank * 3  # three samples, and five
        value, (weight, rows) = gradients(loss, *batch("unpg", slice(start, 3 if rank == 0 else 8)))
        dist.all_reduce(weight)
    divided[name] = [value, weight / 2, rows.full_tensor()]
    if name == "cosface":
        import torch.distributed.checkpoint as dcp
        dcp.save({"weight": head.weight}, checkpoint_id=sys.argv[1] + "saved")
        divided["rows"], divided["logits"] = len(head.weight.to_local()), head.eval().logits(torch.eye(4))
torch.save((queue.rows, queue.pointer, found, divided), sys.argv[1] + str(rank))
dist.destroy_process_group()
"""


# What a loss over all pairs is made by, and the samples that each of two processes has.
JOINED = {
    "supcon": (lambda: SupCon(0.2), (3, 5)),
    "nt-xent": (lambda: NTXent(0.2), (5, 3)),
    "unpg": (lambda: UNPG(ClassHead(4, 4, chunk=None, scale=8.0, seed=1)), (4, 4)),
    "unpg, chunks": (lambda: UNPG(ClassHead(4, 4, CosFace(0.2), scale=8.0, seed=1)), (4, 4)),
    "unpg, circle": (lambda: UNPG(ClassHead(4, 4, scale=8.0, seed=1), aux="circle"), (4, 4)),
}


# Heads that are divided among two processes; of five classes the last has fewer.
SHARDED = {
    "cosface": lambda: ClassHead(5, 4, CosFace(0.2), scale=8.0, seed=1),
    "elastic, by rank": lambda: ClassHead(5, 4, Elastic("arc", 0.3, 0.1, match="rank"), scale=8.0, seed=1),
    "norms": lambda: ClassHead(4, 4, MagFace((0.1, 0.3)), scale=8.0, reduction="sum", seed=1),
    "sampled": lambda: ClassHead(40, 4, CosFace(0.2), scale=8.0, sample=0.3, seed=1),
    "sampled, none of the second's": lambda: ClassHead(40, 4, scale=8.0, sample=0.1, seed=1),
    "pairs": lambda: UNPG(ClassHead(5, 4, CosFace(0.2), scale=8.0, seed=1)),
}


def batch(name, rows=slice(None)):
    """Some of eight samples, two views of each for a loss that compares those."""
    x = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(3))
    if name == "nt-xent":
        return (x[:, rows].flatten(0, 1),)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 3])
    return (x[:, rows].flatten(0, 1), labels[rows]) if name == "supcon" else (x[0, rows], labels[rows])


def gradients(loss, x, *labels):
    """The loss of a linear encoder and its gradients."""
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(4)).requires_grad_()
    value = loss(x @ weight.T, *labels)
    return value.detach(), torch.autograd.grad(value, [weight, *loss.parameters()])


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes found: the queue, its pointer, and losses with gradients."""
    tmp_path = tmp_path_factory.mktemp("two")
    (tmp_path / "two.py").write_text(SCRIPT)
    paths = [str(Path(__file__).parent), *(str(Path(p).resolve()) for p in sys.path if p)]
    around = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    around |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    runs = [
        subprocess.Popen([sys.executable, "two.py", str(tmp_path / "q")], cwd=tmp_path, env={**around, "RANK": str(rank)})
        for rank in range(2)
    ]  # fmt: skip
    assert [run.wait(100) for run in runs] == [0, 0]
    return [*(torch.load(tmp_path / f"q{rank}") for rank in range(2)), tmp_path / "qsaved"]


@pytest.mark.parametrize("name", JOINED)
def test_pairs_of_all_processes_give_what_one_process_gives(two_processes, name):
    value, grads = gradients(JOINED[name][0](), *batch(name))
    for found in (two_processes[0][2], two_processes[1][2]):
        torch.testing.assert_close(found[name], [value, *grads], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SHARDED)
def test_a_head_in_two_processes_is_the_head_in_one(two_processes, name):
    loss = SHARDED[name]()
    for _ in range(2):  # the second step's draws are another's
        value, grads = gradients(loss, *batch("unpg"))
    for found in (two_processes[0][3], two_processes[1][3]):
        torch.testing.assert_close(found[name], [value, *grads], rtol=1e-5, atol=1e-6)


def test_a_divided_head_is_opened_by_one_process(two_processes):
    import torch.distributed.checkpoint as dcp

    head = SHARDED["cosface"]()
    whole, state = head.weight.detach().clone(), {"weight": torch.zeros(5, 4)}
    dcp.load(state, checkpoint_id=two_processes[2])
    assert state["weight"].equal(whole) and [found[3]["rows"] for found in two_processes[:2]] == [3, 2]
    for found in two_processes[:2]:
        torch.testing.assert_close(found[3]["logits"], head.eval().logits(torch.eye(4)))
    for odd, words in (
        (ClassHead(4, 4, sample=0.5, sparse=True), "sparse: rows"),
        (ClassHead(4, 4, reduction="none"), "'none' has no loss"),
    ):
        with pytest.raises(InputError, match=words):
            shard(odd, mesh=object())


def test_a_queue_takes_the_keys_of_all_processes(two_processes):
    (a, at, *_), (b, bt, *_) = two_processes[:2]
    keys = unit(6, 4)
    assert a.equal(b) and int(at) == int(bt) == 12 % 10
    turned = torch.cat([keys[:3].roll(1, 0), keys[3:].roll(1, 0)])
    expected = torch.cat([turned[4:], keys[2:], turned[:4]])
    assert torch.allclose(a, expected)
