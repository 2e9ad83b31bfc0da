"""Neural-collapse metrics: closed forms, invariances, degenerate data, and models over loaders."""

from __future__ import annotations

import itertools
import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts.unchanged import unchanged
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lineament.core.checks import InputError
from lineament.measure.collapse.metrics import CollapseMeter, SecondLook, collapse_metrics
from lineament.measure.collapse.profile import collapse, find_head, pooled

seeds = st.integers(0, 10_000)


def clouds(seed: int, classes: int = 4, each: int = 12, width: int = 7, spread: float = 0.5):
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, width, generator=g, dtype=torch.float64) * 2
    y = torch.arange(classes).repeat_interleave(each)
    x = means[y] + spread * torch.randn(len(y), width, generator=g, dtype=torch.float64)
    return x, y


def simplex(classes: int, width: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(width, classes, generator=g, dtype=torch.float64))[0]
    return (torch.eye(classes, dtype=torch.float64) - 1 / classes) @ rotation.T


def textbook(x: torch.Tensor, y: torch.Tensor, weighting: str = "class") -> dict[str, float]:
    """The definitions, sample by sample, with the pseudo-inverse."""
    classes = int(y.max()) + 1
    means = torch.stack([x[y == k].mean(0) for k in range(classes)])
    share = torch.bincount(y).double() / len(y)
    if weighting == "class":
        share = torch.full((classes,), 1 / classes, dtype=torch.float64)
    center = share @ means
    within = sum(torch.outer(a - means[k], a - means[k]) for a, k in zip(x, y)) / len(x)
    between = sum(p * torch.outer(m - center, m - center) for p, m in zip(share, means))
    ratio = torch.trace(within @ torch.linalg.pinv(between, hermitian=True, rtol=1e-12)) / classes
    variance = [float((x[y == k] - means[k]).square().sum(1).mean()) for k in range(classes)]
    pairs = [
        (variance[k] + variance[j]) / (2 * float((means[k] - means[j]).square().sum()))
        for k in range(classes)
        for j in range(classes)
        if j != k
    ]
    return {
        "nc1": float(ratio),
        "nc1_tilde": float(torch.trace(within) / torch.trace(between)),
        "cdnv": float(np.mean(pairs)),
    }


@given(seeds, st.sampled_from(["class", "sample"]))
@settings(max_examples=15, deadline=None)
def test_nc1_in_every_form_is_the_textbooks(seed, weighting):
    x, y = clouds(seed)
    keep = torch.rand(len(y), generator=torch.Generator().manual_seed(seed)) < 0.7
    keep[[0, 12, 24, 36]] = True
    x, y = x[keep], y[keep]
    wanted = textbook(x, y, weighting)
    found = collapse_metrics(x, y, weighting=weighting)
    meter = CollapseMeter(weighting=weighting)
    for part in torch.arange(len(y)).split(5):
        meter.update(x[part], y[part])
    streamed = meter.compute()
    for metrics in (found, streamed):
        assert metrics.nc1 == pytest.approx(wanted["nc1"], rel=1e-8)
        assert metrics.nc1_tilde == pytest.approx(wanted["nc1_tilde"], rel=1e-11)
        assert metrics.cdnv == pytest.approx(wanted["cdnv"], rel=1e-10)


@given(seeds)
@settings(max_examples=15, deadline=None)
def test_what_each_metric_does_not_depend_on(seed):
    x, y = clouds(seed)
    g = torch.Generator().manual_seed(seed + 1)
    mix = torch.randn(7, 7, generator=g, dtype=torch.float64)
    rotation = torch.linalg.qr(mix)[0]
    plain = collapse_metrics(x, y)
    moved = collapse_metrics(3 * x @ rotation.T + 11, y)
    relabelled = collapse_metrics(x, torch.tensor([2, 0, 3, 1])[y])
    for name in ("nc1", "nc1_tilde", "cdnv", "nc2", "equinorm", "equiangle", "nearest_mean_accuracy"):
        assert getattr(moved, name) == pytest.approx(getattr(plain, name), rel=1e-8), name
        assert getattr(relabelled, name) == pytest.approx(getattr(plain, name), rel=1e-8), name


