"""What is in a frame? DINOv2's semantics, fused with a residual network's detail at 1/16, 1/8 and 1/4 of its size.

Both backbones are transformers' own, built from a configuration; nothing is downloaded. The semantics never receive a gradient, neither do
the 1x1 convolution and the batch norm behind them: as in the published training, they keep their first values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checks import require
from lineament.modules.colormnet.configuration import ColorMNetConfig


class FrameFeatures(NamedTuple):
    """A frame's key, shrinkage and selection [batch, channels, h, w], and its maps at 1/16, 1/8 and 1/4."""

    key: Tensor
    shrinkage: Tensor
    selection: Tensor
    f16: Tensor
    f8: Tensor
    f4: Tensor


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each pixel."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.bias, self.eps = (
            nn.Parameter(torch.ones(width)),
            nn.Parameter(torch.zeros(width)),
            eps,
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, self.eps).movedim(
            -1, 1
        )


class CrossChannelAttention(nn.Module):
    """Attention between channels: o = conv(softmax(τ q̂ k̂ᵀ) v), q̂ and k̂ of length one along the pixels."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.to_q, self.to_k, self.to_v = (nn.Conv2d(width, 2 * width, 1) for _ in range(3))
        self.to_q_dw, self.to_k_dw, self.to_v_dw = (
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width) for _ in range(3)
        )
        self.to_out = nn.Sequential(nn.Conv2d(2 * width, width, 1))

    def forward(self, asks: Tensor, answers: Tensor) -> Tensor:
        """Head by head: queries, keys and values of all are several times as large as the maps."""
        out: Any = self.to_out[0]
        width, total = out.weight.shape[1] // self.heads, out.bias[:, None]
        for head in range(self.heads):
            part = slice(head * width, (head + 1) * width)
            q = _unit(_channels(self.to_q, self.to_q_dw, asks, part))
            k = _unit(_channels(self.to_k, self.to_k_dw, answers, part))
            weights = (q @ k.mT * self.temperature[head]).softmax(-1)
            del q, k
            v = _channels(self.to_v, self.to_v_dw, answers, part)
            # The last convolution is a product, (W P) V = W (P V), which adds up over heads.
            weights = out.weight[:, part, 0, 0] @ weights
            total = torch.baddbmm(total, weights, v) if head == 0 else total.baddbmm_(weights, v)
        return total.unflatten(2, asks.shape[2:])


def _channels(pointwise: nn.Conv2d, depthwise: nn.Conv2d, x: Tensor, part: slice) -> Tensor:
    """Some of the channels that a 1x1 and a depthwise convolution give, [batch, channels, pixels]."""
    bias, more = pointwise.bias, depthwise.bias
    x = F.conv2d(x, pointwise.weight[part], None if bias is None else bias[part])
    weight = depthwise.weight[part]
    x = F.conv2d(
        x, weight, None if more is None else more[part], padding=depthwise.padding, groups=len(weight)
    )
    return x.flatten(2)


def _unit(x: Tensor) -> Tensor:
    """Rows of length one; F.normalize of long rows takes many times as long on processors."""
    low = x.dtype in (torch.float16, torch.bfloat16)
    squares = (x.float() if low else x).square().sum(-1, keepdim=True)
    return (x / squares.clamp_min(1e-24).sqrt()).to(x.dtype)


class FusionBlock(nn.Module):
    """Semantics ask, detail answers, semantics are the residual: relu(LN(attention(LN(E), LN(detail)) + E)), E = conv3x3(semantics)."""

    def __init__(self, semantics: int, width: int, heads: int, *, eps: float = 1e-6):
        super().__init__()
        self.encode_enc = nn.Conv2d(semantics, width, 3, padding=1)
        self.norm1, self.norm2, self.norm3 = (ChannelNorm(width, eps) for _ in range(3))
        self.crossattn = CrossChannelAttention(width, heads)

    def forward(self, semantics: Tensor, detail: Tensor, factor: int = 1) -> Tensor:
        """The fused map, at the detail's size; ``factor``: how much larger that is than the semantics' (bilinear)."""
        encoded = conv_of_upsampled(self.encode_enc, semantics, factor)
        return self.norm3(self.attended(encoded, detail) + encoded).relu()

    def attended(self, encoded: Tensor, detail: Tensor) -> Tensor:
        """The answer of the detail, before residual and norm."""
        return self.crossattn(self.norm1(encoded), self.norm2(detail))


class Joined(nn.Module):
    """Semantics and detail joined by a convolution: what fusion is compared with."""

    def __init__(self, semantics: int, width: int):
        super().__init__()
        self.join = nn.Conv2d(semantics + width, width, 3, padding=1)

    def forward(self, semantics: Tensor, detail: Tensor, factor: int = 1) -> Tensor:
        return self.join(torch.cat([upsampled(semantics, factor), detail], 1)).relu()


class Projected(nn.Module):
    """Semantics alone, at the detail's width."""

    def __init__(self, semantics: int, width: int):
        super().__init__()
        self.project = nn.Conv2d(semantics, width, 3, padding=1)

    def forward(self, semantics: Tensor, detail: Tensor | None, factor: int = 1) -> Tensor:
        return conv_of_upsampled(self.project, semantics, factor).relu()


