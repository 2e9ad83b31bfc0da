"""Changes that give an image one attribute of another: brightness, colour, frequencies, the object's place, a patch.

Each is ``change(x, giver)`` on batches (image, channel, height, width) in any scale; values stay within those that an image and its giver have.
What answers do under such a change, against the same change from other images, says whether they follow the attribute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Change = Callable[[Tensor, Tensor], Tensor]


def relit(x: Tensor, giver: Tensor) -> Tensor:
    """The brightness and contrast (mean and deviation over all pixels and channels) of another image.

    >>> x = torch.tensor([[[[0.0, 1.0]]]]); bool((relit(x, 3 + 2 * x) == 3 + 2 * x).all())
    True
    """
    return _clamped(_matched(x, giver, (1, 2, 3)), x, giver)


def recoloured(x: Tensor, giver: Tensor) -> Tensor:
    """The colour of another image (each channel's mean and deviation beside those of all), with the image's own brightness and contrast."""
    coloured = _matched(x, giver, (2, 3))
    return _clamped(_matched(coloured, x, (1, 2, 3)), x, giver)


def respectrum(x: Tensor, giver: Tensor, *, fine: bool) -> Tensor:
    """The amplitudes of another image's frequencies, above an eighth of a cycle a pixel or below, with the image's own phases (of its grey) and mean."""
    own, other = torch.fft.rfft2(x.float()), torch.fft.rfft2(giver.float())
    down = torch.fft.fftfreq(x.shape[-2], device=x.device)[:, None]
    across = torch.fft.rfftfreq(x.shape[-1], device=x.device)
    radius = (down.square() + across.square()).sqrt()
    band = radius >= 0.125 if fine else (radius < 0.125) & (radius > 0)
    # All channels turn alike, since phases of their own would tear a pattern of one colour apart.
    turn = own.sum(1, keepdim=True) * other.sum(1, keepdim=True).conj()
    turned = other * turn / turn.abs().clamp_min(1e-12)
    changed = torch.fft.irfft2(torch.where(band, turned, own), s=x.shape[-2:])
    return _clamped(changed.to(x.dtype), x, giver)


def moved(x: Tensor, giver: Tensor) -> Tensor:
    """The image rolled so that its half-size window of most contrast comes to lie where another's does."""
    shift = _busiest(giver) - _busiest(x)
    height, width = x.shape[-2:]
    down = (torch.arange(height, device=x.device) - shift[:, :1]) % height
    across = (torch.arange(width, device=x.device) - shift[:, 1:]) % width
    image = torch.arange(len(x), device=x.device)[:, None, None]
    return x[image, :, down[:, :, None], across[:, None, :]].movedim(-1, 1)


def pasted(x: Tensor, giver: Tensor, to: Tensor, taken: Tensor, patch: tuple[int, int]) -> Tensor:
    """Images with a patch at ``to`` (image, 2: top and left) that is cut from other images at ``taken``."""
    down, across = (torch.arange(side) for side in patch)
    image = torch.arange(len(x))[:, None, None]

    def at(corner: Tensor) -> Any:
        return image, slice(None), (corner[:, :1] + down)[:, :, None], (corner[:, 1:] + across)[:, None, :]

    x = x.clone()
    x[at(to)] = giver[at(taken)]
    return x


def _matched(x: Tensor, giver: Tensor, over: tuple[int, ...]) -> Tensor:
    """The mean and deviation of another image over some dimensions; contrast is raised at most fourfold, which else would be noise."""
    mean, deviation = x.mean(over, keepdim=True), x.std(over, keepdim=True, correction=0)
    wanted = giver.std(over, keepdim=True, correction=0)
    gain = (wanted / deviation.clamp_min(1e-12)).clamp(0.0, 4.0)
    return (x - mean) * gain + giver.mean(over, keepdim=True)


def _clamped(changed: Tensor, x: Tensor, giver: Tensor) -> Tensor:
    """Within the values that an image and its giver have, channel by channel: what is changed stays an image, whichever others share its batch."""
    over = (2, 3)
    low = torch.minimum(x.amin(over, keepdim=True), giver.amin(over, keepdim=True))
    high = torch.maximum(x.amax(over, keepdim=True), giver.amax(over, keepdim=True))
    return changed.clamp(low, high)


def _busiest(x: Tensor) -> Tensor:
    """Where the half-size window of most contrast lies: (image, 2), its top and left."""
    height, width = x.shape[-2:]
    middle = x.flatten(2).median(2).values[..., None, None]
    energy = (x - middle).float().square().sum(1, keepdim=True)
    sums = F.avg_pool2d(energy, (max(1, height // 2), max(1, width // 2)), stride=1)[:, 0]
    best = sums.flatten(1).argmax(1)
    return torch.stack([best // sums.shape[2], best % sums.shape[2]], 1)
