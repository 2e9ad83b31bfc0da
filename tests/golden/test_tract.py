"""The TrAct gradient against the numbers of the authors' code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.golden.common import files
from torch import nn

from lineament.learn.tract.layer import tract

NEEDED = {"x", "weight", "z", "grad_z", "lam", "grad_weight", "grad_weight_vanilla", "grad_input"}


def cases() -> list[tuple[Path, str]]:
    return [
        (path, case)
        for path in files("tract")
        for case in sorted({key.partition("__")[0] for key in np.load(path, allow_pickle=False).files})
    ]


def load(path: Path, case: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    stored = np.load(path, allow_pickle=False)
    found = {k.partition("__")[2]: stored[k] for k in stored.files if k.partition("__")[0] == case}
    return {
        k: torch.from_numpy(np.asarray(v)).to(dtype)
        if np.asarray(v).dtype.kind == "f"
        else torch.from_numpy(np.asarray(v))
        for k, v in found.items()
    }


def layer_of(arrays: dict[str, torch.Tensor]) -> nn.Module:
    weight, bias = arrays["weight"], arrays.get("bias")
    if weight.ndim == 2:
        layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    else:
        kind = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[weight.ndim]
        dims = weight.ndim - 2

        def sizes(name: str, default: int):
            values = np.atleast_1d(arrays[name].numpy()).astype(int).tolist() if name in arrays else [default]
            return tuple(values * dims) if len(values) == 1 else tuple(values)

        groups = int(arrays["groups"]) if "groups" in arrays else 1
        layer = kind(
            weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), stride=sizes("stride", 1),
            padding=sizes("padding", 0), dilation=sizes("dilation", 1), groups=groups, bias=bias is not None,
        )  # fmt: skip
    layer.to(weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


@pytest.mark.parametrize("path", files("tract"), ids=lambda p: p.name)
def test_every_file_is_recognised(path):
    assert path.suffix == ".npz", f"{path.name}: no adapter reads this file"
    known = NEEDED | {"bias", "grad_bias", "stride", "padding", "dilation", "groups"}
    for _, case in (c for c in cases() if c[0] == path):
        arrays = set(load(path, case, torch.double))
        assert arrays >= NEEDED, f"{case}: lacks {sorted(NEEDED - arrays)}"
        assert arrays <= known, f"{case}: no adapter reads {sorted(arrays - known)}"


@pytest.mark.parametrize("dtype", [torch.double, torch.float], ids=["float64", "float32"])
@pytest.mark.parametrize(("path", "case"), cases(), ids=lambda v: v if isinstance(v, str) else v.stem)
@pytest.mark.filterwarnings("ignore:.*mean square of its inputs")
def test_gradients_are_those_of_the_official_code(path, case, dtype):
    arrays = load(path, case, dtype)
    layer, x = layer_of(arrays), arrays["x"].clone().requires_grad_()
    if dtype == torch.double:
        tolerance = 1e-9
    else:
        tolerance = 1e-2 if "illcond" in case else 1e-4
    output = layer(x)

    def close(found, name):
        expected = arrays[name]
        assert found.shape == expected.shape
        error = float((found - expected).abs().max() / expected.abs().max())
        assert error <= tolerance, f"{name}: {error:.1e} of the largest entry"

    close(output.detach(), "z")
    vanilla = torch.autograd.grad(output, layer.weight, arrays["grad_z"])[0]
    close(vanilla, "grad_weight_vanilla")
    with tract(layer, lam=float(arrays["lam"])):
        layer(x).backward(arrays["grad_z"])
    close(layer.weight.grad, "grad_weight")
    close(x.grad, "grad_input")
    if "bias" in arrays:
        close(layer.bias.grad, "grad_bias")
