"""Variance explained by features: closed forms, invariances and what bad input gets; RSA, components, read-outs and interventions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from torch import nn

from lineament.core.checks import InputError
from lineament.data.bit_features import bit_feature, bit_features, truth_table
from lineament.data.feature_sequences import feature_sequences
from lineament.data.samples import Samples
from lineament.data.shape_texture_colour import shape_texture_colour
from lineament.measure.bias.consequences import pca_decoding, rdm, readout_reliance, rsa
from lineament.measure.bias.density import cumulative, density, participation
from lineament.measure.bias.drift import drift
from lineament.measure.bias.growth import variance_growth
from lineament.measure.bias.interventions import flips, intervene, linear_readout
from lineament.measure.bias.variance import columns_of, representation_variance, variance_explained


class OfTokens(nn.Module):
    """Token ids in, an answer for every token out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)

    def forward(self, ids):
        return self.head(torch.cumsum(self.embed(ids), 1))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def explained(phi, features, **options):
    return representation_variance(phi, features, **options)["representation"]


SIGNS = torch.tensor([[a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)]).double().repeat(5, 1)


@given(st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0.1, 3))
@settings(max_examples=10, deadline=None)
def test_a_balanced_design_gives_each_feature_its_share(a, b, c):
    """R²_i = a_i² / Σ a²; exclusive or is the product of two signs."""
    s, U = SIGNS, torch.linalg.qr(randn(7, 3))[0].T
    phi = a * s[:, :1] * U[0] + b * s[:, 1:] * U[1] + c * s.prod(1, keepdim=True) * U[2]
    found = explained(phi + 5.0, {"a": s[:, 0] > 0, "b": (s[:, 1] > 0).long()}, interactions=True)
    whole = a * a + b * b + c * c
    for feature, amplitude in zip(found.features, (a, b, c)):
        assert feature.r2 == pytest.approx(amplitude**2 / whole, abs=1e-12)
    assert found.joint == pytest.approx(1.0, abs=1e-12) and found.total == pytest.approx(whole, abs=1e-9)


def test_binary_and_categorical_features_explain_the_variance_between_groups():
    phi, f = randn(300, 4), torch.arange(300) % 3
    phi = phi + 2 * randn(3, 4, seed=1)[f]
    total = (phi - phi.mean(0)).square().sum()
    means = torch.stack([phi[f == k].mean(0) for k in range(3)])
    between = sum(int((f == k).sum()) * (means[k] - phi.mean(0)).square().sum() for k in range(3))
    assert explained(phi, {"f": f})["f"].r2 == pytest.approx(float(between / total), abs=1e-12)
    g = f == 0
    p = float(g.double().mean())
    gap = phi[g].mean(0) - phi[~g].mean(0)
    assert explained(phi, {"g": g})["g"].r2 == pytest.approx(p * (1 - p) * float(gap.square().sum()) / float(total / 300), abs=1e-12)  # fmt: skip


TEST = torch.arange(400) % 2 == 0


def measured(phi, f, **options):
    return explained(phi, {"f": f}, test=TEST, **options)["f"].r2


def test_what_it_is_invariant_to_and_what_not():
    phi, f = randn(400, 6), randn(400, seed=3)
    phi[:, 0] += 2 * f
    r2, Q = measured(phi, f), torch.linalg.qr(randn(6, 6, seed=4))[0]
    for other in (phi @ Q, 3 * phi, phi + 7):
        assert measured(other, f) == pytest.approx(r2, abs=1e-10)
    assert measured(phi, 4 - 3 * f) == pytest.approx(r2, abs=1e-10)
    vector = torch.stack([f, randn(400, seed=5)], 1)
    A = randn(2, 2, seed=6)
    assert measured(phi, vector @ A) == pytest.approx(measured(phi, vector), abs=1e-10)
    stretched = phi.clone()
    stretched[:, 1] *= 10
    assert abs(measured(stretched, f) - r2) > 0.05


