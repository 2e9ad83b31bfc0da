"""What was there a moment ago, near this place? Attention to a window of a neighbouring frame, in four exact forms.

att_j = softmax over the window of (<q_j / √d, k_{j+w}> + r_w(q_j)), r a 1x1 convolution of the unscaled q; places outside the frame do not
take part. "dense" is scaled_dot_product_attention with an additive bias, "shifts" a loop over the window with constant memory, "unfold"
copies each window (small maps), "flex" PyTorch's flex_attention (on GPUs). The window's order is row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checks import one_of, require, show

Form = Literal["auto", "dense", "shifts", "unfold", "flex"]
FORMS = ("auto", "dense", "shifts", "unfold", "flex")
_DENSE_PLACES = 4000  # the bias of more takes over 64 MB


def window_weights(q: Tensor, k: Tensor, relative: Tensor, reach: int, heads: int = 1) -> Tensor:
    """The attention of each place to its window, [batch, heads, (2 reach + 1)², h * w]; 0 outside the frame.

    ``relative``: [batch, heads * (2 reach + 1)², h, w].
    """
    h, w = q.shape[2:]
    q, k = (x.unflatten(1, (heads, -1)) for x in (q / math.sqrt(q.shape[1] // heads), k))
    k = F.pad(k, (reach,) * 4)
    span = range(2 * reach + 1)
    near = torch.stack([(q * k[..., y : y + h, x : x + w]).sum(2) for y in span for x in span], 2)
    scores = near.flatten(3) + relative.flatten(2).unflatten(1, (heads, -1))
    return scores.masked_fill(~_inside(h, w, reach, q.device), -math.inf).softmax(2)


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, relative: Tensor, reach: int, *, heads: int = 1, form: Form = "auto"
) -> Tensor:
    """The window's values under the attention of :func:`window_weights`, of the shape of ``v``.

    >>> q, v, none = torch.zeros(1, 2, 3, 3), torch.arange(9.0).view(1, 1, 3, 3), torch.zeros(1, 9, 3, 3)
    >>> local_attention(q, q, v, none, 1)[0, 0, 0, 0].item()  # the mean of the corner's four places
    2.0
    """
    one_of("form", form, FORMS)
    require(
        q.shape == k.shape and q.shape[2:] == v.shape[2:],
        f"k: got {show(k)}, expected the shape of q, {tuple(q.shape)}, and v of the same places",
    )
    h, w = q.shape[2:]
    if form == "auto":
        form = "dense" if h * w <= _DENSE_PLACES else "shifts"
    if form in ("dense", "flex"):
        near, far, values = (x.flatten(2).unflatten(1, (heads, -1)).mT for x in (q, k, v))
        attend = _dense if form == "dense" else _flex
        out = attend(near, far, values, relative.flatten(2).unflatten(1, (heads, -1)), h, w, reach)
        return out.mT.flatten(1, 2).unflatten(2, (h, w))
    weights = window_weights(q, k, relative, reach, heads).unflatten(3, (h, w))[:, :, :, None]
    padded = F.pad(v.unflatten(1, (heads, -1)), (reach,) * 4)
    side = 2 * reach + 1
    if form == "unfold":
        unfolded = F.unfold(padded.flatten(1, 2), side).view(len(v), heads, -1, side**2, h, w).transpose(2, 3)
        return (weights * unfolded).sum(2).flatten(1, 2)
    out = torch.zeros_like(v).unflatten(1, (heads, -1))
    for index in range(side**2):
        y, x = divmod(index, side)
        out = out + weights[:, :, index] * padded[..., y : y + h, x : x + w]
    return out.flatten(1, 2)


def _inside(h: int, w: int, reach: int, device: torch.device) -> Tensor:
    """Whether each entry of each place's window lies in the frame, [window, h * w]."""
    step = torch.arange(-reach, reach + 1, device=device)
    rows = torch.arange(h, device=device) + step[:, None]
    columns = torch.arange(w, device=device) + step[:, None]
    y, x = (rows >= 0) & (rows < h), (columns >= 0) & (columns < w)
    return (y[:, None, :, None] & x[None, :, None, :]).flatten(2).flatten(0, 1)


def _window_index(h: int, w: int, reach: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each pair of places the entry of the first's window that is the second, and whether there is one."""
    y, x = (
        torch.arange(h * w, device=device).div(w, rounding_mode="floor"),
        torch.arange(h * w, device=device) % w,
    )
    dy, dx = y[None] - y[:, None] + reach, x[None] - x[:, None] + reach
    side = 2 * reach + 1
    near = (dy >= 0) & (dy < side) & (dx >= 0) & (dx < side)
    return torch.where(near, dy * side + dx, 0), near


def _dense(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, h: int, w: int, reach: int) -> Tensor:
    index, near = _window_index(h, w, reach, q.device)
    bias = relative.mT.gather(3, index.expand(*relative.shape[:2], -1, -1)).masked_fill(~near, -math.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _flex(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, h: int, w: int, reach: int) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    side = 2 * reach + 1

    def offsets(i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        return j // w - i // w + reach, j % w - i % w + reach

    def near(b, n, i, j):
        dy, dx = offsets(i, j)
        return (dy >= 0) & (dy < side) & (dx >= 0) & (dx < side)

    def with_bias(score, b, n, i, j):
        dy, dx = offsets(i, j)
        return score + relative[b, n, (dy * side + dx).clamp(0, side**2 - 1), i]

    mask = create_block_mask(near, None, None, h * w, h * w, device=q.device)
    # Without options it returns the answer alone.
    run: Callable[..., Any] = torch.compile(flex_attention) if q.is_cuda else flex_attention
    return run(q, k, v, score_mod=with_bias, block_mask=mask)


class LocalAttention(nn.Module):
    """Attention to a window of another frame, then a depthwise 5x5 convolution and a linear map that mixes a and b.

    ``layer(q, k, v)`` with keys [batch, key, h, w] and values [batch, objects, value, h, w] gives what is added to the memory's answer.
    """

    def __init__(
        self, key: int, values: int, reach: int = 7, *, heads: int = 1, kernel: int = 5, dropout: float = 0.1
    ):
        super().__init__()
        self.reach, self.heads, self.dropout = reach, heads, dropout
        self.form: Form = "auto"
        self.relative_emb_k = nn.Conv2d(key, heads * (2 * reach + 1) ** 2, 1, groups=heads)
        depthwise = nn.Conv2d(values, values, kernel, padding=kernel // 2, groups=values, bias=False)
        self.dw_conv = nn.ModuleDict({"conv": depthwise})
        self.projection = nn.Linear(values, values)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.mapped(q, k, v.flatten(1, 2)).unflatten(1, v.shape[1:3])

    def mapped(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same of values [batch, channels, h, w]."""
        near = local_attention(q, k, v, self.relative_emb_k(q), self.reach, heads=self.heads, form=self.form)
        near = F.dropout2d(self.dw_conv["conv"](near), self.dropout, self.training)
        return self.projection(near.movedim(1, -1)).movedim(-1, 1)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """The attention itself."""
        return window_weights(q, k, self.relative_emb_k(q), self.reach, self.heads)
