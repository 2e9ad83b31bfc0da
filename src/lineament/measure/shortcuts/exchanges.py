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
# No band of frequencies is raised further: what is hardly there is noise.
_MOST = 16.0


def relit(x: Tensor, giver: Tensor) -> Tensor:
    """The brightness and contrast (mean and deviation over all pixels and channels) of another image.

    >>> x = torch.tensor([[[[0.0, 1.0]]]]); bool((relit(x, 3 + 2 * x) == 3 + 2 * x).all())
    True
    """
    return _clamped(_matched(x, giver, (1, 2, 3)), x, giver)


def with_brightness(x: Tensor, giver: Tensor) -> Tensor:
    """The mean of another image.

    >>> x = torch.tensor([[[[0.25, 0.5]]]]); with_brightness(x, x + 0.25).tolist()
    [[[[0.5, 0.75]]]]
    """
    over = (1, 2, 3)
    return _clamped(x + giver.mean(over, keepdim=True) - x.mean(over, keepdim=True), x, giver)


def with_contrast(x: Tensor, giver: Tensor) -> Tensor:
    """The deviation of another image about the own mean.

    >>> x = torch.tensor([[[[0.25, 0.75]]]]); with_contrast(x, torch.tensor([[[[0.0, 0.25]]]])).tolist()
    [[[[0.375, 0.625]]]]
    """
    own = x.mean((1, 2, 3), keepdim=True)
    return _clamped(_matched(x, giver, (1, 2, 3)) - giver.mean((1, 2, 3), keepdim=True) + own, x, giver)


def recoloured(x: Tensor, giver: Tensor) -> Tensor:
    """The colour of another image (each channel's mean and deviation beside those of all), with the image's own brightness and contrast."""
    coloured = _matched(x, giver, (2, 3))
    return _clamped(_matched(coloured, x, (1, 2, 3)), x, giver)


def respectrum(x: Tensor, giver: Tensor, *, fine: bool) -> Tensor:
    """The amplitudes of another image's frequencies, above an eighth of a cycle a pixel or below, with the image's own phases (of its grey) and mean."""
    own, other = torch.fft.rfft2(x.float()), torch.fft.rfft2(giver.float())
    radius = _radius(x)
    band = radius >= 0.125 if fine else (radius < 0.125) & (radius > 0)
    # All channels turn alike, since phases of their own would tear a pattern of one colour apart.
    turn = own.sum(1, keepdim=True) * other.sum(1, keepdim=True).conj()
    turned = other * turn / turn.abs().clamp_min(1e-12)
    changed = torch.fft.irfft2(torch.where(band, turned, own), s=x.shape[-2:])
    return _clamped(changed.to(x.dtype), x, giver)


def with_hue(x: Tensor, giver: Tensor) -> Tensor:
    """All colours turned about the grey axis until the mean hue is another image's; greys and saturations stay.

    >>> red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1); green = red.roll(1, 1)
    >>> with_hue(red, green).flatten().round(decimals=3).abs().tolist()
    [0.0, 1.0, 0.0]
    """
    grey = x.mean(1, keepdim=True)
    across = torch.tensor(
        [[1.0, -0.5, -0.5], [0.0, 3**0.5 / 2, -(3**0.5) / 2]], dtype=x.dtype, device=x.device
    )
    own, other = (torch.view_as_complex((v.mean((2, 3)) @ across.T).float().contiguous()) for v in (x, giver))
    turn = other * own.conj()
    turn = torch.where(turn.abs() > 1e-12, turn / turn.abs().clamp_min(1e-12), torch.ones_like(turn))
    u, v = torch.einsum("bchw,kc->kbhw", x, across)
    c, s = turn.real.to(x)[:, None, None], turn.imag.to(x)[:, None, None]
    plane = torch.stack([c * u - s * v, s * u + c * v], 1)
    return _clamped(grey + torch.einsum("bkhw,kc->bchw", plane, across) * 2 / 3, x, giver)


def with_sharpness(x: Tensor, giver: Tensor) -> Tensor:
    """Frequencies above a quarter of a cycle a pixel raised or lowered until they hold another image's share of the energy."""
    own, other = torch.fft.rfft2(x.float()), torch.fft.rfft2(giver.float())
    radius = _radius(x)
    fine, coarse = radius > 0.25, (radius <= 0.25) & (radius > 0)
    # Of the grey images, whose sharpness is what one sees.
    greys = [v.mean(1, keepdim=True) for v in (own, other)]
    ratio = [_energy(v, fine) / _energy(v, coarse).clamp_min(1e-12) for v in greys]
    gain = (ratio[1] / ratio[0].clamp_min(1e-12)).sqrt().clamp(0.0, _MOST)
    changed = torch.fft.irfft2(torch.where(fine, own * gain, own), s=x.shape[-2:])
    return _clamped(changed.to(x.dtype), x, giver)


def with_slope(x: Tensor, giver: Tensor) -> Tensor:
    """The mean amplitude of each ring of frequencies of another image, with the image's own pattern in the ring, mean and energy."""
    own, other = torch.fft.rfft2(x.float()), torch.fft.rfft2(giver.float())
    ring = (_radius(x) * 2 * min(x.shape[-2:])).round().long()
    count = int(ring.max()) + 1

    def profile(spectrum: Tensor) -> Tensor:
        amplitude = spectrum.mean(1).abs().flatten(1)
        sums = torch.zeros(len(amplitude), count, device=x.device).index_add_(1, ring.flatten(), amplitude)
        return sums / torch.bincount(ring.flatten(), minlength=count).clamp_min(1)

    gain = (profile(other) / profile(own).clamp_min(1e-12)).clamp(0.0, _MOST)
    scaled = own * gain[:, ring][:, None]
    varied = _radius(x) > 0
    scaled = scaled * (_energy(own, varied) / _energy(scaled, varied).clamp_min(1e-12)).sqrt()
    changed = torch.fft.irfft2(torch.where(varied, scaled, own), s=x.shape[-2:])
    return _clamped(changed.to(x.dtype), x, giver)


def with_border(x: Tensor, giver: Tensor) -> Tensor:
    """The outermost pixels of another image, a sixteenth of the side wide and at least one.

    >>> with_border(torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)).sum().item()
    12.0
    """
    width = max(1, min(x.shape[-2:]) // 16)
    changed = giver.clone()
    changed[..., width:-width, width:-width] = x[..., width:-width, width:-width]
    return changed


def with_corners(x: Tensor, giver: Tensor) -> Tensor:
    """The four corners of another image, each a quarter of the side wide.

    >>> with_corners(torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)).sum().item()
    16.0
    """
    height, width = (-(-side // 4) for side in x.shape[-2:])
    changed = x.clone()
    for down in (slice(None, height), slice(-height, None)):
        for across in (slice(None, width), slice(-width, None)):
            changed[..., down, across] = giver[..., down, across]
    return changed


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


def _radius(x: Tensor) -> Tensor:
    """Of each frequency of a real image, in cycles a pixel."""
    down, across = torch.fft.fftfreq(x.shape[-2])[:, None], torch.fft.rfftfreq(x.shape[-1])
    return torch.hypot(*torch.broadcast_tensors(down, across)).to(x.device)


def _energy(spectrum: Tensor, where: Tensor) -> Tensor:
    return (spectrum.abs().square() * where).sum((1, 2, 3), keepdim=True)