def test_it_is_the_r2_of_scikit_learn_where_the_means_agree():
    phi, F = randn(400, 5), randn(400, 2, seed=1)
    phi = phi + F @ randn(2, 5, seed=2)
    phi[TEST] += phi[~TEST].mean(0) - phi[TEST].mean(0)
    fitted = LinearRegression().fit(F[~TEST], phi[~TEST])
    peer = r2_score(phi[TEST], fitted.predict(F[TEST]), multioutput="variance_weighted")
    assert measured(phi, F) == pytest.approx(peer, abs=1e-12)


def test_a_shuffled_feature_explains_nothing_and_is_not_clipped():
    values = [measured(randn(400, 8, seed=k), randn(400, seed=100 + k)) for k in range(20)]
    assert max(map(abs, values)) < 0.03 and min(values) < 0


def test_streamed_sums_are_the_direct_computation_with_both_reductions():
    phi, f = randn(400, 5), torch.arange(400) % 4
    phi = phi + 100 + randn(4, 5, seed=1)[f]
    F = torch.cat([torch.ones(400, 1), columns_of("f", f, 400)], 1).double()
    mu = phi[~TEST].mean(0)
    W = torch.linalg.lstsq(F[~TEST], phi[~TEST] - mu, driver="gelsd").solution
    left, whole = phi[TEST] - mu - F[TEST] @ W, phi[TEST] - mu
    assert measured(phi, f) == pytest.approx(1 - float(left.square().sum() / whole.square().sum()), abs=1e-10)
    literal = (1 - left.square().sum(1) / whole.square().sum(1)).mean()
    assert measured(phi, f, reduction="per_sample") == pytest.approx(float(literal), abs=1e-10)


def test_dependent_features_are_told_and_have_a_unique_share():
    f = randn(400)
    g = 0.9 * f + 0.4 * randn(400, seed=1)
    phi = torch.stack([f, g], 1)
    found = representation_variance(phi, {"f": f, "g": g}, test=TEST)
    site = found["representation"]
    assert site["f"].r2 + site["g"].r2 > 1.5 and site["f"].unique < 0.2
    assert found.correlations["f, g"] > 0.8 and "depend on each other" in found.notes[0]


def test_units_density_participation_and_dead_units():
    s = SIGNS
    phi = torch.cat([s[:, :1], s[:, :1] + s[:, 1:], torch.full((20, 1), 0.7)], 1)
    found = explained(phi, {"f": s[:, 0] > 0})
    assert torch.allclose(found["f"].units, torch.tensor([1.0, 0.5, 0.0]).double()) and found.dead == 1
    assert found["f"].density == pytest.approx(2 / 3) and found["f"].participation == pytest.approx(
        2.25 / 3 / 1.25
    )
    assert density(found["f"].units, 0.6) == pytest.approx(1 / 3)
    assert participation(torch.zeros(4)) == 0 and participation(torch.ones(4)) == 1
    assert cumulative(torch.tensor([0.0, 3.0, 1.0])).tolist() == [0.75, 1.0, 1.0]


def test_a_network_is_measured_at_several_sites_in_any_batches_and_left_as_it_was():
    data = bit_features(600, ("linear", "xor"), block=3, noise=2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 2)).train()
    features = {"linear": data.targets[:, 0], "xor": data.targets[:, 1]}
    one = variance_explained(net, data, features, sites=["0", "1"])
    other = variance_explained(net, data, features, sites=["0", "1"], batch_size=37)
    for site in ("0", "1"):
        for a, b in zip(one[site].features, other[site].features):
            assert a.r2 == pytest.approx(b.r2, abs=1e-6)
    assert net.training and one["0"]["linear"].decodable > 0.95 > one["0"]["linear"].r2
    assert one["0"]["xor"].decodable < 0.7, "no linear map of the bits gives it"
    assert variance_explained(net, data, features).sites[0].site == "3:in"
    assert one.relative_to(one)["0"]["linear"] == pytest.approx(one["0"]["linear"].r2)


