"""Networks whose weights are held as integers by a tensor class of its own, as torchao makes them: audited, and said where gradients are asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lineament.audit import audit
from lineament.core.checks import InputError, NoGradientError
from lineament.core.curvature import hessian
from lineament.core.models import held_weights, quantised_layer
from lineament.measure.merging.merge import merge

LENSES = ["accuracy", "collapse", "spectrum", "complexity", "landscape", "redundancy"]


class Int8(torch.Tensor):
    """Integers and a scale that pass for a weight, and that a linear layer can use; all other arithmetic is refused."""

    @staticmethod
    def __new__(cls, weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        found: Any = torch.Tensor._make_subclass(cls, (weight / scale).round() * scale)
        found.made = found.as_subclass(torch.Tensor).clone()
        return found

    def dequantize(self):
        return self.made  # pyright: ignore

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("__get__", "__set__", "is_floating_point", "size", "dim", "is_complex", "requires_grad_", "data_ptr", "numel", "is_inference", "__hash__"):  # fmt: skip
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func is F.linear:
            x, weight, *rest = args
            return F.linear(x, weight.made, *rest)
        if func is torch.Tensor.detach:
            return args[0]
        raise NotImplementedError(f"Int8: attempting to run unimplemented operator {func.__name__}")


@pytest.fixture(scope="module")
def quantised():
    torch.manual_seed(0)
    head = nn.Linear(8, 3)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()
    plain = head.weight.detach().clone()
    head.weight = nn.Parameter(Int8(plain), requires_grad=False)
    return net, plain


def test_its_weights_are_read_as_real_numbers(quantised):
    net, plain = quantised
    assert quantised_layer(net) == "4 (Linear)"
    held = dict(held_weights(net))["4.weight"]
    torch.testing.assert_close(held, plain, rtol=0, atol=float(plain.abs().max()) / 100)


def test_the_audit_answers_or_says_why(quantised, tmp_path):
    net, _ = quantised
    x = torch.rand(90, 1, 8, 8)
    found = audit(net, (x, torch.arange(90) % 3), out=tmp_path / "out", lenses=LENSES)
    assert not [s.sentence for s in found.sections if s.status == "failed"]
    assert "Gradients cannot pass" in found["landscape"].sentence


def test_what_needs_gradients_or_surgery_refuses_in_one_line(quantised):
    net, _ = quantised
    x = torch.rand(6, 1, 8, 8)
    with pytest.raises(NoGradientError, match=r"quantised layer 4 \(Linear\)"):
        hessian(net, F.cross_entropy, (x, torch.zeros(6, dtype=torch.long)), params=["4.weight"])
    with pytest.raises(InputError, match=r"layer 4 \(Linear\) has quantised weights"):
        merge(net, example=x, keep=0.5)