def upsampled(x: Tensor, factor: int) -> Tensor:
    """``factor`` times as large, bilinear."""
    return x if factor == 1 else F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def conv_of_upsampled(conv: nn.Conv2d, x: Tensor, factor: int) -> Tensor:
    """conv3x3(upsampled(x)), exactly, with factor² times fewer multiplications.

    Up-sampling acts on each channel alone, so that it may come after a 1x1 product: each of the nine taps is a product at the small size,
    up-sampled and shifted. Both act on columns and rows one after the other, as matrices: three taps along columns, then their sums along rows.
    """
    # Where the convolution widens by much, nine products at the small size cost more than they save.
    if factor == 1 or 9 * conv.out_channels > 4 * factor**2 * conv.in_channels:
        return conv(upsampled(x, factor))
    weight = conv.weight.permute(3, 0, 2, 1).flatten(0, 2)  # column, channel, row
    taps = F.conv2d(x, weight[:, :, None, None]).unflatten(1, (3, conv.out_channels, 3))
    rows, columns = (_up_and_shift(side, factor, x) for side in x.shape[2:])
    wide = taps[:, 0] @ columns[0].mT
    for column in (1, 2):
        wide += taps[:, column] @ columns[column].mT
    del taps
    wide = wide.flatten(2, 3).flatten(0, 1)  # [batch * channels, taps * height, width]
    high = torch.bmm(rows.movedim(0, 1).flatten(1).expand(len(wide), -1, -1), wide)
    high = high.unflatten(0, (len(x), conv.out_channels))
    return high if conv.bias is None else high.add_(conv.bias[:, None, None])


def _up_and_shift(side: int, factor: int, like: Tensor) -> Tensor:
    """What makes a line ``factor`` times as long (bilinear) and shifts it by each tap of a convolution by three, [3, factor * side, side]."""
    lines = torch.eye(side, device=like.device, dtype=torch.float64)[None]
    up = F.interpolate(lines, scale_factor=factor, mode="linear", align_corners=False)[0].mT
    padded = F.pad(up, (0, 0, 1, 1))
    return torch.stack([padded[k : k + len(up)] for k in range(3)]).to(like.dtype)


def resampled_positions(
    table: Tensor,
    grid: tuple[int, int],
    *,
    offset: float = 0.1,
    mode: str = "bicubic",
    source: tuple[int, int] | None = None,
) -> Tensor:
    """A ViT's position embeddings [1, 1 + patches, width] for another grid of patches, as DINOv2 resamples them.

    By the factor (grid + offset) / source, in float32; transformers resamples by size instead, which gives other features.
    """
    patches = table.shape[1] - 1
    source = source or (round(patches**0.5),) * 2
    require(source[0] * source[1] == patches, f"table: has {patches} patches, which are no grid of {source}")
    if grid == source:
        return table
    small = table[:, 1:].float().unflatten(1, source).permute(0, 3, 1, 2)
    how: dict[str, Any] = {"size": grid}
    if offset:
        how = {"scale_factor": tuple((new + offset) / old for new, old in zip(grid, source))}
    large = F.interpolate(small, mode=mode, align_corners=False, **how)
    return torch.cat([table[:, :1].float(), large.flatten(2).mT], 1).to(table.dtype)


