"""Models that Accelerate has spread over devices, or keeps on the CPU or a disk, are audited where they lie."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.audit import audit
from lineament.core.checks import InputError
from lineament.core.curvature.matrices import hessian
from lineament.core.models import device_of, held_weights
from lineament.explain import saliency
from lineament.load.weights import digest

accelerate = pytest.importorskip("accelerate")
CPU = torch.device("cpu")


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)).eval()


def spread(how: str, folder: str) -> nn.Module:
    if how == "cpu":
        return accelerate.dispatch_model(network(), {"": "cpu"}, force_hooks=True)
    if how == "offloaded":
        return accelerate.cpu_offload(network(), execution_device=CPU)
    if how == "disk":
        return accelerate.disk_offload(network(), folder, execution_device=CPU)
    places = {"0": "disk", "1": "cpu", "2": "cpu", "3": "cpu"}
    return accelerate.dispatch_model(
        network(), places, main_device="cpu", offload_dir=folder, force_hooks=True
    )


KINDS = ("cpu", "offloaded", "disk", "one layer on disk")


LENSES = ["accuracy", "collapse", "parts"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The report of the same network in one place."""
    return audit(network(), "digits", out=tmp_path_factory.mktemp("plain"), lenses=LENSES, samples=60)


@pytest.mark.parametrize("how", ["offloaded", "one layer on disk"])
def test_a_spread_model_is_audited_where_it_lies(how, plain, tmp_path):
    model = spread(how, str(tmp_path / "weights"))
    before, empty = digest(model), [p.is_meta for p in model.parameters()]
    found = audit(model, "digits", out=tmp_path / "spread", lenses=LENSES, samples=60)
    assert digest(model) == before and [p.is_meta for p in model.parameters()] == empty
    for one, other in zip(found.sections, plain.sections):
        assert (one.name, one.status, one.number, one.sentence) == (
            other.name,
            other.status,
            other.number,
            other.sentence,
        )


def test_maps_of_a_spread_model_are_those_of_the_whole(tmp_path):
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    maps = [saliency(net, x, 1, site="1") for net in (network(), spread("one layer on disk", str(tmp_path)))]
    torch.testing.assert_close(*maps)


@pytest.mark.parametrize("how", KINDS)
def test_its_weights_are_found_where_they_lie(how, tmp_path):
    model = spread(how, str(tmp_path))
    assert device_of(model) == CPU
    held = dict(held_weights(model))
    for name, value in network().state_dict().items():
        torch.testing.assert_close(held[name], value)
    assert digest(spread(how, str(tmp_path))) == digest(model)


@pytest.mark.parametrize("how", ["offloaded", "disk"])
def test_what_needs_the_weights_themselves_says_why_it_cannot(how, tmp_path):
    model = spread(how, str(tmp_path / "weights"))
    found = audit(model, "digits", out=tmp_path / "r", lenses=["landscape", "redundancy"], samples=60)
    assert [section.status for section in found.sections] == ["skipped", "skipped"]
    assert all("kept elsewhere" in section.sentence for section in found.sections)
    with pytest.raises(InputError, match=r"'0.weight' lies elsewhere"):
        hessian(model, nn.functional.cross_entropy, [(torch.zeros(2, 1, 8, 8), torch.zeros(2).long())])


def test_a_model_without_values_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"'0.weight' has no values"):
        audit(network().to("meta"), "digits", out=tmp_path / "r", samples=60)
