"""Alignment of whole networks: any data, any architecture, its errors, and that nothing is left behind."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError, NotFiniteError
from lineament.measure.alignment.profile import AlignmentOptions, alignment, alignments


def cnn(seed: int = 0, width: int = 6, stride: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=stride, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 5, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(3),
    ).eval()


def prepared(net: nn.Module) -> nn.Module:
    net(torch.zeros(1, 1, 6, 6))
    return net


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(120, 1, 6, 6, generator=generator), torch.arange(120) % 3


@pytest.fixture(scope="module")
def nets() -> tuple[nn.Module, nn.Module]:
    return prepared(cnn(0)), prepared(cnn(1, width=8))


def test_a_permuted_copy_has_every_unit(images, nets) -> None:
    net, order = nets[0], torch.tensor([3, 1, 0, 5, 4, 2])
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].weight.copy_(net[0].weight[order])
        other[0].bias.copy_(net[0].bias[order])
    found = alignment(net, other, images, sites=["1"], nulls=("shuffled", "rotated", "untrained"))["1"]
    assert order[found.match.columns].tolist() == list(range(6))
    assert found.match_mean == pytest.approx(1, abs=1e-5) and found.overlap == 1
    assert all(float(null.match.mean()) < 0.9 for null in found.nulls.values())
    assert bool(found.found.all()) and found.mean_errors is not None and max(found.mean_errors) < 1e-5
    maps = found.sparse_maps([0.0, 0.02])
    assert float(maps.half_mse[0].max()) < 1e-4 and float(maps.single_half_mse.max()) < 1e-4
    assert float(found.information(bins=6).diagonal().min()) < float(found.information(bins=6).max())


def forms(images: tuple[Tensor, Tensor]) -> dict[str, object]:
    data = TensorDataset(*images)
    return {
        "pair": images,
        "arrays": tuple(v.numpy() for v in images),
        "data set": data,
        "loader": DataLoader(data, batch_size=40),
        "batches": [(images[0][k : k + 30], images[1][k : k + 30]) for k in range(0, 120, 30)],
        "inputs": images[0],
        "batches of inputs": list(images[0].split(40)),
    }


@pytest.mark.parametrize("form", ["arrays", "data set", "loader", "batches", "inputs", "batches of inputs"])
def test_data_come_in_any_form(form: str, images, nets) -> None:
    whole = alignment(*nets, images, sites=["1", "3"])
    found = alignment(*nets, forms(images)[form], sites=["1", "3"])
    for site in ("1", "3"):
        torch.testing.assert_close(found[site].correlations, whole[site].correlations, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.cka, whole.cka, rtol=1e-3, atol=1e-5)


def test_default_sites_and_both_networks_stay_as_they_were(images, nets) -> None:
    for net in nets:
        net.train()
        net[0].weight.grad = torch.ones_like(net[0].weight)
    before = [copy.deepcopy(net.state_dict()) for net in nets]
    found = alignment(*nets, images)
    assert list(found.sites) == ["1", "3", "5:in"] and found.cka.shape == (3, 3)
    for net, state in zip(nets, before):
        assert net.training and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
        assert net[0].weight.grad is not None and not net[0]._forward_hooks
        net[0].weight.grad = None
        net.eval()
    assert found["1"].semi.values.shape == (6,) and found["1"].back.values.shape == (8,)
    assert len(found["1"].match.values) == 6
    found.plot(), found["1"].plot(), found["1"].plot_matrix(), found["1"].sparse_maps().plot()
    assert set(found.to_dict()) >= {"sites", "cka"}


def test_other_architectures_meet_at_the_same_depth(images) -> None:
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(36, 7), nn.ReLU(), nn.Linear(7, 3))
    found = alignment(prepared(cnn()), mlp, images, sites="nearest")
    assert found.notes and found["1"].site_b == "3:in" and found["1"].samples == 120


def test_other_sizes_are_refused_or_pooled(images) -> None:
    pair = prepared(cnn()), prepared(cnn(1, stride=2))
    with pytest.raises(
        InputError, match=r"'1' of 6 x 6 positions and '1' of 3 x 3 positions do not meet.*resize='pool'"
    ):
        alignment(*pair, images, sites="1")
    found = alignment(*pair, images, sites="1", options=AlignmentOptions(resize="pool"))
    assert found["1"].samples == 120 * 9


def test_few_positions_are_the_same_in_both_networks(images, nets) -> None:
    found = alignment(nets[0], nets[0], images, sites="1", positions=5)["1"]
    assert found.samples == 600 and found.match_mean == pytest.approx(1)


def test_other_samples_are_refused(images, nets) -> None:
    other = images[0], images[1].flip(0)
    with pytest.raises(InputError, match="other targets in one batch"):
        alignment(*nets, images, sites="1", options=AlignmentOptions(data_b=other))
    with pytest.raises(InputError, match="120 samples for one network and 60"):
        alignment(*nets, images, sites="1", options=AlignmentOptions(data_b=(images[0][:60], images[1][:60])))
    loaders = [DataLoader(TensorDataset(*images), batch_size=30), [(images[0][:30], images[1][:30])]]
    with pytest.raises(InputError, match="ends before the other"):
        alignment(*nets, loaders[0], sites="1", options=AlignmentOptions(data_b=loaders[1]))
    scaled = alignment(
        nets[0], nets[0], images, sites="1", options=AlignmentOptions(data_b=(2 * images[0], images[1]))
    )
    assert scaled["1"].match_mean > 0.9


def test_what_cannot_be_aligned_is_named(images, nets) -> None:
    with pytest.raises(InputError, match="expected at least 20, or fewer blocks"):
        alignment(*nets, (images[0][:12], images[1][:12]), sites="1")
    with pytest.raises(InputError, match="nulls: got 'shufled', which is not a choice; nearest: 'shuffled'"):
        alignment(*nets, images, nulls=["shufled"])
    with pytest.raises(InputError, match="no site of Sequential"):
        alignment(*nets, images, sites="layer1")
    broken = copy.deepcopy(nets[1])
    broken[0].bias.data[2] = torch.nan
    with pytest.raises(NotFiniteError, match="network 1: unit 2 is NaN"):
        alignment(nets[0], broken, images, sites="1")


def test_dead_units_are_listed_and_left_out(images, nets) -> None:
    other = copy.deepcopy(nets[0])
    other[0].weight.data[4], other[0].bias.data[4] = 0.0, 0.7
    found = alignment(nets[0], other, images, sites="1")["1"]
    assert found.dead_b == (4,) and found.dead_a == ()
    assert found.match_mean == pytest.approx(1, abs=1e-6) and found.match.values.isfinite().all()
    assert all(row.value is None or row.value == row.value for row in found.similarities())


def test_a_pass_that_was_cut_off_goes_on(images, nets, tmp_path) -> None:
    class Killed(RuntimeError):
        pass

    class Dies(nn.Module):
        def __init__(self, net: nn.Module, after: float):
            super().__init__()
            self.net, self.left = net, after

        def forward(self, x: Tensor) -> Tensor:
            self.left -= 1
            if self.left < 0:
                raise Killed
            return self.net(x)

    class EveryStep(Checkpoint):
        def loop(self, name, steps, state, **options):
            return super().loop(name, steps, state, every=1, **options)

    whole = alignment(nets[0], nets[1], images, sites="1")
    for left in (1, 1):  # two batches; the first is not looked at again
        options = AlignmentOptions(checkpoint=EveryStep(tmp_path, {"run": 1}))
        net = Dies(nets[0], left)
        if not options.checkpoint.resumed:
            with pytest.raises(Killed):
                alignment(net, nets[1], images, sites={"net.1": "1"}, options=options)
            continue
        found = alignment(net, nets[1], images, sites={"net.1": "1"}, options=options)
    torch.testing.assert_close(found["net.1"].correlations, whole["1"].correlations)
    torch.testing.assert_close(found["net.1"].errors, whole["1"].errors)


@pytest.mark.parametrize("kind", ["double", "bfloat16", "compiled"])
def test_precision_and_compiled_networks(kind: str, images, nets) -> None:
    whole = alignment(*nets, images, sites="1")["1"]
    x = images[0]
    if kind == "compiled":
        pair = [torch.compile(net, backend="eager") for net in nets]
        found = alignment(*pair, images, sites="1")["1"]  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(found.correlations, whole.correlations)
        return
    dtype = getattr(torch, kind)
    pair = [copy.deepcopy(net).to(dtype) for net in nets]
    found = alignment(*pair, (x.to(dtype), images[1]), sites="1")["1"]
    torch.testing.assert_close(
        found.correlations, whole.correlations, rtol=0, atol=1e-5 if kind == "double" else 0.03
    )


def test_all_pairs_in_one_pass(images) -> None:
    nets = [prepared(cnn(seed)) for seed in range(3)]
    found = alignments(nets, images, sites="1")
    single = alignment(nets[1], nets[2], images, sites="1")
    torch.testing.assert_close(found.pairs[1, 2]["1"].correlations, single["1"].correlations)
    torch.testing.assert_close(found.pairs[1, 2].cka, single.cka)
    core = found.core("1", 0.0)
    assert sorted(core) == [0, 1, 2]


def test_features_of_a_dictionary_can_be_aligned(images, nets) -> None:
    turn = torch.randn(6, 10, generator=torch.Generator().manual_seed(3))
    found = alignment(nets[0], nets[0], images, sites="1", transform=lambda x: (x @ turn).relu())["1"]
    assert found.correlations.shape == (10, 10) and found.match_mean == pytest.approx(1, abs=1e-5)


def test_subspaces_without_units_are_told_apart(images, nets) -> None:
    other = copy.deepcopy(nets[0])[:1]
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q
    other[0].weight.data = torch.einsum("ij,jckl->ickl", turn, nets[0][0].weight.data)
    found = alignment(nets[0], other, images, sites="0")["0"]
    maps = found.sparse_maps()
    assert float(maps.dense_half_mse.max()) < 1e-3 < 0.05 < float(maps.single_half_mse.mean())
    rows = {row.name: row for row in found.similarities()}
    assert rows["cca"].value == pytest.approx(1, abs=1e-3) and (rows["matching"].value or 0) < 0.95
    assert not len(found.unpredicted()[0]) and not len(found.unpredicted(reverse=True)[0])


def test_language_models_meet_at_common_word_ends() -> None:
    class Words:
        """Cuts after every ``size``-th letter and after every word."""

        def __init__(self, size: int):
            self.size = size

        def __call__(self, text: str, return_offsets_mapping: bool) -> dict[str, list]:
            cuts = [0]
            for at in range(1, len(text) + 1):
                if at == len(text) or text[at] == " " or at - cuts[-1] == self.size:
                    cuts.append(at)
            pairs = list(pairwise(cuts))
            return {"input_ids": [sum(map(ord, text[a:b])) % 50 for a, b in pairs], "offset_mapping": pairs}

    class Toy(nn.Module):
        def __init__(self, seed: int):
            super().__init__()
            torch.manual_seed(seed)
            self.embed, self.mix = nn.Embedding(50, 6), nn.Linear(6, 6)

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.mix(self.embed(input_ids).cumsum(1))

    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "while",
        "another",
        "animal",
        "was",
        "looking",
        "at",
        "it",
        "from",
        "the",
        "roof",
    ]
    texts = [" ".join(words[k % 9 : k % 9 + 3 + k % 5]) for k in range(40)]
    options = AlignmentOptions(tokenizers=(Words(3), Words(2)))
    found = alignment(Toy(0), Toy(1), texts, sites="mix", options=options)["mix"]
    assert found.samples == sum(len(text.split()) for text in texts)
    same = AlignmentOptions(tokenizers=(Words(3), Words(3)))
    assert alignment(Toy(0), Toy(0), texts, sites="mix", options=same)["mix"].match_mean == pytest.approx(1)


def test_a_warning_free_pass(images, nets) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alignment(*nets, images, sites="1")