def test_rsa():
    x, Q = randn(30, 6), torch.linalg.qr(randn(6, 6, seed=1))[0]
    turned = rsa(x, x @ Q, metric="euclidean")
    assert [turned.pearson, turned.spearman, turned.kendall] == pytest.approx([1.0, 1.0, 1.0])
    assert torch.allclose(rdm(x), 1 - torch.corrcoef(x), atol=1e-12)
    assert torch.allclose(rdm(x, "euclidean"), torch.cdist(x, x), atol=1e-7)
    assert abs(rsa(x, randn(30, 6, seed=2)).spearman) < 0.3
    tied = randn(40, 3, seed=3).round(decimals=0), randn(40, 3, seed=4).round(decimals=0)
    pairs = [rdm(v, "euclidean")[tuple(torch.triu_indices(40, 40, 1))].numpy() for v in tied]
    expected = spearmanr(pairs[0], pairs[1]).statistic  # pyright: ignore[reportAttributeAccessIssue]
    for dtype in (torch.float64, torch.float32):
        found = rsa(*(v.to(dtype) for v in tied), metric="euclidean")
        assert found.spearman == pytest.approx(expected, abs=1e-12)
    x[4] = 0.25
    with pytest.raises(InputError, match="number 4 is constant"):
        rdm(x)


def test_the_easy_feature_comes_first_in_components_and_decides_a_new_readout():
    easy, hard = torch.arange(400) // 2 % 2, torch.arange(400) // 4 % 2
    phi = (
        3.0 * (easy[:, None] - 0.5) * randn(1, 10, seed=1)
        + 0.8 * (hard[:, None] - 0.5) * randn(1, 10, seed=2)
        + 0.1 * randn(400, 10)
    )
    found = pca_decoding(phi, [easy, hard], [1, 2], test=TEST)
    assert found.components_for(0.95) == [1, 2] and float(found.explained.sum()) == pytest.approx(1)
    follows = readout_reliance(phi, easy, hard)
    assert follows.value > 0.95 and follows.samples == 200
    assert readout_reliance(phi, hard, easy).value == pytest.approx(1 - follows.value)


def test_a_push_along_a_feature_flips_it_alone_from_half_the_way_on():
    f, g = torch.arange(80) % 2, torch.arange(80) // 2 % 2
    phi = torch.stack([4.0 * f, 1.0 * g, torch.zeros(80)], 1).double()
    readouts = {"f": linear_readout(phi, f), "g": linear_readout(phi, g)}
    found = flips(phi, f, readouts, [0.0, 0.4, 0.6, 1.0])
    assert found.flipped["f"].tolist() == [0, 0, 1, 1] and not found.flipped["g"].any()
    assert flips(phi, g, readouts, [1.0]).size < found.size
    net = nn.Sequential(nn.Identity(), nn.Linear(3, 2)).double()
    net[1].weight.data, net[1].bias.data = (
        torch.stack([w[1:] for w in readouts.values()]),
        torch.stack([w[0] for w in readouts.values()]),
    )
    inside = intervene(net, phi, f, "0", steps=[0.0, 0.4, 0.6, 1.0], batch_size=7)
    assert inside.flipped["output 0"].tolist() == [0, 0, 1, 1] and not inside.flipped["output 1"].any()


@pytest.mark.parametrize(("name", "bits"), [("parity3", 3), ("parity4", 4), ("xor_of_xors", 4)])
def test_no_bit_tells_a_parity(name, bits):
    table = truth_table(name).double()
    rows = torch.tensor([[int(b) for b in f"{k:0{bits}b}"] for k in range(2**bits)]).double()
    assert table.mean() == 0.5 and not ((rows - 0.5).T @ (table - 0.5)).any()


def test_features_of_bits_are_independent_until_they_are_made_to_agree():
    free = bit_features(4000, ("linear", "parity4"))
    tied = bit_features(4000, ("linear", "parity4"), agreement=[0.8], prevalence=[1.0, 0.25])
    assert abs(float(torch.corrcoef(free.targets.T)[0, 1])) < 0.05
    assert abs(float(torch.corrcoef(tied.targets.T)[0, 1]) - 0.8) < 0.05
    assert (
        abs(float(tied.extras["given"].double().mean(0)[1]) - 0.25) < 0.05
        and tied.extras["given"][:, 0].all()
    )
    count, f = bit_feature("parity4")
    block = (tied.inputs[:, 8 : 8 + count] > 0).long()
    assert torch.equal(f(block).float(), tied.targets[:, 1])


