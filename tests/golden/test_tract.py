"""The TrAct gradient against the numbers of the authors' code."""

from __future__ import annotations

import pytest
import torch
from tests.golden.common import File, Scope, golden
from torch import Tensor, nn

from lineament.learn.tract.layer import tract

LAYERS = {"linear": nn.Linear, "conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}


def layer_of(case: Scope, weight: Tensor) -> nn.Module:
    """The layer with the case's weight and bias."""
    kind = LAYERS[case["layer"]]
    if kind is nn.Linear:
        layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=case["bias"])
    else:
        given = {
            key: case[key]
            for key in ("kernel_size", "stride", "padding", "dilation", "groups")
            if key in case.values
        }
        sizes = {key: v.tolist() if isinstance(v, Tensor) else v for key, v in given.items()}
        inputs = weight.shape[1] * sizes.get("groups", 1)
        layer = kind(inputs, weight.shape[0], bias=case["bias"], **sizes)
    state = {"weight": weight} | ({"bias": case.input(f"{case.name}__bias")} if case["bias"] else {})
    layer.to(weight.dtype).load_state_dict(state)
    return layer


def check_layers(file: File) -> None:
    for case in file.cases:
        for dtype in case.dtypes:
            x, weight, grad_z = (
                case.input(f"{case.name}__{key}").to(dtype) for key in ("x", "weight", "grad_z")
            )
            layer = layer_of(case, weight)
            x.requires_grad_()
            z = layer(x)
            found = {"z": z, "grad_weight_vanilla": torch.autograd.grad(z, layer.weight, grad_z)[0]}
            with tract(layer, lam=case["lam"]):
                layer(x).backward(grad_z)
            found |= {"grad_weight": layer.weight.grad, "grad_input": x.grad}
            found |= {"grad_bias": layer.bias.grad} if case["bias"] else {}
            for key, value in found.items():
                case.compare(f"{case.name}__{key}", value, dtype)


pytestmark = pytest.mark.filterwarnings("ignore:.*mean square of its inputs")
test_golden, test_a_wrong_number_is_noticed = golden("tract", {"layers": check_layers})