@given(seeds)
@settings(max_examples=15, deadline=None)
def test_nc1_sees_past_invertible_maps_where_the_means_span_the_features(seed):
    # With K - 1 features S_B is invertible; in more, the pseudo-inverse of A S_B Aᵀ is not A⁻ᵀ S_B⁺ A⁻¹.
    x, y = clouds(seed, width=3)
    g = torch.Generator().manual_seed(seed + 1)
    mix = torch.randn(3, 3, generator=g, dtype=torch.float64) + 3 * torch.eye(3)
    plain, bent = collapse_metrics(x, y), collapse_metrics(x @ mix.T, y)
    assert bent.nc1 == pytest.approx(plain.nc1, rel=1e-6)


def test_nc1_tilde_sees_a_stretch_that_nc1_does_not():
    x, y = clouds(0, width=3)
    stretch = torch.tensor([1.0, 1.0, 20.0], dtype=torch.float64)
    plain, bent = collapse_metrics(x, y), collapse_metrics(x * stretch, y)
    assert bent.nc1 == pytest.approx(plain.nc1, rel=1e-6)
    assert bent.nc1_tilde != pytest.approx(plain.nc1_tilde, rel=1e-2)


@given(seeds, st.lists(st.integers(1, 47), max_size=5), st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_meters_and_second_looks_join_in_any_division(seed, cuts, share):
    x, y = clouds(seed)
    decisions = torch.randint(4, y.shape, generator=torch.Generator().manual_seed(seed))
    whole = collapse_metrics(x, y, decisions=decisions)
    edges = sorted({0, len(y), *cuts})
    pieces = [slice(a, b) for a, b in itertools.pairwise(edges)]
    parts = [CollapseMeter(4, scatter=False), CollapseMeter(4, scatter=False)]
    for index, piece in enumerate(pieces):
        parts[index < share].update(x[piece], y[piece])
    meter = sum(parts)
    meter = CollapseMeter.from_state_dict(meter.state_dict())
    assert meter.compute().nc1 is None and meter.compute().nc4 is None
    looks: list[SecondLook] = [meter.second_look(), meter.second_look()]
    for index, piece in enumerate(pieces):
        looks[index < share].update(x[piece], y[piece], decisions[piece])
    found = meter.compute(second=looks[0] + looks[1])
    for name, value in whole.to_dict().items():
        np.testing.assert_allclose(
            np.array(found.to_dict()[name], float), np.array(value, float), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_a_simplex_is_collapsed(classes):
    means = simplex(classes, classes + 3)
    y = torch.arange(classes).repeat(3)
    found = collapse_metrics(means[y] + 5, y, 2.5 * means, -12.5 * means.sum(1))
    for name in ("nc1", "nc1_tilde", "cdnv", "nc2", "equinorm", "equiangle", "nc3", "self_duality"):
        assert getattr(found, name) == pytest.approx(0, abs=1e-7), name
    assert found.nc4 == 0 and found.nearest_mean_accuracy == 1
    off = found.cosines[~torch.eye(classes, dtype=torch.bool)]
    np.testing.assert_allclose(off, -1 / (classes - 1), atol=1e-12)


@pytest.mark.parametrize("classes", [3, 4])
def test_orthogonal_means_are_a_simplex_once_centred_but_not_their_own_head(classes):
    means = torch.eye(classes, classes + 2, dtype=torch.float64)
    y = torch.arange(classes).repeat(2)
    found = collapse_metrics(means[y], y, means)
    assert found.nc2 == pytest.approx(0, abs=1e-14)
    assert found.nc3 == pytest.approx(0, abs=1e-14)
    assert found.self_duality == pytest.approx(2 - 2 * math.sqrt((classes - 1) / classes), abs=1e-14)


def test_nc4_compares_the_heads_decision_with_the_nearest_mean():
    x, y = clouds(3)
    W = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    b = torch.tensor([0.0, 5.0, -5.0, 0.0], dtype=torch.float64)
    means = torch.stack([x[y == k].mean(0) for k in range(4)])
    nearest = torch.cdist(x, means).argmin(1)
    for bias in (None, b):
        scores = x @ W.T + (0 if bias is None else bias)
        wanted = float((scores.argmax(1) != nearest).double().mean())
        assert collapse_metrics(x, y, W, bias).nc4 == pytest.approx(wanted)
    assert collapse_metrics(x, y).nearest_mean_accuracy == pytest.approx(
        float((nearest == y).double().mean())
    )


def test_float32_near_collapse_keeps_its_digits():
    means = simplex(5, 16)
    y = torch.arange(5).repeat(400)
    noise = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (means[y] + 1e-3 * noise + 3).float()
    wanted = textbook(x.double(), y)
    found = collapse_metrics(x, y)
    meter = CollapseMeter()
    for part in torch.randperm(2000, generator=torch.Generator().manual_seed(1)).split(64):
        meter.update(x[part], y[part])
    for metrics in (found, meter.compute()):
        assert metrics.nc1_tilde == pytest.approx(wanted["nc1_tilde"], rel=1e-5)
        assert metrics.nc1 == pytest.approx(wanted["nc1"], rel=1e-4)


def test_equal_means_are_infinitely_uncollapsed_and_constants_are_nothing():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    y = torch.tensor([0, 0, 1, 1])
    with pytest.warns(RuntimeWarning, match="all class means are equal"):
        found = collapse_metrics(x, y)
    assert found.nc1 == found.nc1_tilde == found.cdnv == math.inf and math.isnan(found.nc2)
    with pytest.warns(RuntimeWarning, match="the features are constant"):
        found = collapse_metrics(torch.ones(4, 2), y)
    assert math.isnan(found.nc1_tilde) and math.isnan(found.nc1)
    with pytest.warns(RuntimeWarning):
        collapse_metrics(torch.full((4, 2), 0.1), y, torch.ones(2, 2))


def test_bad_input_is_named():
    x, y = clouds(0)
    with pytest.raises(InputError, match="no sample of class 1 "):
        collapse_metrics(x[y != 1], y[y != 1])
    with pytest.raises(InputError, match="no sample of class 4, 5 "):
        collapse_metrics(x, y, classes=6)
    with pytest.raises(InputError, match="got 1 class, expected at least 2"):
        collapse_metrics(x, torch.zeros_like(y))
    with pytest.raises(InputError, match="expected at least 2"):
        CollapseMeter(1)
    with pytest.raises(InputError, match="NaN"):
        collapse_metrics(x * float("nan"), y)
    with pytest.raises(InputError, match=r"weight: .*expected a tensor of shape \(4, 7\)"):
        collapse_metrics(x, y, torch.ones(4, 6))
    with pytest.raises(InputError, match=r"bias: .*expected a tensor of shape \(4,\)"):
        collapse_metrics(x, y, torch.ones(4, 7), torch.ones(3))
    with pytest.raises(InputError, match="without weight"):
        collapse_metrics(x, y, None, torch.ones(4))
    with pytest.raises(InputError, match="floating"):
        collapse_metrics(x.long(), y)
    with pytest.raises(InputError, match="weighting: got 'classes'"):
        collapse_metrics(x, y, weighting="classes")
    with pytest.raises(InputError, match=r"labels: .*expected"):
        collapse_metrics(x, y[:-1])
    meter = CollapseMeter()
    meter.update(x, y)
    with pytest.raises(InputError, match="saw 0 samples, expected the same 48"):
        meter.compute(second=meter.second_look())
    with pytest.raises(InputError, match="do not match"):
        meter + CollapseMeter(weighting="sample")


class Net(nn.Module):
    """A small CNN with dropout and batch norm, so that modes and buffers matter."""

    def __init__(self, classes: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5, classes)

    def forward(self, x):
        return self.head(self.drop(self.relu(self.norm(self.conv(x))).mean((2, 3))))


@pytest.fixture
def problem():
    torch.manual_seed(0)
    x, y = torch.randn(50, 1, 6, 6), torch.arange(50) % 3
    return Net(), x, y, DataLoader(TensorDataset(x, y), batch_size=16, generator=torch.Generator())


@pytest.mark.parametrize(
    "settings_", [{}, {"keep_bytes": 0}, {"keep_bytes": 0, "passes": 2}, {"keep_bytes": 1000}]
)
def test_a_model_over_a_loader(problem, settings_):
    net, x, y, loader = problem
    with unchanged(net):
        found = collapse(net, loader, sites=["conv", "relu", "head:in", ":out"], **settings_)
    assert net.training
    net.eval()
    with torch.no_grad():
        conv = net.conv(x)
        features = net.norm(conv).relu().mean((2, 3))
        decisions = net.head(features).argmax(1)
    weight = net.head.weight
    wanted = {
        "conv": collapse_metrics(conv.mean((2, 3)), y, decisions=decisions),
        "relu": collapse_metrics(features, y, decisions=decisions),
        "head:in": collapse_metrics(features, y, weight, net.head.bias),
    }
    one_pass = "keep_bytes" in settings_ and "passes" not in settings_
    for site, metrics in wanted.items():
        for name in (
            "nc1",
            "nc1_tilde",
            "cdnv",
            "nc2",
            "nc3",
            "self_duality",
            "nc4",
            "nearest_mean_accuracy",
        ):
            got, want = getattr(found[site], name), getattr(metrics, name)
            if one_pass and got is None:
                assert name in ("nc4", "nearest_mean_accuracy") or want is None
                continue
            assert got == (None if want is None else pytest.approx(want, rel=1e-3)), (site, name)
    assert found.head == "head" and found.samples == 50
    assert set(json.loads(json.dumps(found.to_dict()))["metrics"]) == {"conv", "relu", "head:in", ":out"}


def test_the_heads_input_is_the_default_and_a_bare_iterator_will_do(problem):
    net, _, _, loader = problem
    assert find_head(net) == "head"
    default = collapse(net, loader)
    assert list(default.metrics) == ["head:in"]
    streamed = collapse(net, iter(list(loader)))
    assert streamed["head:in"].nc1 == pytest.approx(default["head:in"].nc1, rel=1e-5)
    assert streamed["head:in"].nc4 is None and default["head:in"].nc4 is not None
    with pytest.raises(InputError, match=r"'head' was not measured; nearest: 'head:in'"):
        default["head"]


def test_maps_and_tokens_become_vectors():
    tokens = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(pooled(tokens, "first"), tokens[:, 0])
    assert torch.equal(pooled(tokens, "last"), tokens[:, -1])
    assert torch.equal(pooled(tokens), tokens.mean(1))
    assert pooled(tokens, "flatten").shape == (2, 12)
    assert torch.equal(pooled(tokens[..., None], "max"), tokens.amax(2))
    assert torch.equal(pooled(tokens, lambda t: t[:, 1]), tokens[:, 1])
    with pytest.raises(InputError, match="use 'mean'"):
        pooled(tokens[..., None], "first")
    with pytest.raises(InputError, match="pool: got 'cls'"):
        pooled(tokens, "cls")
    with pytest.raises(InputError, match=r"expected a tensor of shape \(batch, features\)"):
        pooled(tokens, lambda t: t)


def test_labels_by_token_make_each_token_a_sample():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 3))
    x = torch.randint(11, (8, 5))
    y = torch.randint(3, (8, 5))
    y[0, :2] = -100
    found = collapse(net, [(x, y)], sites="0")
    features = net[0](x)[y >= 0]
    wanted = collapse_metrics(features, y[y >= 0], decisions=net(x).argmax(-1)[y >= 0])
    assert found["0"].nc1_tilde == pytest.approx(wanted.nc1_tilde, rel=1e-5)
    assert found["0"].nc4 == pytest.approx(wanted.nc4)
    assert found.samples == 38