def test_written_features_are_those_of_the_tokens_in_any_order_and_extent():
    for extent, places in (("near", [0, 1, 2, 3]), ("far", [0, 2, 5, 7])):
        data = feature_sequences(200, ("linear", "parity4"), order=(1, 0), extent=extent)
        block = data.inputs[:, 8:16] >= 8
        assert torch.equal(block[:, places].sum(1) % 2, data.inputs[:, 17] - 17)
        assert torch.equal(data.targets[:, 1].long(), (data.inputs[:, 0] >= 8).long())
        assert data.classes == ("parity4", "linear") and (data.inputs[:, 16] == 16).all()
    with pytest.raises(InputError, match="order: got"):
        feature_sequences(5, ("linear", "xor"), order=(0, 0))


def test_shape_texture_and_colour_are_independent_and_can_be_seen():
    data = shape_texture_colour(1500, noise=0.0)
    values = torch.stack([data.extras[n] for n in ("shape", "texture", "colour")]).double()
    assert (torch.corrcoef(values) - torch.eye(3)).abs().max() < 0.08
    inside = (data.inputs - 0.5).abs().amax(1) > 0.01
    assert inside.flatten(1).any(1).all(), "no object is outside its image"
    colour = (data.inputs * inside[:, None]).sum((2, 3))
    for k in range(8):
        tints = torch.nn.functional.normalize(colour[data.extras["colour"] == k], dim=1)
        assert (tints - tints.mean(0)).abs().max() < 1e-3, "a colour is one colour, whatever the texture"
    plain = data.inputs.amax(1).flatten(1)[data.extras["texture"] == 0]
    striped = data.inputs.amax(1).flatten(1)[data.extras["texture"] == 1]
    assert (
        plain.std(1).mean() < striped.std(1).mean() + 0.2
        and len(shape_texture_colour(5, shapes=2).classes) == 2
    )


PHI = randn(20, 3)
WRONG = [
    (lambda: explained(PHI, {"f": torch.full((20,), math.nan)}), "20 values of 'f' are NaN"),
    (lambda: explained(PHI, {"f": torch.ones(20)}), "'f' is constant"),
    (lambda: explained(PHI, {"f": torch.arange(7)}), "'f' has the shape"),
    (lambda: explained(torch.ones(20, 3), {"f": torch.arange(20.0)}), "never varies"),
    (lambda: explained(PHI[:1], {"f": torch.arange(1)}), "constant|at least 2"),
    (lambda: explained(PHI, {"f": torch.arange(20) < 1}, test=torch.arange(20) > 9), "'f' is constant on the 10 samples that are judged"),
    (lambda: explained(PHI, {}), "features: got none"),
    (lambda: bit_features(5, ("linear", "pariti4")), "nearest: 'parity4'"),
    (lambda: bit_features(5, ("parity9",)), "block: got 8, expected at least 9"),
    (lambda: readout_reliance(PHI, torch.arange(20) % 2, torch.arange(20) % 2), "they agree on 20 of 20"),
    (lambda: rdm(PHI, "cosine"), "metric: got 'cosine'"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "says"), WRONG, ids=[says for _, says in WRONG])