class Semantics(nn.Module):
    """DINOv2's last blocks, each behind the final norm, joined, projected and resized from 1/patch to 1/16."""

    def __init__(self, config: ColorMNetConfig):
        super().__init__()
        transformers = _transformers()
        self.backbone = transformers.Dinov2Model(
            transformers.Dinov2Config(
                hidden_size=config.dino_width, num_hidden_layers=config.dino_layers, num_attention_heads=config.dino_heads,
                image_size=config.dino_image, patch_size=config.dino_patch,
            )
        )  # fmt: skip
        width = config.semantics_width
        self.conv3, self.bn3 = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.taken, self.patch = config.dino_taken, config.dino_patch

    @torch.no_grad()
    def forward(self, frame: Tensor) -> Tensor:
        vit = self.backbone
        grid = (frame.shape[2] // self.patch, frame.shape[3] // self.patch)
        table = vit.embeddings.position_embeddings
        tokens = vit.embeddings.patch_embeddings(frame)
        tokens = torch.cat([vit.embeddings.cls_token.expand(len(frame), -1, -1), tokens], 1)
        tokens = tokens + resampled_positions(table, grid)
        kept = []
        for index, layer in enumerate(vit.encoder.layer):
            tokens = layer(tokens)
            tokens = tokens[0] if isinstance(tokens, tuple) else tokens  # transformers before 5
            if index >= len(vit.encoder.layer) - self.taken:
                kept.append(vit.layernorm(tokens)[:, 1:])
        x = torch.cat(kept, 2).mT.unflatten(2, grid)
        x = self.bn3(self.conv3(x)).relu()
        size = [int(side * self.patch / 16) for side in grid]
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def residual_network(
    stem: int, stages: tuple[int, ...], depths: tuple[int, ...], layer_type: str, channels: int
) -> nn.Module:
    """transformers' residual network without its head."""
    transformers = _transformers()
    return transformers.ResNetModel(
        transformers.ResNetConfig(
            num_channels=channels,
            embedding_size=stem,
            hidden_sizes=list(stages),
            depths=list(depths),
            layer_type=layer_type,
        )
    )


def stages_of(network: Any, x: Tensor) -> list[Tensor]:
    """The output of each stage."""
    x, found = network.embedder(x), []
    for stage in network.encoder.stages:
        x = stage(x)
        found.append(x)
    return found


class FrameEncoder(nn.Module):
    """The maps of a frame at 1/16, 1/8 and 1/4."""

    def __init__(self, config: ColorMNetConfig):
        super().__init__()
        self.kind = config.encoder
        if self.kind != "dino":
            self.detail = residual_network(config.stem, config.stages, config.depths, config.layer_type, 3)
        if self.kind != "resnet":
            self.network2 = Semantics(config)
            kinds = {"fusion": FusionBlock, "concatenation": Joined, "dino": Projected}
            heads = {"heads": config.fusion_heads} if self.kind == "fusion" else {}
            self.fuse3, self.fuse2, self.fuse1 = (
                kinds[self.kind](config.semantics_width, width, **heads) for width in config.stages
            )

    def forward(self, frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        details = [] if self.kind == "dino" else stages_of(self.detail, frame)[::-1]
        if self.kind != "resnet":
            semantics, fuse = self.network2(frame), (self.fuse1, self.fuse2, self.fuse3)
            details = [f(semantics, d, 2**k) for k, (f, d) in enumerate(zip(fuse, details or [None] * 3))]
        f16, f8, f4 = details
        return f16, f8, f4


class KeyProjection(nn.Module):
    """Key, shrinkage conv² + 1 and selection σ(conv) of the map at 1/16."""

    def __init__(self, inside: int, key: int):
        super().__init__()
        self.key_proj, self.d_proj, self.e_proj = (
            nn.Conv2d(inside, width, 3, padding=1) for width in (key, 1, key)
        )
        for name, parameter in self.key_proj.named_parameters():
            (nn.init.orthogonal_ if name == "weight" else nn.init.zeros_)(parameter)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.key_proj(x), self.d_proj(x) ** 2 + 1, self.e_proj(x).sigmoid()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "ColorMNet's backbones are transformers' own: pip install 'lineament[hub]'"
        ) from error
    return transformers