def test_a_models_bad_input_is_named_and_leaves_it_as_it_was(problem):
    net, x, y, loader = problem
    cases = [
        ("unknown site or pattern|no site|nearest", {"sites": "convv"}, loader),
        ("the model has no module 'fc'", {"head": "fc"}, loader),
        ("'conv' is a Conv2d, expected a linear layer", {"head": "conv"}, loader),
        ("passes: got 3", {"passes": 3}, loader),
        ("got no batches", {}, []),
        (r"expected \(inputs, labels\)", {}, [x]),
        ("expected an integer tensor", {}, [(x, y.float())]),
        ("NaN", {}, [(x * float("nan"), y)]),
        ("no sample of class 0", {}, [(x[y != 0], y[y != 0])]),
        ("expected one label a sample", {}, [(x, y[:-1])]),
        ("label 2 at position 2", {"classes": 2}, loader),
    ]
    for message, options, data in cases:
        with unchanged(net), pytest.raises(InputError, match=message):
            collapse(net, data, **options)
    with pytest.raises(InputError, match="name the sites"):
        collapse(nn.Conv2d(1, 2, 3), loader)


def test_results_plot(problem):
    net, _, _, loader = problem
    profile = collapse(net, loader, sites=["conv", "head:in"])
    labels = [tick.get_text() for tick in profile.plot().get_xticklabels()]
    assert labels == ["conv", "head:in"]
    assert "NC1~" in profile["conv"].plot().get_title()


def test_no_warning_in_ordinary_use(problem):
    net, _, _, loader = problem
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collapse(net, loader, sites=["conv", "head:in"])


def test_one_logit_decides_by_its_sign():
    from lineament.measure.collapse.profile import collapse

    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(net.weight)
    x = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]])
    found = collapse(net, [(x, torch.tensor([0, 0, 1, 1]))])
    assert found.metrics[":in"].nc4 == 0
