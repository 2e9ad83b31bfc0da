"""Training: planted atoms are found, killed trainings go on with the same bits, units do not matter, and the controls are what they say."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import free_port
from torch import Tensor, nn

from lineament.core.checks import InputError
from lineament.dictionaries import trainer
from lineament.dictionaries.autoencoders import BatchTopK, Gated, JumpReLU, Neurons, ReLU, TopK
from lineament.dictionaries.end_to_end import train_end_to_end
from lineament.dictionaries.evaluation import evaluate
from lineament.dictionaries.metrics import error_metrics, usage
from lineament.dictionaries.selection import Selection
from lineament.dictionaries.trainer import TrainingOptions, geometric_median, initialise
from lineament.dictionaries.training import train_dictionary

D, ATOMS = 16, 14
FAST = TrainingOptions(dead_tokens=2000)
KINDS: dict[str, Any] = {
    "topk": lambda: TopK(D, 32, k=2),
    "batchtopk": lambda: BatchTopK(D, 32, k=2),
    "relu": lambda: ReLU(D, 32),
    "gated": lambda: Gated(D, 32),
    "jumprelu": lambda: JumpReLU(D, 32, bandwidth=0.3),
}


@pytest.fixture(scope="module")
def planted() -> tuple[nn.Module, tuple[Tensor, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(ATOMS, D, generator=generator)
    atoms /= atoms.norm(dim=1, keepdim=True)
    on = torch.rand(3000, ATOMS, generator=generator) < 0.1
    x = (on * (1 + torch.rand(3000, ATOMS, generator=generator))) @ atoms
    torch.manual_seed(0)
    return nn.Sequential(nn.Identity(), nn.Linear(D, 4)), (x, torch.arange(3000) % 4), atoms


def trained(planted: Any, dictionary: Any, **options: Any) -> Any:
    net, data, _ = planted
    plan = {"tokens": 30_000, "batch_size": 100, "learning_rate": 5e-3, "options": FAST, **options}
    return train_dictionary(net, data, site="0", dictionary=dictionary, **plan)


@pytest.mark.parametrize("kind", KINDS)
def test_it_explains_what_was_planted(planted: Any, kind: str, tmp_path: Any) -> None:
    torch.manual_seed(9)  # the global state does not matter
    sparsity = {"relu": 0.3, "gated": 0.3, "jumprelu": 0.03}.get(kind)
    found = trained(planted, KINDS[kind](), options=replace(FAST, sparsity=sparsity))
    sae, x = found.dictionary, planted[1][0]
    codes = sae.codes(x)
    assert error_metrics(x, sae.decode(codes))["fvu"] < 0.35 and usage(codes)["l0"] < 8, usage(codes)["l0"]
    assert torch.allclose(sae.atoms.norm(dim=1), torch.ones(32), atol=1e-4)
    assert found.tokens == 30_000 and found.history[-1].fvu < 0.6 * found.history[0].fvu
    assert sae.info["training"]["tokens"] == 30_000 and sae.site == "0"
    sae.save_pretrained(tmp_path)
    again = type(sae).from_pretrained(tmp_path)
    assert torch.equal(again.encode(x[:5]), sae.encode(x[:5])) and again.info == sae.info
    if kind == "topk":
        best = (sae.atoms @ planted[2].T).amax(0)
        assert (best > 0.9).float().mean() > 0.6
        assert "history" in found.to_dict() and found.plot() is not None


def test_one_harvest_for_several_gives_what_each_gives_alone(planted: Any) -> None:
    makers = (lambda: TopK(D, 32, k=2), lambda: TopK(D, 32, k=3, selection=Selection(beta=2.0)))
    short: dict[str, Any] = {"tokens": 5000, "gradient": "sampled"}
    together = trained(planted, [make() for make in makers], **short)
    for found, make in zip(together, makers):
        alone = trained(planted, make(), **short)
        assert torch.equal(found.dictionary.W_dec, alone.dictionary.W_dec)
    other = trained(planted, makers[0](), **{**short, "seed": 1})
    assert not torch.equal(together[0].dictionary.W_dec, other.dictionary.W_dec)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "relu"])
def test_a_killed_training_goes_on_with_the_same_bits(
    planted: Any, tmp_path: Any, kind: str, monkeypatch: Any
) -> None:
    short: dict[str, Any] = {
        "tokens": 1200,
        "gradient": "labels",
        "options": TrainingOptions(dead_tokens=300, ema=0.9),
    }
    whole = trained(planted, KINDS[kind](), **short)
    from lineament.core.checkpoint import Checkpoint
    from lineament.dictionaries import trainer

    loop, step = Checkpoint.loop, trainer.Trainer.step
    monkeypatch.setattr(Checkpoint, "loop", lambda self, *a, **o: loop(self, *a, **{**o, "every": 3}))

    def killed(self: Any, rows: Any, number: int, steps: int) -> None:
        if number == 7:
            raise KeyboardInterrupt
        step(self, rows, number, steps)

    monkeypatch.setattr(trainer.Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(planted, KINDS[kind](), checkpoint=tmp_path / "run", **short)
    seen = []

    def counted(self: Any, rows: Any, number: int, steps: int) -> None:
        seen.append(number)
        step(self, rows, number, steps)

    monkeypatch.setattr(trainer.Trainer, "step", counted)
    again = trained(planted, KINDS[kind](), checkpoint=tmp_path / "run", **short)
    assert seen[0] == 6 and not (tmp_path / "run").exists()
    for (name, one), (_, other) in zip(
        whole.dictionary.state_dict().items(), again.dictionary.state_dict().items()
    ):
        assert torch.equal(one, other), name
    assert [m.fvu for m in whole.history] == [m.fvu for m in again.history]


def test_units_do_not_matter(planted: Any) -> None:
    """x times c trains the same dictionary times c: the gradient that ranks is divided by what x is multiplied by."""
    net, (x, y), _ = planted
    c = 8.0
    wide = nn.Sequential(nn.Identity(), nn.Linear(D, 4))
    with torch.no_grad():
        wide[1].weight.copy_(net[1].weight / c)
        wide[1].bias.copy_(net[1].bias)
    plan: dict[str, Any] = {"tokens": 3000, "gradient": "labels"}
    one = trained(planted, TopK(D, 32, k=2), **plan).dictionary
    other = trained((wide, (c * x, y), None), TopK(D, 32, k=2), **plan).dictionary
    assert torch.allclose(one.W_dec, other.W_dec, atol=1e-4)
    assert torch.allclose(c * one.b_dec, other.b_dec, atol=1e-3)
    assert torch.isclose(
        torch.tensor(one.selection.influence_scale), torch.tensor(c * other.selection.influence_scale)
    )


def test_a_zero_beta_and_no_gradient_are_one(planted: Any) -> None:
    plain = trained(planted, TopK(D, 32, k=2), tokens=3000)
    zero = trained(planted, TopK(D, 32, k=2, selection=Selection(beta=0.0)), tokens=3000, gradient="labels")
    aware = trained(planted, TopK(D, 32, k=2), tokens=3000, gradient="labels")
    assert torch.equal(plain.dictionary.W_enc, zero.dictionary.W_enc)
    assert not torch.equal(plain.dictionary.W_enc, aware.dictionary.W_enc)


@pytest.mark.parametrize("control", ["shuffled", "random"])
def test_controls_keep_the_sizes_of_gradients(planted: Any, control: str) -> None:
    from lineament.dictionaries.harvest import harvest
    from lineament.dictionaries.trainer import Trainer
    from lineament.train.processes import OneProcess

    net, data, _ = planted
    rows = next(harvest(net, data, site="0", gradient="labels").batches(100))
    about = {"site": "0", "gradient": "labels", "seed": 0, "tokens": 100, "learning_rate": "auto"}
    made = [
        Trainer(TopK(D, 32, k=2), rows, TrainingOptions(control=c), about, 0, OneProcess(torch.device("cpu")))
        for c in (None, control)
    ]
    true, changed = (trainer._gradient(rows, 3) for trainer in made)
    assert not torch.allclose(true, changed)
    sizes, others = true.norm(dim=1), changed.norm(dim=1)
    assert torch.allclose(sizes.sort().values, others.sort().values, rtol=1e-4)
    assert torch.allclose(sizes, others, rtol=1e-4) == (control == "random")


def test_a_frozen_decoder_stays(planted: Any) -> None:
    sae = TopK(D, 32, k=2)
    initialise(sae, planted[1][0])
    found = trained(planted, sae, tokens=2000, options=TrainingOptions(frozen=("W_dec",)))
    assert torch.equal(found.dictionary.atoms, sae.atoms) and not torch.equal(
        found.dictionary.W_enc, sae.W_enc
    )


def test_the_dead_are_counted_in_tokens(planted: Any) -> None:
    sae = TopK(D, 32, k=2)
    initialise(sae, planted[1][0])
    with torch.no_grad():
        sae.b_enc[:5] = -1e3
    quiet = TrainingOptions(dead_tokens=1000, alpha=0.0, warmup=0.0)
    assert trained(planted, sae, tokens=1000, options=quiet).dead == 0
    assert trained(planted, sae, tokens=1500, options=quiet).dead >= 5 / 32


def test_dictionary_learning_s_trainer_step_by_step(planted: Any) -> None:
    """20 steps with beta = 0 beside TopKTrainer's equations (dictionary_learning), written out with autograd and PyTorch's Adam.

    Its loss is the mean squared error of a row; ours is that over a constant, which Adam does not see when nothing is clipped and eps is 0.
    """
    net, (x, y), _ = planted
    start = TopK(D, 32, k=3)
    initialise(start, x)
    options = TrainingOptions(clip=None, warmup=0.0, decay=0.0, eps=1e-30, dead_tokens=10**9)
    found = train_dictionary(
        net,
        (x, y),
        site="0",
        dictionary=start.double(),
        tokens=20 * 250,
        batch_size=250,
        learning_rate=1e-3,
        options=options,
    ).dictionary
    from lineament.dictionaries.harvest import harvest

    w_enc, b_enc, w_dec, bias = (
        nn.Parameter(p.detach().double().clone())
        for p in (start.W_enc, start.b_enc, start.W_dec, start.b_dec)
    )
    first = next(harvest(net, (x, y), site="0").batches(1024)).x
    scale = (D / float((first - first.mean(0)).double().square().sum(1).mean())) ** 0.5
    with torch.no_grad():
        b_enc *= scale
        bias *= scale
    adam = torch.optim.Adam([w_enc, b_enc, w_dec, bias], lr=1e-3, eps=1e-30)
    stream = harvest(net, (x, y), site="0").batches(250, passes=None)
    for _ in range(20):
        batch = next(stream).x.double() * scale
        post = ((batch - bias) @ w_enc.T + b_enc).relu()
        values, places = post.topk(3, sorted=False)
        f = torch.zeros_like(post).scatter(-1, places, values)
        loss = (batch - (f @ w_dec + bias)).square().sum(-1).mean()
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            w_dec.grad -= (w_dec.grad * w_dec).sum(1, keepdim=True) * w_dec
        adam.step()
        with torch.no_grad():
            w_dec /= w_dec.norm(dim=1, keepdim=True)
    assert torch.allclose(found.W_enc, w_enc, atol=1e-7) and torch.allclose(found.W_dec, w_dec, atol=1e-7)
    assert torch.allclose(found.b_enc, b_enc / scale, atol=1e-7) and torch.allclose(
        found.b_dec, bias / scale, atol=1e-7
    )


def test_the_geometric_median_ignores_outliers() -> None:
    x = torch.cat([torch.randn(99, 3), torch.full((1, 3), 1e4)])
    assert geometric_median(x).norm() < 1


class TestRefused:
    def test_dictionaries(self, planted: Any) -> None:
        long = TopK(D, 32, k=2)
        initialise(long, planted[1][0])
        with torch.no_grad():
            long.W_dec.mul_(2)
        for dictionary, match in (
            (TopK(D + 1, 32, k=2), f"made for {D + 1} dimensions, and '0' has {D}"),
            (Neurons(D), "Neurons, which is not trained by steps"),
            (long, "atoms of norm 2 to 2, expected 1"),
            ([], "dictionary: got none"),
        ):
            with pytest.raises(InputError, match=match):
                trained(planted, dictionary)

    def test_sites_and_gradients(self, planted: Any) -> None:
        net, (x, y), _ = planted
        with pytest.raises(InputError, match="nothing varies at '0'"):
            trained((net, (torch.ones_like(x), y), None), TopK(D, 32, k=2))
        with pytest.raises(InputError, match="gradient: is zero in all of"):
            trained(planted, TopK(D, 32, k=2), gradient=lambda logits, batch: 0 * logits.sum())
        with pytest.raises(InputError, match=r"gradient: got 'lables'.*nearest: 'labels'"):
            trained(planted, TopK(D, 32, k=2), gradient="lables")
        with pytest.raises(InputError, match="frozen: got 'W_decoder'"):
            trained(planted, TopK(D, 32, k=2), options=TrainingOptions(frozen=("W_decoder",)))


TWO = """
import os, sys
import torch
from torch import nn
from lineament.dictionaries.autoencoders import BatchTopK, TopK
from lineament.dictionaries.selection import Selection
from lineament.dictionaries.trainer import TrainingOptions
from lineament.dictionaries.training import train_dictionary

torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Identity(), nn.Linear(12, 4))
x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
kinds = [TopK(12, 24, k=2), TopK(12, 24, k=2, selection=Selection(beta=0.0)), BatchTopK(12, 24, k=2)]
found = train_dictionary(
    net, (x, torch.arange(64) % 4), site="0", dictionary=kinds, tokens=64 * 12, batch_size=64, gradient="labels",
    learning_rate=5e-3, options=TrainingOptions(dead_tokens=10**6),
)
torch.save([f.dictionary.state_dict() for f in found], f"{sys.argv[1]}/{os.environ.get('RANK', 'alone')}.pt")
"""


@pytest.mark.slow
def test_two_processes_have_the_weights_of_one_on_the_joint_batch(tmp_path: Any) -> None:
    (tmp_path / "two.py").write_text(TWO)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    plain = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    shared = {**plain, **address, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "two.py"), str(tmp_path)], env=env, stderr=subprocess.PIPE
        )
        for env in (plain, *({**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(2)))
    ]
    for process in started:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said.decode()[-2000:]
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("alone", "0", "1"))
    for kind, (one, two, joint) in enumerate(zip(first, second, alone)):
        for name, value in one.items():
            assert torch.equal(value, two[name]), (kind, name)
            if kind < 2:  # a pool of one process is half of the joint one
                assert torch.allclose(value, joint[name], atol=2e-5), (kind, name)


@pytest.mark.parametrize("reconstruction", [0.0, 0.1])
def test_end_to_end_keeps_what_answers_see(planted: Any, reconstruction: float) -> None:
    """Where answers see 4 of 16 dimensions its KL is below that of as long a training on activations, whose variance it explains worse."""
    _, data, _ = planted
    net = nn.Sequential(nn.Identity(), nn.Linear(D, 4))
    with torch.no_grad():
        net[1].weight.copy_(3 * torch.eye(4, D))
    before = [p.clone() for p in net.parameters()]
    plan: dict[str, Any] = {"tokens": 20_000, "batch_size": 100, "learning_rate": 5e-3, "options": FAST}
    found = train_end_to_end(
        net, data, site="0", dictionary=TopK(D, 32, k=1), reconstruction=reconstruction, **plan
    )
    plain = train_dictionary(net, data, site="0", dictionary=TopK(D, 32, k=1), **plan)
    ours, other = evaluate(net, [found.dictionary, plain.dictionary], data, mode="activation")
    assert ours.kl < 0.8 * other.kl and ours.fvu > other.fvu
    assert found.tokens == 20_000 and found.history[-1].fvu < found.history[0].fvu
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
    assert found.dictionary.info["training"]["loss"] == "end to end" and found.dictionary.site == "0"


def test_end_to_end_on_tokens_leaves_special_ones_as_they_are() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))
    ids = torch.randint(1, 20, (40, 6))
    ids[:, 0] = 0
    options = replace(FAST, exclude=[0], dead_tokens=100)
    found = train_end_to_end(
        net,
        ids,
        site="0",
        dictionary=TopK(8, 16, k=2),
        tokens=400,
        batch_size=50,
        learning_rate=5e-3,
        options=options,
    )
    assert found.tokens == 400, "five rows of each sequence"


def test_end_to_end_refuses() -> None:
    net = nn.Sequential(nn.Identity(), nn.Linear(4, 3))
    x = torch.randn(8, 4)
    with pytest.raises(InputError, match="got ReLU, whose sparsity needs a penalty"):
        train_end_to_end(net, x, site="0", dictionary=ReLU(4, 8), tokens=8)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="made for 5 dimensions"):
        train_end_to_end(net, x, site="0", dictionary=TopK(5, 8, k=1), tokens=8)
    with pytest.raises(InputError, match="walked in order"):
        train_end_to_end(net, [x], site="0", dictionary=TopK(4, 8, k=1), tokens=8)


def test_a_full_disk_leaves_the_last_checkpoint_whole(planted: Any, tmp_path: Any, monkeypatch: Any) -> None:
    """The write that finds no room fails; what was stored before it is what a second run goes on from, to the same bits."""
    from lineament.core import checkpoint

    plan: dict[str, Any] = {"tokens": 1200, "gradient": "labels"}
    whole = trained(planted, TopK(D, 32, k=2), **plan)
    loop, write = checkpoint.Checkpoint.loop, Path.write_bytes
    monkeypatch.setattr(
        checkpoint.Checkpoint, "loop", lambda self, *a, **o: loop(self, *a, **{**o, "every": 3})
    )
    written = []

    def full(self: Path, content: bytes) -> int:
        written.append(self)
        if len(written) < 3:
            return write(self, content)
        write(self, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        trained(planted, TopK(D, 32, k=2), checkpoint=tmp_path / "run", **plan)
    monkeypatch.setattr(Path, "write_bytes", write)
    seen = []
    step = trainer.Trainer.step
    monkeypatch.setattr(
        trainer.Trainer, "step", lambda self, rows, at, steps: (seen.append(at), step(self, rows, at, steps))
    )
    again = trained(planted, TopK(D, 32, k=2), checkpoint=tmp_path / "run", **plan)
    assert seen[0] == 6, "two stores of three steps were whole"
    for name, value in whole.dictionary.state_dict().items():
        assert torch.equal(value, again.dictionary.state_dict()[name]), name


@pytest.mark.parametrize(("gradient", "width"), [(None, 33), ("labels", 34)])
def test_out_of_memory_halves_the_chunk_and_not_the_batch(
    planted: Any, gradient: Any, width: int, monkeypatch: Any
) -> None:
    plan: dict[str, Any] = {"tokens": 600, "gradient": gradient}
    expected = trained(planted, TopK(D, width, k=2), **plan)
    product, sizes = torch.addmm, []

    def small(bias: Tensor, x: Tensor, weights: Tensor, **o: Any) -> Tensor:
        sizes.append(len(x))
        if len(x) > 40:
            raise torch.OutOfMemoryError("out of memory")
        return product(bias, x, weights, **o)

    monkeypatch.setattr(torch, "addmm", small)
    found = trained(planted, TopK(D, width, k=2), **plan)
    failed = [size for size in sizes if size > 40]
    assert failed == [256, 128, 64], "halved at the start, and what fitted is remembered"
    assert set(sizes[3:]) == {32, 4}, "a batch of 100 rows stays one, in chunks"
    assert found.tokens == 600 and len(found.history) == len(expected.history)
    for name, value in expected.dictionary.state_dict().items():
        assert torch.allclose(value, found.dictionary.state_dict()[name], atol=1e-6), name
