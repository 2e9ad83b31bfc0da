"""The kernels for GPUs give what the copies of chosen blocks give: here in Triton's interpreter, where Triton is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from lineament.core.checks import InputError
from lineament.modules import attend, select

# batch, key heads, group, tokens, size of keys and of values; block size, blocks.
SHAPES = {
    "four": (1, 2, 4, 33, 16, 16, 8, 2),
    "seven, of odd sizes": (2, 1, 7, 21, 12, 20, 5, 3),
    "blocks of one": (1, 2, 2, 13, 8, 8, 1, 4),
    "blocks of several chunks": (1, 1, 12, 150, 8, 8, 70, 2),
}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_in_the_interpreter():
    # The interpreter must be chosen before Triton is imported.
    known = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=known, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == list(SHAPES)


def test_without_a_gpu_it_is_refused():
    x = torch.randn(1, 2, 9, 4)
    with pytest.raises(InputError, match="'triton' does not run on cpu here, expected CUDA tensors"):
        attend(x, x, x, block_size=4, blocks=2, backend="triton")


def agree(name: str) -> None:
    batch, heads, group, tokens, size, width, block_size, blocks = SHAPES[name]
    torch.manual_seed(0)
    q = torch.randn(batch, tokens, heads * group, size).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(batch, heads, tokens, x, requires_grad=True) for x in (size, width))
    position = torch.arange(tokens)
    irregular = {
        "padding": (position >= 2 * torch.arange(batch)[:, None] + 1).long(),
        "documents": ((position + torch.arange(batch)[:, None]) // (tokens // 2 + 2)).long(),
    }
    for scoring, past in (("dot", {}), ("group_softmax", irregular)):
        selection = select(q, k, block_size=block_size, blocks=blocks, scoring=scoring, **past)
        found = []
        for backend in ("gather", "triton"):
            one = attend(q, k, v, selection, scale=0.7, backend=backend)
            visible = torch.where(one.lse.isinf(), 0, one.lse)
            goal = (one.output * torch.linspace(0, 1, width)).sum() + visible.square().sum()
            found.append([one.output, one.lse, *torch.autograd.grad(goal, (q, k, v))])
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    low = [x.detach().half().requires_grad_() for x in (q, k, v)]
    both = [attend(*low, selection, scale=0.7, backend=x).output for x in ("gather", "triton")]
    weights = torch.linspace(0, 1, width)
    gradients = [torch.autograd.grad((x.float() * weights).sum(), low) for x in both]
    torch.testing.assert_close(both[1], both[0], rtol=0, atol=4e-3)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-2)


def several_parts() -> None:
    from lineament.modules.sparse_attention.backends import triton

    triton.SHARES = 3000
    agree("four")


if __name__ == "__main__":
    for shape in SHAPES:
        agree(shape)
        print(shape)
    several_parts()
