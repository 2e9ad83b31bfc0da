"""Wrapped models (torch.compile, DataParallel) are the models in them; reparametrised weights are weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from lineament.audit.run import audit
from lineament.core.curvature.matrices import hessian
from lineament.core.gradients import per_sample_gradients
from lineament.core.sites.activations import capture, record
from lineament.load.models import load_model
from lineament.measure.landscape.axes import random_axes
from lineament.measure.landscape.grids import line

WRAPPERS = {
    "compile": lambda net: torch.compile(net, backend="eager"),
    "DataParallel": nn.DataParallel,
    "both": lambda net: nn.DataParallel(torch.compile(net, backend="eager")),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(40, 4, generator=generator), torch.arange(40) % 3


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapped_model_is_the_model_in_it(kind):
    net, (x, y) = network(), data()
    wrapped = WRAPPERS[kind](net)
    first = next(name for name, _ in wrapped.named_parameters())
    assert load_model(wrapped).model is net
    assert torch.equal(record(wrapped, x, "1")["1"], record(net, x, "1")["1"])
    with capture(wrapped, first.removesuffix(".weight")) as acts:
        wrapped(x)
    assert torch.allclose(acts[first.removesuffix(".weight")], net[0](x))
    ours = hessian(wrapped, F.cross_entropy, [(x, y)], params=first)
    assert ours.names == ("0.weight",) or list(ours.names) == ["0.weight"]
    v = torch.ones(ours.shape[0])
    assert torch.allclose(ours @ v, hessian(net, F.cross_entropy, [(x, y)], params="0.weight") @ v)
    assert per_sample_gradients(wrapped, F.cross_entropy, x, y).keys() == dict(net.named_parameters()).keys()
    axis = random_axes(net, count=1, seed=0)[0]
    found = line(wrapped, F.cross_entropy, [(x, y)], axis, steps=3)
    assert torch.allclose(found.loss, line(net, F.cross_entropy, [(x, y)], axis, steps=3).loss)
    line(net, F.cross_entropy, [(x, y)], random_axes(wrapped, count=1, seed=0)[0], steps=3)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapped_model_is_audited(kind, tmp_path):
    found = audit(
        WRAPPERS[kind](network()), data(), out=tmp_path / "r", lenses=["accuracy", "collapse", "spectrum"]
    )
    assert [s.sentence for s in found.sections if s.status in ("failed", "skipped")] == []


REPARAMETRISED = {
    "weight norm": parametrizations.weight_norm,
    "old weight norm": nn.utils.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "old spectral norm": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REPARAMETRISED)
def test_reparametrised_weights_are_audited_and_trained(kind, tmp_path):
    import numpy as np

    from lineament.cli import main

    make = REPARAMETRISED[kind]

    def built():
        torch.manual_seed(0)
        return nn.Sequential(make(nn.Conv2d(1, 4, 3)), nn.ReLU(), nn.Flatten(), make(nn.Linear(144, 3)))

    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(48, 1, 8, 8, generator=generator), torch.arange(48) % 3
    net = built().eval()
    before = net(x)
    found = audit(net, (x, y), out=tmp_path / "r", lenses=["accuracy", "collapse", "spectrum"])
    assert [s.sentence for s in found.sections if s.status in ("failed", "skipped")] == []
    assert torch.allclose(net(x), before)
    source = {
        "weight norm": "parametrizations.weight_norm", "old weight norm": "nn.utils.weight_norm", "spectral norm": "parametrizations.spectral_norm",
        "old spectral norm": "nn.utils.spectral_norm", "orthogonal": "parametrizations.orthogonal",
        "pruned": "lambda m: prune.random_unstructured(m, 'weight', 0.5)",
    }[kind]  # fmt: skip
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\nfrom torch.nn.utils import parametrizations, prune\n"
        f"w = {source}\ndef make():\n    torch.manual_seed(0)\n    return nn.Sequential(w(nn.Conv2d(1, 4, 3)), nn.ReLU(), nn.Flatten(), w(nn.Linear(144, 3)))\n"
    )
    np.savez(tmp_path / "d.npz", x=x.numpy(), y=y.numpy())
    model, file = f"{tmp_path}/net.py:make", f"{tmp_path}/d.npz"
    assert main(["train", model, file, "--out", str(tmp_path / "t"), "--epochs", "1"]) == 0
    weights = str(next((tmp_path / "t").glob("*.safetensors")))
    assert (
        main(
            ["audit", model, file, "--weights", weights, "--out", str(tmp_path / "a"), "--lenses", "accuracy"]
        )
        == 0
    )