def test_bad_input_is_named(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_networks_of_tokens_and_images_are_read_as_their_data_come():
    ids = torch.randint(7, (300, 6), generator=torch.Generator().manual_seed(0))
    lengths, net = 3 + torch.arange(300) % 4, OfTokens()
    features = {"first": ids[:, 0], "long": lengths > 4}
    padded = Samples(torch.where(torch.arange(6) < lengths[:, None], ids, 6), ids[:, 0], lengths=lengths)
    found = variance_explained(net, padded, features, sites="head:in", batch_size=64)["head:in"]
    with torch.no_grad():
        sums = torch.cumsum(net.embed(padded.inputs), 1)
    own = torch.stack([each[:n].mean(0) for each, n in zip(sums, lengths)])  # without what is padding
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    test = torch.zeros(300, dtype=torch.bool)
    test[order[:150]] = True
    by_hand = representation_variance(own, features, test=test)["representation"]
    for one, other in zip(found.features, by_hand.features):
        assert one.r2 == pytest.approx(other.r2, abs=1e-6) and one.decodable == pytest.approx(other.decodable)

    grey = torch.randint(256, (200, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    cnn = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    bright = grey.float().mean((1, 2)) / 255
    stored = variance_explained(cnn, Samples(grey, torch.arange(200) % 2), {"bright": bright}, sites="1")["1"]
    made = variance_explained(
        cnn, (grey[:, None] / 255, torch.arange(200) % 2), {"bright": bright}, sites="1"
    )["1"]
    assert stored["bright"].r2 == pytest.approx(made["bright"].r2, abs=1e-6) and stored.total < 1


@pytest.mark.parametrize("form", ["map", "tokens"])
def test_a_map_and_tokens_are_pushed_at_every_position(form):
    """Behind a mean over positions it is what pushing the means does."""
    f = torch.arange(40) % 2
    phi = randn(40, 3, seed=3).float() + 2 * f[:, None]
    noise = randn(40, 5, 3, seed=4).float()
    x = phi[:, None] + noise - noise.mean(1, keepdim=True)  # (sample, token, unit)
    torch.manual_seed(0)
    head = nn.Linear(3, 2)
    flat = intervene(nn.Sequential(nn.Identity(), head), phi, f, "0")
    if form == "tokens":
        net = nn.Sequential(nn.Identity(), nn.Flatten(1, 2), nn.Unflatten(1, (5, 3)), Mean(), head)
        found = intervene(net, x, f, "0", batch_size=7)
    else:
        net = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
        found = intervene(net, x.movedim(2, 1)[..., None], f, "0", batch_size=7)
    assert found.size == pytest.approx(flat.size, rel=1e-5)
    assert {n: v.tolist() for n, v in found.flipped.items()} == {
        n: v.tolist() for n, v in flat.flipped.items()
    }
    assert max(float(v.max()) for v in found.flipped.values()) > 0


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def test_growth_is_measured_on_the_scale_of_the_end():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), randn(300, 3).float()
    torch.manual_seed(1)
    early = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    features = {"a": x[:, 0] > 0, "b": x[:, 1]}
    found = variance_growth(
        net, {"early": early, "late": net.state_dict()}, (x, torch.zeros(300)), features, sites=["0", "1"]
    )
    assert found.names == ("early", "late") and found.sites == ("0", "1") and found.r2.shape == (2, 2, 2)
    for number, each in enumerate((early, net)):
        own = variance_explained(each, (x, torch.zeros(300)), features, sites=["0", "1"])
        last = found.checkpoints[1]["1"].total
        assert float(found.r2[number, 1, 0]) == pytest.approx(own["1"]["a"].r2 * own["1"].total / last)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [line.get_label() for line in found.plot().lines] == ["a", "b"]
    with pytest.raises(InputError, match="checkpoints: got none"):
        variance_growth(net, [], (x, torch.zeros(300)), features)


def test_drift_tells_moved_units_from_a_moved_space():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    other, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), randn(400, 3).float()
    turn = torch.linalg.qr(randn(4, 4))[0].float()
    turned = {**net.state_dict(), "0.weight": turn @ net[0].weight.data}  # pyright: ignore[reportCallIssue]
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    states = {"other": other.state_dict(), "turned": turned, "end": kept}
    found = drift(net, states, x, sites=["0", "1"])
    assert found.names == ("other", "turned", "end") and found.sites == ("0", "1")
    a, b = (layer(x).double().detach() for layer in (other[0], net[0]))
    a, b = a - a.mean(0), b - b.mean(0)
    assert float(found.moved[0, 0]) == pytest.approx(
        float((a - b).square().sum() / b.square().sum()), rel=1e-5
    )
    assert float(found.cka[0, 0]) == pytest.approx(
        float((a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())), rel=1e-5
    )
    assert float(found.moved[1, 0]) > 0.3 and float(found.procrustes[1, 0]) < 1e-3
    assert float(found.cka[1, 0]) == pytest.approx(1) and float(found.cka_next[1, 0]) == pytest.approx(1)
    assert found.moved[2].tolist() == [0, 0] and found.cka_error[0].min() > 0
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())
    assert [bars.get_label() for bars in found.plot().containers] == ["0", "1"]
    with pytest.raises(InputError, match="checkpoints: got 1"):
        drift(net, [kept], x)
    few = drift(net, [turned, kept], x[:12], sites="0", blocks=2)
    assert few.notes and "samples" in few.notes[0]
