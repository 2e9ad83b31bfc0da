"""Dataset condensation: closed forms of the matching losses, augmentation, networks, schedules, chunks, resuming, saved sets, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError
from lineament.learn import (
    Condensation,
    Condensed,
    condense,
    condensed_sets,
    convnet,
    herding,
    k_centers,
    k_means,
    matching_loss,
)
from lineament.learn.condensation.halving import Halving
from lineament.learn.condensation.learning import learn_pictures
from lineament.learn.condensation.matching import matched, real_gradient
from lineament.learn.condensation.networks import ACTIVATIONS, NORMS, POOL, POOLINGS, network
from lineament.learn.condensation.options import interpolated_loops
from lineament.learn.condensation.siamese import DSA, WORDS, Strategy
from lineament.load import load_data

QUICK = Condensation(outer=2, inner=2, epochs=2, batch_real=8)
X = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(30) % 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 3)
    )


def linear(classes: int = 3, size: int = 5) -> nn.Module:
    net = nn.Linear(size, classes, bias=False).double()
    nn.init.zeros_(net.weight)
    return net


def test_what_all_classes_share_cancels_in_the_summed_loss_only():
    net, means = linear(), torch.randn(3, 5, dtype=torch.float64, generator=generator())
    shared = 7 * torch.randn(5, dtype=torch.float64, generator=generator(1))
    real, labels = [m[None] for m in means], torch.arange(3)
    assert matching_loss(net, means + shared, labels, real, summed=True).item() < 1e-4
    assert matching_loss(net, means + shared, labels, real, summed=False).item() > 0.1
    assert (
        matching_loss(net, 3 * means, labels, real, summed=False).item() < 1e-4
    )  # each class's rows are parallel


def test_of_one_group_of_one_class_both_losses_are_the_same():
    net = tiny()
    real, mine, labels = [X[:6]], X[6:8], torch.zeros(2, dtype=torch.long)
    one, other = (matching_loss(net, mine, labels, real, summed=summed) for summed in (True, False))
    assert one.item() == pytest.approx(other.item(), abs=1e-6)


@pytest.mark.parametrize("kind", ["rows", "squares", "cosine"])
def test_the_derivative_is_right_and_chunks_change_nothing(kind):
    net = tiny().double()
    x, y = X[:6].double(), torch.arange(6) % 3
    weights = [p for p in net.parameters() if p.ndim > 1 or kind != "rows"]
    goal = real_gradient(net, weights, [X[6 + c : 24 : 3].double() for c in range(3)], range(3))
    value, slope, small = matched(net, weights, x, y, goal, kind=kind)
    for chunk in (1, 4):
        again = matched(net, weights, x, y, goal, kind=kind, chunk=chunk)
        assert torch.allclose(again[0], value, rtol=1e-12) and torch.allclose(
            again[1], slope, rtol=1e-9, atol=1e-12
        )
    step = torch.zeros_like(x)
    step[2, 0, 3, 3] = 1e-5
    ends = [matched(net, weights, x + s, y, goal, kind=kind)[0] for s in (step, -step)]
    assert ((ends[0] - ends[1]) / 2e-5).item() == pytest.approx(slope[2, 0, 3, 3].item(), rel=1e-4, abs=1e-9)
    whole = matching_loss(net, x, y, [X[6 + c : 24 : 3].double() for c in range(3)], kind=kind)
    assert whole.item() == pytest.approx(value.item(), rel=1e-9) and small.item() == 0


def test_a_set_that_is_the_real_batch_has_no_loss():
    net = tiny().double()
    real = [X[c::3].double() for c in range(3)]
    labels = torch.arange(3).repeat_interleave(10)
    for summed in (True, False):
        x = torch.cat(real).requires_grad_()
        loss = matching_loss(net, x, labels, real, summed=summed, eps=1e-16)
        assert abs(loss.item()) < 1e-6 and torch.autograd.grad(loss, x)[0].abs().max() < 1e-5


@pytest.mark.parametrize("word", WORDS)
def test_each_augmentation_is_shared_and_differentiable(word):
    x = torch.rand(4, 3, 9, 8, generator=generator(), requires_grad=True)
    for strategy in (Strategy(word), Strategy(word, align_corners=True)):
        both = strategy(torch.cat([x, x]), generator(3))
        if word != "noise":
            assert torch.equal(both, torch.cat([strategy(x, generator(3))] * 2))
        assert torch.autograd.grad(both.sum(), x)[0].isfinite().all()
        each = strategy(x[:1].expand(40, -1, -1, -1), generator(3), each=True)
        assert len(each.flatten(1).unique(dim=0)) > 1
        one = strategy(x[:1], generator(5), each=True)
        if word != "noise":
            assert torch.allclose(one, strategy(x[:1], generator(5)))


def test_mode_m_applies_all_and_mode_s_one():
    x = torch.rand(1, 1, 8, 8, generator=generator())
    assert torch.equal(
        Strategy("flip_brightness", "M")(x, generator(1)), Strategy("flip_brightness", "M")(x, generator(1))
    )
    found = {int((Strategy("flip_crop")(x, generator(k)) == x).all()) for k in range(20)}
    assert found == {0, 1}


def test_the_old_augmentation_draws_one_change_a_picture_and_turns_far():
    x = torch.rand(60, 1, 8, 8, generator=generator())
    found = Strategy("flip_noise", "old")(x, generator(1), each=True)
    same, mirrored = ((found - y).flatten(1).abs().amax(1) < 0.1 for y in (x, x.flip(3)))
    assert (
        same | mirrored
    ).all() and 5 < mirrored.sum() < 30  # half are flipped with half a chance, the others get noise
    bar = torch.zeros(1, 1, 33, 33)
    bar[..., 16, :] = 1

    def turn(mode):
        turned = Strategy("rotate", mode)(bar.expand(200, -1, -1, -1), generator(2), each=True)
        rows = turned[:, 0, :, 22].argmax(1) - 16  # of the bar, 6 beside the middle
        return torch.atan(rows.abs().max() / 6.0).rad2deg()

    assert turn("S") < 22 and 35 < turn("old") < 50


@pytest.mark.parametrize("name", POOL)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 13, 20)])
def test_every_network_at_any_size_tells_pictures_apart(name, shape):
    x = torch.rand(2, *shape, generator=generator())
    for norm in ("instance", "batch"):
        net = network(name, shape, 4, norm=norm, seed=0)
        assert net.training
        found = net.eval()(x)
        assert found.shape == (2, 4) and (found[0] - found[1]).abs().max() > 1e-6
    first, second = (network(name, shape, 4, seed=k).state_dict() for k in (0, 1))
    assert any(not torch.equal(first[k], second[k]) for k in first)


def test_variants_of_the_convnet():
    for norm in NORMS:
        for activation in ACTIVATIONS:
            for pooling in POOLINGS:
                net = convnet(
                    (2, 8, 8), 3, width=8, depth=2, norm=norm, activation=activation, pooling=pooling, seed=0
                )
                assert net(torch.rand(2, 2, 8, 8)).shape == (2, 3)
    assert convnet((1, 28, 28), 10, first_padding=3)[-1].in_features == 128 * 16
    for bad in ({"depth": 4}, {"norm": "batchnorm"}, {"pooling": "sum"}):
        with pytest.raises(InputError):
            convnet((1, 8, 8), 3, **bad)


def test_the_gate_between_class_by_class_and_summed():
    told = Condensation(outer=4, inner=4, epochs=0, outer_warmup=2, inner_warmup=3)
    assert [[told.summed(o, i) for i in range(4)] for o in (0, 1, 2)] == [[False] * 3 + [True]] * 2 + [
        [True] * 4
    ]
    published = Condensation().resolved(50, 10)
    assert (published.outer_warmup, published.inner_warmup) == (250, 10)
    assert published.summed(0, 10) and not published.summed(249, 9) and published.summed(250, 0)
    assert [interpolated_loops(n) for n in (1, 5, 25, 60)] == [(10, 5), (10, 25), (25, 22), (50, 10)]


def test_the_scaled_rate_makes_up_for_a_sum_of_distances():
    told = Condensation(rate="scaled")
    assert told.rate_of(9, 9) == pytest.approx(0.1) and told.rate_of(9, 1) == pytest.approx(0.3)
    assert Condensation(rate="paper").rate_of(10, 1) == 0.1 and Condensation(rate=0.3).rate_of(10, 1) == 0.3


def test_a_step_of_the_scaled_rate_moves_small_pictures_little_and_others_by_the_rate():
    def moved(rate: float | str) -> torch.Tensor:
        how = replace(QUICK, outer=1, inner=1, outer_warmup=0, inner_warmup=0, rate=rate)
        net = partial(convnet, (1, 8, 8), 3, width=8, depth=2)
        made = condense(X, Y, per_class=2, method="dcc", network=net, options=how)
        return ((made.pictures - made.start) / made.std[0]).flatten(1).square().mean(1).sqrt()

    steep, flat = 0.1 * 3**0.5, 1e-3
    assert (moved(steep) > 0.006).any() and torch.allclose(
        moved(flat) / flat, moved(steep) / steep, rtol=1e-2
    )
    assert torch.allclose(moved("scaled"), moved(steep).clamp(max=0.005), rtol=1e-3)


def test_groups_of_classes_lie_between_both_losses():
    start = {"network": tiny, "per_class": 2, "method": "dcc", "seed": 1}
    how = replace(QUICK, outer_warmup=0, inner_warmup=0, rate=0.1)
    each = condense(X, Y, **start, options=replace(how, groups=[[0], [1], [2]]))
    alone = condense(X, Y, **{**start, "method": "dc"}, options=replace(how))
    assert torch.allclose(each.pictures, alone.pictures)  # groups of one class are no sums
    for groups in ("random", "clustered", [[2, 0], [1]]):
        assert not torch.equal(
            condense(X, Y, **start, options=replace(how, groups=groups)).pictures, each.pictures
        )
    with pytest.raises(InputError, match="every class"):
        condense(X, Y, **start, options=replace(how, groups=[[0], [1]]))


def test_batch_norms_have_the_statistics_of_real_pictures_and_parity_only_moves_them():
    def normed() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
        )

    real = [X[c::3] for c in range(3)]
    seen = {}
    for parity in (False, True):
        nets = [normed()]
        nets[0].load_state_dict(
            {
                k: torch.full_like(v, 0.1) if v.is_floating_point() else v
                for k, v in nets[0].state_dict().items()
            }
        )
        before = nets[0][1].running_mean.clone()
        learn_pictures(lambda k, n=nets: n[0], X[:3], torch.arange(3), lambda o, i: real, Condensation(outer=1, inner=1, epochs=0, outer_warmup=0, inner_warmup=0, parity=parity))  # fmt: skip
        batch = nets[0][0](torch.cat(real)).mean((0, 2, 3))
        share = 0.1 if parity else 1.0
        assert torch.allclose(nets[0][1].running_mean, (1 - share) * before + share * batch, atol=1e-5)
        seen[parity] = nets[0][1].running_mean
    assert not torch.allclose(seen[True], seen[False])


@pytest.mark.parametrize("method", ["dsac", "dc"])
def test_a_run_that_was_killed_ends_in_the_same_bits(method, tmp_path, monkeypatch):
    from lineament.learn.condensation import learning

    how = {"per_class": 2, "method": method, "network": tiny, "options": replace(QUICK, outer=4)}
    whole = condense(X, Y, **how)
    calls = []
    original = learning._settle

    def killed(model, real, parity):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        original(model, real, parity)

    monkeypatch.setattr(learning, "_settle", killed)
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        held = Checkpoint(tmp_path / "run", {})
        loop = held.loop
        held.loop = lambda name, steps, state, **kw: loop(name, steps, state, every=1)
        condense(X, Y, **how, checkpoint=held)
    torch.manual_seed(6)
    again = condense(X, Y, **how, checkpoint=Checkpoint(tmp_path / "run", {}))
    assert torch.equal(again.pictures, whole.pictures) and torch.equal(again.trace, whole.trace)
    assert len(calls) == 6 + 4  # two finished networks were not done again


def test_it_goes_on_from_a_set_made_earlier_and_the_global_state_stays(tmp_path):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = condense(X, Y, per_class=1, method="dcc", network=tiny, options=QUICK)
    assert torch.equal(state, torch.get_rng_state())
    again = condense(
        X, Y, per_class=1, method="dcc", network=tiny, options=QUICK, start=first.save(tmp_path / "set")
    )
    assert torch.equal(again.start, first.pictures) and not torch.equal(again.pictures, first.pictures)
    noise = condense(X, Y, per_class=1, method="dcc", network=tiny, options=QUICK, start="noise")
    assert noise.start.std() > 0.1 and not torch.equal(noise.start, first.start)
    with pytest.raises(InputError, match="start: a set of"):
        condense(X, Y, per_class=2, network=tiny, options=QUICK, start=first)


def test_pictures_may_be_kept_in_range_and_bytes_become_the_unit_scale():
    how = {
        "per_class": 1,
        "method": "dcc",
        "network": tiny,
        "options": replace(QUICK, rate=50.0, in_range=True),
    }
    inside = condense((255 * X).to(torch.uint8), Y, **how)
    assert inside.top == 1.0 and inside.pictures.min() >= -1e-6 and inside.pictures.max() <= 1 + 1e-6
    outside = condense(255 * X, Y, **{**how, "options": replace(QUICK, rate=50.0)})
    assert outside.top == 255.0 and (outside.pictures.max() > 255 or outside.pictures.min() < 0)
    assert outside.as_bytes().dtype == torch.uint8 and outside.clamped().max() <= 255


def test_bfloat16_and_draws_of_each_picture():
    base = condense(X, Y, per_class=1, method="dcc", network=tiny, options=QUICK)
    half = condense(X, Y, per_class=1, method="dcc", network=tiny, options=replace(QUICK, bfloat16=True))
    change = (base.pictures - base.start).flatten()
    assert F.cosine_similarity(change, (half.pictures - half.start).flatten(), dim=0) > 0.95
    shared, own = (
        condense(X, Y, per_class=1, network=tiny, options=replace(QUICK, siamese=s)) for s in (True, False)
    )
    assert not torch.equal(shared.pictures, own.pictures)


def test_a_saved_set_is_an_ordinary_data_set(tmp_path):
    names = ("10", "2", "../x y")  # neither in the order of their names nor safe as folders
    made = condense(X, Y, per_class=2, method="random", classes=names)
    folder = made.save(tmp_path / "set")
    arrays = load_data(folder / "condensed.npz")
    assert (
        torch.equal(arrays.inputs, made.pictures)
        and torch.equal(arrays.targets, made.labels)
        and arrays.classes == names
    )
    pictures = load_data(folder / "pictures")
    assert torch.equal(pictures.targets, made.labels) and torch.equal(
        pictures.inputs[:, None], made.as_bytes()
    )
    assert all(p.is_relative_to(folder) for p in folder.rglob("*")) and len(list(folder.rglob("*.png"))) == 6
    pytest.importorskip("datasets")
    hub = load_data(folder / "dataset")
    assert torch.equal(hub.targets, made.labels) and hub.classes == names
    told = json.loads((folder / "condensed.json").read_text())
    assert told["method"] == "random" and told["mean"] == pytest.approx(made.mean.tolist())
    again = Condensed.load(folder)
    assert torch.equal(again.pictures, made.pictures) and again.classes == names
    (folder / "condensed.npz").write_bytes((folder / "condensed.npz").read_bytes()[:-9] + b"different")
    with pytest.raises(InputError, match="not the one"):
        Condensed.load(folder)
    with pytest.raises(InputError, match="condensed"):
        Condensed.load(tmp_path)


def test_coresets():
    x = torch.randn(20, 3, generator=generator())
    assert herding(x, 1) == [int((x - x.mean(0)).norm(dim=1).argmin())]
    assert sorted(k_centers(x, 20)) == sorted(k_means(x, 20)) == list(range(20))
    radius = [torch.cdist(x, x[k_centers(x, n)]).min(1).values.max().item() for n in (1, 3, 9)]
    assert radius == sorted(radius, reverse=True)


REFUSED = {
    "an empty class": ({"targets": torch.tensor([0, 2] * 15)}, "no picture is of class 1"),
    "too few": ({"per_class": 11}, "per_class: got 11"),
    "one class": ({"targets": torch.zeros(30, dtype=torch.long)}, "one class"),
    "names": ({"targets": ["a"] * 30}, "targets"),
    "negative": ({"targets": Y - 1}, "label -1"),
    "nan": ({"images": X.clone().index_fill_(0, torch.tensor([3]), float("nan"))}, "NaN"),
    "normalised": ({"images": X * 4 - 2}, "before they were normalised"),
    "16 bit": ({"images": (X * 60000).int()}, "65535"),
    "alpha": ({"images": X.expand(-1, 4, -1, -1)}, "alpha"),
    "channels last": ({"images": torch.rand(30, 8, 8, 3)}, "channels"),
    "sizes": ({"images": [X[0], X[1, :, :4]]}, "several sizes"),
    "no pictures": ({"images": torch.rand(30, 8)}, "height"),
    "method": ({"method": "dca"}, "nearest"),
    "network": ({"network": "convnet3"}, "nearest"),
    "no matrix": ({"network": lambda: _Scale()}, "two or more dimensions"),
    "outputs": ({"network": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 2))}, "one number a class"),
    "word": ({"options": replace(QUICK, strategy="color_crp")}, "crp"),
    "warm-up": ({"options": replace(QUICK, outer_warmup=3)}, "outer_warmup: got 3"),
    "inner warm-up": ({"options": replace(QUICK, inner_warmup=3)}, "inner_warmup: got 3"),
    "divergence": ({"options": replace(QUICK, rate=1e30), "network": "mlp"}, "diverged"),
    "a little too bright": ({"images": 1.2 * X / X.max()}, "clamp"),
    "start": ({"start": "reel"}, "start"),
}  # fmt: skip


class _Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x.mean((1, 2, 3))[:, None] * self.scale


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_condensed(name):
    given, words = REFUSED[name]
    call = {
        "images": X,
        "targets": Y,
        "per_class": 1,
        "method": "dcc",
        "network": tiny,
        "options": QUICK,
        **given,
    }
    with pytest.raises(InputError, match=words):
        condense(call.pop("images"), call.pop("targets"), **call)


def test_words_of_the_published_strategy():
    assert Strategy(DSA).words.split("_") == ["color", "crop", "cutout", "flip", "scale", "rotate"]


@pytest.mark.parametrize("shape", [(2, 8, 32, 32), (2, 8, 33, 32), (1, 2, 4, 4)])
def test_halving_is_average_pooling_with_all_derivatives(shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = []
    for pool in (Halving(), nn.AvgPool2d(2)):
        y = pool(x)
        (slope,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.pow(2).sum(), x)
        turned = torch.func.vmap(torch.func.jacrev(lambda x, pool=pool: pool(x[None]).pow(2).mean()))(
            x.detach()
        )
        found.append((y, slope, second, turned))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_sets_of_several_seeds_are_those_of_each():
    x, y = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
    told = {"per_class": 1, "method": "dcc", "network": "mlp", "options": QUICK}
    found = condensed_sets(x, y, seeds=(3, 5), jobs=2, **told)
    for seed, made in zip((3, 5), found):
        torch.testing.assert_close(made.pictures, condense(x, y, seed=seed, **told).pictures)
    assert not torch.equal(found[0].pictures, found[1].pictures)
    with pytest.raises(InputError, match=r"seeds: got \[1, 1\], expected each once"):
        condensed_sets(x, y, seeds=(1, 1), **told)
    with pytest.raises(InputError, match="checkpoint: is for one set"):
        condensed_sets(x, y, seeds=(1,), checkpoint=object(), **told)
