"""Complexity: the specification's oracles, the streams, the split, and what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, Ridge
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lineament.core.checks import InputError
from lineament.measure.complexity.checkpoints import spearman, temporal_score, training_dynamics, without
from lineament.measure.complexity.features import Reading
from lineament.measure.complexity.groups import hoyer, meta_features
from lineament.measure.complexity.layers import complexity
from lineament.measure.complexity.readouts import ReadoutMoments
from lineament.measure.complexity.vinformation import Residuals, vinformation


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


A, Z = normal(200, 7), normal(200, 3, seed=1)


def r2(a, z, **options):
    return vinformation([a], z, ridge=0.0, **options).information[0]


def test_a_linear_feature_is_read_without_error_and_an_independent_one_to_its_bias():
    torch.testing.assert_close(r2(A, A @ normal(7, 2) + 3), torch.ones(2).double(), rtol=0, atol=1e-12)
    many = r2(A, normal(200, 100, seed=2))
    assert abs(float(many.mean()) - 7 / 199) < 0.006
    held = vinformation(
        [A[:150]], normal(150, 400, seed=2), heldout=([A[150:]], normal(50, 400, seed=3)), ridge=0.0
    )
    assert float(held.information.mean()) < 0


def test_least_squares_and_ridge_are_scikit_learns():
    z = A[:, :3].square() + Z
    expected = [LinearRegression().fit(A, z[:, i]).score(A, z[:, i].numpy()) for i in range(3)]
    torch.testing.assert_close(r2(A, z), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
    scaled = (A - A.mean(0)) / A.std(0, correction=0)
    fit = Ridge(alpha=0.1 * len(A)).fit(scaled, z)
    expected = 1 - ((z - torch.from_numpy(fit.predict(scaled))) ** 2).mean(0) / z.var(0, correction=0)
    found = vinformation([A * torch.arange(1.0, 8)], z, ridge=0.1).information[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_affine_changes_of_activations_and_features_change_nothing_and_columns_only_add():
    z = A[:, :3].abs() + A[:, 3:6]
    plain = r2(A, z)
    torch.testing.assert_close(r2(A @ normal(7, 7, seed=4) + 5, z), plain)
    torch.testing.assert_close(r2(A, 4 - 3 * z), plain)
    assert (r2(torch.cat([A, normal(200, 2, seed=5)], 1), z) >= plain).all()
    copies = torch.cat([A, A[:, :2], A[:, :1] - A[:, 1:2], A.new_zeros(200, 1), A.new_ones(200, 1)], 1)
    torch.testing.assert_close(r2(copies, z), plain)


def test_orthogonal_activations_add_squared_correlations():
    q, _ = torch.linalg.qr(A - A.mean(0))
    q = q - q.mean(0)
    correlations = torch.corrcoef(torch.cat([q, Z], 1).T)[:7, 7:]
    torch.testing.assert_close(r2(q, Z), correlations.square().sum(0), rtol=0, atol=1e-9)


def test_copies_of_one_probe_and_the_learned_variance():
    z = A[:, :3] + Z
    one = r2(A, z)
    copies = vinformation([A] * 4, z, ridge=0.0)
    torch.testing.assert_close(copies.complexity, 1 - one)
    torch.testing.assert_close(r2(A, z, variance="learned"), -0.5 * (1 - one).log())


def test_the_ratio_and_the_difference_differ_by_the_held_out_variance():
    train, held, z = A[:100], A[100:] * 2, A[:, :2].abs() + A[:, 2:4]
    z, other = z[:100], (z[100:] * 2)
    options = {"heldout": ([held], other), "ridge": 0.0}
    ratio, difference = (
        vinformation([train], z, form=f, **options).information[0] for f in ("ratio", "difference")
    )
    unit = (other - z.mean(0)).square().mean(0) / z.var(0, correction=0)
    torch.testing.assert_close(difference, ratio * unit)
    assert (difference > 1).any() and (vinformation([train], z, **options).complexity >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [[200], [1] * 200, [3, 97, 100]])
def test_streamed_and_merged_is_all_at_once(dtype, sizes):
    acts, z = {"a": (A + 100).to(dtype), "b": A.abs().to(dtype)}, (A[:, :3].square() + Z).to(dtype)
    whole = vinformation(acts, z)
    streams = [ReadoutMoments(), ReadoutMoments()]
    parts = torch.arange(200).split(sizes)
    for number, rows in enumerate(parts):
        streams[number % 2].update({s: a[rows] for s, a in acts.items()}, z[rows])
    moments = ReadoutMoments.from_state_dict(sum(streams).state_dict())
    readouts = moments.readouts()
    looks = [Residuals(readouts), Residuals(readouts)]
    for number, rows in enumerate(parts):
        looks[number % 2].update({s: a[rows] for s, a in acts.items()}, z[rows])
    found = sum(looks).compute()[0]
    close = {"rtol": 0, "atol": 1e-9 if dtype == torch.float64 else 1e-4}
    torch.testing.assert_close(found.information, whole.information, **close)
    torch.testing.assert_close(found.errors, whole.errors, **close)
    assert found.samples == (200, 200)


def test_near_one_nothing_cancels_in_single_precision():
    x = normal(4000, 5, dtype=torch.float32) + 1000
    z = x[:, :1] - x[:, 1:2]
    found = vinformation([x[:3000]], z[:3000], heldout=([x[3000:]], z[3000:]), ridge=0.0)
    assert 0 <= 1 - float(found.information) < 1e-6


def test_all_penalties_of_one_decomposition_are_those_of_their_own_solves():
    moments = ReadoutMoments()
    moments.update({"a": A}, A[:, :2].abs())
    several = moments.readouts([0.0, 1e-3, 1.0]).weights["a"]
    for at, penalty in enumerate([0.0, 1e-3, 1.0]):
        torch.testing.assert_close(several[at], moments.readouts(penalty).weights["a"][0])


def test_the_standard_errors_are_the_spread_over_held_out_samples():
    g = torch.Generator().manual_seed(0)
    weights, found, said = normal(4, 2, seed=6), [], []
    train = normal(4000, 4, seed=7)
    noise = torch.tensor([0.5, 2.0]).double()

    def feature(x):
        return x @ weights + noise * torch.randn(len(x), 2, generator=g, dtype=torch.float64)

    moments = ReadoutMoments()
    acts = {"first": train[:, :2], "all": train}
    moments.update(acts, feature(train))
    readouts = moments.readouts()
    for _ in range(300):
        x = torch.randn(100, 4, generator=g, dtype=torch.float64)
        look = Residuals(readouts)
        look.update({"first": x[:, :2], "all": x}, feature(x))
        result = look.compute()[0]
        found.append(torch.cat([result.information.flatten(), result.unclipped]))
        said.append(torch.cat([result.information_errors.flatten(), result.errors]))
    ratio = torch.stack(said).mean(0) / torch.stack(found).std(0)
    assert ((ratio > 0.85) & (ratio < 1.15)).all(), ratio


def test_rows_of_one_sample_count_as_one_in_the_errors():
    x, z = normal(50, 3), normal(50, 2, seed=1) + normal(50, 3)[:, :2]
    moments = ReadoutMoments()
    moments.update({"a": x}, z)
    once, twice = Residuals(moments.readouts()), Residuals(moments.readouts())
    once.update({"a": x}, z)
    repeated = torch.arange(50).repeat_interleave(3)
    twice.update({"a": x[repeated]}, z[repeated], repeated)
    one, three = once.compute()[0], twice.compute()[0]
    torch.testing.assert_close(one.information, three.information)
    torch.testing.assert_close(one.information_errors, three.information_errors)
    torch.testing.assert_close(one.errors, three.errors)
    assert three.samples == (50, 150)


@pytest.mark.parametrize("split", ["training", "held out"])
def test_a_constant_feature_is_nan_and_counted(split):
    z = Z.clone()
    rows = slice(0, 100) if split == "training" else slice(100, 200)
    z[rows, 1] = 0.1
    with pytest.warns(RuntimeWarning, match="1 of 3 features do not vary"):
        found = vinformation([A[:100]], z[:100], heldout=([A[100:]], z[100:]))
    assert found.constant.tolist() == [False, True, False] and len(found.order) == 2
    assert not math.isnan(found.mean)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.relu1 = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True)
        self.conv2, self.relu2 = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU(inplace=True)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


IMAGES, LABELS = normal(120, 1, 6, 6, dtype=torch.float32), torch.arange(120) % 3
ATOMS = normal(4, 6, dtype=torch.float32).abs()


def dictionary(site):
    return SimpleNamespace(site=site, atoms=ATOMS, encode=lambda x: (x @ ATOMS.T).relu())


def forms():
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=50)
    return {
        "pair": (IMAGES, LABELS),
        "arrays": (IMAGES.numpy(), LABELS.numpy()),
        "dataset": TensorDataset(IMAGES, LABELS),
        "loader": loader,
        "shuffling loader": DataLoader(TensorDataset(IMAGES, LABELS), batch_size=50, shuffle=True),
        "batches": list(loader),
        "images": IMAGES,
    }


@pytest.mark.parametrize("form", forms())
def test_every_form_of_data_gives_the_same_split_and_numbers(form):
    net, z = Net(), LABELS.double()[:, None] + IMAGES.double().mean((1, 2, 3))[:, None]
    sites = ["conv1", "relu1", "fc:in"]
    expected = complexity(net, (IMAGES, LABELS), z, sites=sites)
    found = complexity(net, forms()[form], z, sites=sites)
    torch.testing.assert_close(found.information, expected.information, rtol=1e-4, atol=1e-5)
    assert found.samples == expected.samples and sum(found.samples) == 120


def test_kinds_of_features_agree_where_they_are_the_same():
    net, data, sites = Net(), (IMAGES, LABELS), ["relu1", "fc:in"]
    unit = complexity(net, data, "fc:in", sites=sites)
    with torch.no_grad():
        values = net.relu2(net.conv2(net.relu1(net.conv1(IMAGES)))).mean((2, 3))
    for same in (
        values,
        values.numpy(),
        SimpleNamespace(site="fc:in", atoms=torch.eye(6), encode=lambda x: x),
    ):
        torch.testing.assert_close(complexity(net, data, same, sites=sites).information, unit.information)
    torch.testing.assert_close(complexity(net, data, "relu2", sites=sites).information, unit.information)
    pixels = complexity(net, data, lambda x: x.mean((1, 2, 3)), sites=":in", ridge=0.0)
    torch.testing.assert_close(pixels.information, torch.ones(1, 1).double())
    assert complexity(net, data, "labels", sites=sites).information.shape == (2, 3)
    assert complexity(net, data, "labels").sites[-1] == "fc:in"


def test_rows_are_samples_maxima_or_positions():
    net, data = Net(), (IMAGES, LABELS)
    pooled, highest, each = (
        complexity(net, data, dictionary("relu2"), sites=["relu1", "relu2"], rows=rows)
        for rows in ("samples", "max", "positions")
    )
    assert (pooled.rows, highest.rows, each.rows) == ("samples", "max", "positions")
    assert sum(pooled.samples) == sum(highest.samples) == 120 and sum(each.samples) == 120 * 9
    # Codes of the dictionary are linear in its own site at each position, but for the relu, which these never need.
    torch.testing.assert_close(each.information[1], torch.ones(4).double(), rtol=0, atol=0.01)
    assert not torch.equal(pooled.information, highest.information)


@pytest.mark.parametrize(("pool", "width"), [(1, 4), (2, 16), (100, 144), ("full", 144)])
def test_maps_are_pooled_to_a_grid(pool, width):
    reading = Reading(Net(), (IMAGES, LABELS), "labels", sites="relu1", pool=pool)
    assert next(reading.walk()).activations["relu1"].shape[1] == width


def test_several_penalties_and_other_data_for_the_held_out():
    net, sites = Net(), ["relu1", "fc:in"]
    first = complexity(net, (IMAGES, LABELS), "labels", sites=sites, ridge=(1e-3, 1.0))
    second = complexity(net, (IMAGES, LABELS), "labels", sites=sites, ridge=1.0)
    torch.testing.assert_close(first.others[0].information, second.information, rtol=0, atol=1e-6)
    apart = complexity(
        net, (IMAGES[:80], LABELS[:80]), "labels", sites=sites, heldout=(IMAGES[80:], LABELS[80:])
    )
    assert apart.samples == (80, 40)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.block = nn.Embedding(9, 5), nn.Linear(5, 5)

    def forward(self, input_ids, attention_mask=None):
        return self.block(self.embed(input_ids))


def test_language_models_are_read_by_token_without_padding():
    ids = torch.randint(0, 9, (40, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(40, 6, dtype=torch.long)
    mask[::2, 4:] = 0
    batches = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(16), mask.split(16))]
    found = complexity(Words(), batches, "block", sites=["embed", "block"])
    assert found.rows == "positions" and sum(found.samples) == int(mask.sum())
    torch.testing.assert_close(found.information, torch.ones(2, 5).double(), rtol=0, atol=1e-3)
    plain = complexity(Words(), ids, "block", sites=["embed", "block"])
    assert sum(plain.samples) == 240


def test_checkpoints_are_read_with_the_final_networks_features():
    net, data = Net(), (IMAGES, LABELS)
    early = {key: torch.randn_like(value) for key, value in net.state_dict().items()}
    found = temporal_score(net, {"early": early, "end": net}, data, "fc:in")
    assert found.sites == ("early", "end") and (found.information[1] > 0.99).all()
    assert (found.information[0] < 0.99).all()
    torch.testing.assert_close(without(found, "end"), 1 - found.information[0])
    torch.testing.assert_close(temporal_score(net, [net], data, "fc:in").information, found.information[1:])


def test_a_checkpoint_of_another_network_is_refused():
    net, data = Net(), (IMAGES, LABELS)
    with pytest.raises(InputError, match=r"'checkpoint 0' lacks conv1.weight"):
        temporal_score(net, [{}, net], data, "fc:in")
    wrong = {**net.state_dict(), "fc.bias": torch.zeros(5)}
    with pytest.raises(InputError, match=r"has \(5,\) for fc.bias, expected \(3,\)"):
        temporal_score(net, [wrong], data, "fc:in")
    with pytest.raises(InputError, match="site: the features have none"):
        temporal_score(net, [net], data, Z[:120])


def test_features_extracted_anew_at_each_checkpoint():
    net = Net()

    def extract(model):
        return SimpleNamespace(site="fc:in", atoms=torch.eye(6), encode=lambda x: x, decode=lambda z: z)

    found = training_dynamics(
        net, [net.state_dict()] * 2, (IMAGES, LABELS), extract, sites=["relu1", "fc:in"]
    )
    assert found.mean.shape == (2,) and found.mean[0] == found.mean[1] and len(found.importance) == 2
    at = int(found.importance[0].order[0])
    assert float(found.top[0]) == float(found.complexity[0].complexity[at])


REFUSED = {
    "as many activations as samples": (lambda: vinformation([normal(5, 5)], normal(5, 1), ridge=0.0), "ridge: got 0 with 5 samples and 5"),
    "NaN": (lambda: vinformation([A], torch.where(torch.arange(200)[:, None] == 7, math.nan, Z)), r"features: NaN .* 1 of 200 rows \(7\)"),
    "rows": (lambda: vinformation([A], Z[:3]), r"features: .*\(200, features\)|site '0'"),
    "ridge": (lambda: vinformation([A], Z, ridge=-1.0), "ridge: got -1.0"),
    "form": (lambda: vinformation([A], Z, form="rato"), "nearest: 'ratio'"),
    "site": (lambda: complexity(Net(), (IMAGES, LABELS), "labels", sites="relu3"), "relu3"),
    "short array": (lambda: complexity(Net(), (IMAGES, LABELS), Z[:60], sites="fc"), "features: got 60 rows"),
    "array of another split": (lambda: complexity(Net(), (IMAGES, LABELS), Z, sites="fc", heldout=(IMAGES, LABELS)), "pass heldout= as a fraction"),
    "iterator": (lambda: complexity(Net(), iter([]), "labels", sites="fc"), "can be walked once"),
    "no data": (lambda: complexity(Net(), [], "labels", sites="fc"), "got no batches"),
    "width": (lambda: complexity(Net(), (IMAGES, LABELS), dictionary("relu1"), sites="fc"), "atoms have 6 numbers, but site 'relu1' has 4"),
    "no site": (lambda: complexity(Net(), (IMAGES, LABELS), dictionary(None), sites="fc"), "does not say at which site"),
    "pool": (lambda: complexity(Net(), (IMAGES, LABELS), "labels", sites="fc", pool=0), "pool: got 0"),
    "fraction": (lambda: complexity(Net(), (IMAGES, LABELS), "labels", sites="fc", heldout=1.0), "heldout: got 1.0"),
    "positions": (lambda: complexity(Net(), (IMAGES, LABELS), dictionary("relu2"), sites="fc", rows="positions"), "has 1 positions, the features have 9"),
    "a set of groups": (lambda: meta_features(ATOMS, groups=9), "groups: got 9"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused_in_one_line(what):
    call, message = REFUSED[what]
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_hoyer_and_groups():
    found = hoyer(torch.tensor([[0.0, 5.0, 0.0], [2.0, 2.0, -2.0], [0.0, 0.0, 0.0]]))
    assert found[0] == 1 and abs(float(found[1])) < 1e-12 and found[2].isnan()
    atoms = torch.cat([normal(10, 3) * 0.01 + torch.eye(3)[i].double() for i in range(3)])
    known = torch.arange(30.0).masked_fill(torch.arange(30) == 0, math.nan)
    groups = meta_features(atoms, complexity=known, groups=3)
    assert sorted(groups.complexity.tolist()) == [5.0, 14.5, 24.5] and groups.importance is None
    assert len(groups.level(3).unique()) == 3 and groups.plane.shape == (30, 2)
    together = groups.level(3)
    assert all(len(groups.labels[together == g].unique()) == 1 for g in range(3))


def test_spearman_is_scipys_where_both_are_known():
    a, b = np.random.default_rng(0).normal(size=(2, 20))
    from scipy.stats import spearmanr

    assert abs(spearman(torch.tensor(a), torch.tensor(b)) - spearmanr(a, b).statistic) < 1e-12
    assert math.isnan(spearman(torch.ones(5), torch.arange(5.0)))
