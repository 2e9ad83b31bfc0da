"""Make the object or what surrounds it easier or harder to use, in images of which it is known where the object is.

The manipulations of Hermann, Mobahi, Fel, Mozer (ICLR 2024, arXiv 2310.16228) on natural images: the size of the object, patches missing from the
background, the background's colour; and :func:`composite`, which puts any object before any background, as Waterbirds does (Sagawa et al. 2020,
arXiv 1911.08731). Images are (image, channel, height, width) in [0, 1], masks (image, height, width) or (image, 1, height, width), 1 on the object.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks

BACKGROUNDS = ("patches", "grey", "blur", "low_pass", "noise", "contrast")


def composite(
    foreground: Float[Tensor, "image channels height width"], mask: Tensor, background: Tensor
) -> Float[Tensor, "image channels height width"]:
    """Objects before other backgrounds: m f + (1 - m) b.

    >>> composite(torch.ones(1, 3, 1, 2), torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 3, 1, 2))[0, 0].tolist()
    [[1.0, 0.0]]
    """
    m = _mask(foreground, mask)
    checks.tensor("background", background, floating=True)
    checks.require(
        background.shape[-3:] == foreground.shape[-3:] and len(background) in (1, len(foreground)),
        f"background: got {checks.show(background)}, expected one of the shape of each foreground, {tuple(foreground.shape)}",
    )
    return m * foreground + (1 - m) * background


def scale_foreground(
    images: Float[Tensor, "image channels height width"],
    masks: Tensor,
    factor: float,
    *,
    fill: Tensor | float | None = None,
) -> Float[Tensor, "image channels height width"]:
    """Each object made ``factor`` times as wide and high about its centre of mass; where it was, ``fill`` shows.

    Args:
        fill: a value, images of the same shape, or ``None`` for the mean colour of each image's background.

    >>> x = torch.zeros(1, 1, 9, 9); x[..., 3:6, 3:6] = 1
    >>> scale_foreground(x, x[:, 0], 1 / 3).sum().round().item(), scale_foreground(x, x[:, 0], 1.0).sum().item()
    (1.0, 9.0)
    """
    checks.number("factor", factor, low=0, open_low=True)
    m = _mask(images, masks)
    outside = 1 - m
    if fill is None:
        colour = (images * outside).sum((2, 3), keepdim=True) / outside.sum((2, 3), keepdim=True).clamp_min(
            1e-12
        )
        empty = colour.expand_as(images)
    else:
        empty = fill.expand_as(images) if isinstance(fill, Tensor) else torch.full_like(images, float(fill))
    height, width = images.shape[-2:]
    down, across = (torch.linspace(-1 + 1 / n, 1 - 1 / n, n, dtype=images.dtype) for n in (height, width))
    weight = m[:, 0] / m[:, 0].sum((1, 2), keepdim=True).clamp_min(1e-12)
    middle = torch.stack([(weight.sum(1) * across).sum(1), (weight.sum(2) * down).sum(1)], 1)
    points = torch.stack(torch.meshgrid(down, across, indexing="ij")[::-1], -1)
    source = (points - middle[:, None, None]) / factor + middle[:, None, None]
    object_and_mask = F.grid_sample(
        torch.cat([images * m, m.expand(-1, 1, -1, -1)], 1), source, align_corners=False
    )
    moved, shown = object_and_mask[:, :-1], object_and_mask[:, -1:]
    return moved + (1 - shown) * (outside * images + m * empty)


def change_background(
    images: Float[Tensor, "image channels height width"],
    masks: Tensor | None,
    how: str,
    *,
    strength: float = 1.0,
    patch: int = 4,
    seed: int = 0,
) -> Float[Tensor, "image channels height width"]:
    """Make what lies outside the masks say less; the objects stay as they are.

    Args:
        masks: ``None`` changes the whole images.
        how: ``"patches"`` (a share ``strength`` of its squares is replaced by its mean colour), ``"grey"`` (colours move by ``strength`` towards
            grey), ``"blur"`` (by a Gaussian of ``strength`` times ``patch`` pixels), ``"low_pass"`` (frequencies above (1 - ``strength``)/2 cycles a pixel
            are taken away), ``"noise"`` (of deviation ``strength`` is added and clipped) or ``"contrast"`` (multiplied by 1 - ``strength`` about the mean).
        strength: from 0, which changes nothing, to 1.
        patch: a side in pixels.
        seed: of patches and noise.

    >>> x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)); m = torch.zeros(1, 8, 8); m[:, :4] = 1
    >>> y = change_background(x, m, "grey")
    >>> bool((y[..., :4, :] == x[..., :4, :]).all()), bool((y[:, 0, 4:] - y[:, 1, 4:]).abs().max() < 1e-6)
    (True, True)
    """
    checks.one_of("how", how, BACKGROUNDS)
    checks.number("strength", strength, low=0, high=1)
    checks.number("patch", patch, low=1, integer=True)
    empty = torch.zeros_like(images[:, :1]) if masks is None else masks
    m = _mask(images, empty)
    generator = torch.Generator().manual_seed(checks.seed("seed", seed))
    outside = 1 - m
    mean = (images * outside).sum((2, 3), keepdim=True) / outside.sum((2, 3), keepdim=True).clamp_min(1e-12)
    height, width = images.shape[-2:]
    if strength == 0:
        return images.clone()
    if how == "patches":
        down, across = -(-height // patch), -(-width // patch)
        drawn = torch.rand(len(images), 1, down, across, generator=generator).to(images)
        gone = drawn.repeat_interleave(patch, 2).repeat_interleave(patch, 3)[..., :height, :width] < strength
        changed = torch.where(gone, mean, images)
    elif how == "grey":
        changed = images + strength * (images.mean(1, keepdim=True) - images)
    elif how == "contrast":
        changed = mean + (1 - strength) * (images - mean)
    elif how == "noise":
        drawn = torch.randn(images.shape, generator=generator).to(images)
        changed = (images + strength * drawn).clamp(0, 1)
    else:
        # The object is taken out first: it would bleed into what surrounds it.
        flat = outside * images + m * mean
        radius = (torch.fft.fftfreq(height)[:, None].square() + torch.fft.rfftfreq(width).square()).sqrt()
        if how == "blur":
            kept = torch.exp(-2 * (torch.pi * radius * strength * patch) ** 2)
        else:
            kept = (radius <= (1 - strength) / 2).float()
        changed = torch.fft.irfft2(torch.fft.rfft2(flat.float()) * kept.to(images.device), s=(height, width))
    return m * images + outside * changed.to(images.dtype)


def _mask(images: Tensor, masks: Tensor) -> Tensor:
    checks.tensor("images", images, shape=("image", "channels", "height", "width"), floating=True)
    checks.tensor("masks", masks)
    m = masks[:, None] if masks.ndim == 3 else masks
    fits = m.ndim == 4 and m.shape[1] == 1 and len(m) in (1, len(images)) and m.shape[2:] == images.shape[2:]
    checks.require(
        fits,
        f"masks: got {checks.show(masks)}, expected ({len(images)}, {images.shape[2]}, {images.shape[3]}), 1 on the object",
    )
    checks.require(
        bool(((m >= 0) & (m <= 1)).all()),
        "masks: they hold values outside [0, 1], expected 1 on the object and 0 elsewhere",
    )
    return m.to(images.dtype)
