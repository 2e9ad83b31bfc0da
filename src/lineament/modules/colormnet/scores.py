"""How good are the colours of a film? PSNR, right and as published, colour consistency over time, colourfulness.

The published PSNR subtracts and squares bytes, modulo 256: it cannot fall below 24 dB and says more than is true. ``psnr_legacy`` repeats it, for
comparison with published figures only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lineament.core.checks import number, require, show
from lineament.core.pictures import psnr, ssim
from lineament.modules.colormnet.colorize import colorize
from lineament.modules.colormnet.film import Colorizing
from lineament.modules.colormnet.network import ColorMNet

_STEPS = (1, 2, 4)  # frames between those whose colours are compared
Pictures = UInt8[Tensor, "*frames height width 3"]


def psnr_legacy(first: Pictures, second: Pictures) -> float:
    """PSNR with differences and squares of bytes modulo 256, as the published scripts compute it; at least 24 dB.

    >>> a, b = torch.zeros(4, 4, 3, dtype=torch.uint8), torch.full((4, 4, 3), 16, dtype=torch.uint8)
    >>> psnr_legacy(a, b)  # 16² is 0 modulo 256
    inf
    """
    first, second = _bytes("first", first), _bytes("second", second)
    require(first.shape == second.shape, f"second: got {show(second)}, expected the shape of {show(first)}")
    return float(10 * torch.log10(255**2 / _wrapped(first, second).double().mean()))


def _wrapped(first: Tensor, second: Tensor) -> Tensor:
    """Squares of differences of bytes, both modulo 256."""
    return (first.long() - second.long()).remainder(256).square().remainder(256)


def colour_consistency(film: Pictures, *, steps: tuple[int, ...] = _STEPS) -> float:
    """CDC: how far the colours' distribution moves over time; 0 where it stays.

    The Jensen-Shannon divergence (natural logarithm) of the histograms of frames t and t + d, for each colour channel; the mean over t, ``steps``
    d and channels.

    >>> colour_consistency(torch.zeros(6, 4, 4, 3, dtype=torch.uint8))
    0.0
    """
    film = _bytes("film", film)
    require(
        film.ndim == 4 and len(film) > max(steps),
        f"film: got {show(film)}, expected more than {max(steps)} frames (frames, height, width, 3)",
    )
    p = _histograms(film)
    return float(torch.stack([_divergence(p[:-step], p[step:]).mean() for step in steps]).mean())


def _histograms(film: Tensor) -> Tensor:
    """How often each byte comes in each channel of each frame, [frames, 3, 256]."""
    codes = film.flatten(1, 2).transpose(1, 2).long()
    histograms = torch.zeros(len(film), 3, 256, dtype=torch.float64, device=film.device)
    histograms.scatter_add_(2, codes, torch.ones_like(codes, dtype=torch.float64))
    return histograms / codes.shape[2]


def _divergence(a: Tensor, b: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of histograms [..., 256]."""
    middle = (a + b) / 2
    parts = [torch.special.xlogy(x, x) - torch.special.xlogy(x, middle) for x in (a, b)]
    return 0.5 * (parts[0] + parts[1]).sum(-1)


def colourfulness(picture: Pictures, *, absolute: bool = False) -> float:
    """Hasler and Süsstrunk's colourfulness, √(σ_rg² + σ_yb²) + 0.3 √(μ_rg² + μ_yb²), of one picture.

    ``absolute``: of |rg| and |yb|, as the published evaluation has it.

    >>> colourfulness(torch.full((4, 4, 3), 9, dtype=torch.uint8))
    0.0
    """
    r, g, b = _bytes("picture", picture).double().unbind(-1)
    parts = torch.stack([r - g, (r + g) / 2 - b]).flatten(1)
    parts = parts.abs() if absolute else parts
    return float(parts.std(1, correction=0).norm() + 0.3 * parts.mean(1).norm())


def frechet_distance(first: Float[Tensor, "n width"], second: Float[Tensor, "m width"]) -> float:
    """|μ1 - μ2|² + tr(Σ1 + Σ2 - 2 (Σ1 Σ2)^½) of two sets of features; of Inception-v3's pooled ones it is the FID, of others it is called by no such name.

    >>> frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0]]))
    9.0
    """
    sets = [x.double() for x in (first, second)]
    for name, x in zip(("first", "second"), sets):
        require(
            x.ndim == 2 and len(x) > 1,
            f"{name}: got {show(x)}, expected features (n, width) of two pictures or more",
        )
    (a, b), (m, n) = [x.T.cov().view(x.shape[1], -1) for x in sets], [x.mean(0) for x in sets]
    # The trace of the root of a product of covariances is that of a symmetric one.
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ b @ root).clamp_min(0).sqrt().sum()
    return float((m - n).square().sum() + a.trace() + b.trace() - 2 * shared)


class ColourScores:
    """Scores of coloured frames against the true ones, as they come, in memory that does not depend on how many; ``a + b`` is of the frames of both.

    :meth:`compute` gives means over frames: ``psnr``, ``psnr_legacy``, ``ssim`` (uniform 7x7), and of what was coloured ``cdc`` (between frames of one film, once there are
    five), ``colourfulness`` and ``colourfulness_absolute``; further ones by the names of ``metrics``, functions of coloured and true pictures [frames, 3, height, width] in [0, 1].

    >>> grey, white = torch.full((1, 8, 8, 3), 128, dtype=torch.uint8), torch.full((1, 8, 8, 3), 255, dtype=torch.uint8)
    >>> one, other = ColourScores(), ColourScores()
    >>> one.update(grey, white)
    >>> other.update(grey, white)
    >>> round((one + other).compute()["psnr"], 2), (one + other).frames
    (6.05, 2)
    """

    def __init__(self, *, metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | None = None):
        self.metrics, self.frames = dict(metrics or {}), 0
        self.sums: dict[str, float] = {}
        self.recent: list[Tensor] = []  # histograms of the film's last frames

    def update(self, found: Pictures, truth: Pictures) -> None:
        """The next frame, or some of them."""
        found, truth = (
            x[None] if x.ndim == 3 else x for x in (_bytes("found", found), _bytes("truth", truth))
        )
        require(found.shape == truth.shape, f"truth: got {show(truth)}, expected the shape of {show(found)}")
        truth = truth.to(found.device)
        for frame, true in zip(found.split(1), truth.split(1)):
            pictures = [x.movedim(3, 1).double() / 255 for x in (frame, true)]
            self._add("psnr", float(psnr(*pictures)))
            self._add("ssim", float(ssim(*pictures, form="uniform", window=7)))
            for name, metric in self.metrics.items():
                self._add(name, float(metric(*pictures).mean()))
            self._add("colourfulness", colourfulness(frame))
            self._add("colourfulness_absolute", colourfulness(frame, absolute=True))
            self._add("wrapped", float(_wrapped(frame, true).sum()))
            self._add("bytes", frame.numel())
            histogram = _histograms(frame)[0]
            for step in _STEPS:
                if len(self.recent) >= step:
                    self._add(f"moved {step}", float(_divergence(self.recent[-step], histogram).mean()))
                    self._add(f"pairs {step}", 1)
            self.recent = [*self.recent, histogram][-max(_STEPS) :]
        self.frames += len(found)

    def __add__(self, other: ColourScores) -> ColourScores:
        both = ColourScores(metrics=self.metrics)
        both.frames = self.frames + other.frames
        for name in {*self.sums, *other.sums}:
            both.sums[name] = self.sums.get(name, 0) + other.sums.get(name, 0)
        return both

    def compute(self) -> dict[str, float]:
        """The scores so far."""
        require(self.frames > 0, "scores: no frame came yet; update them first")
        sums = self.sums
        legacy = 10 * math.log10(255**2 * sums["bytes"] / sums["wrapped"]) if sums["wrapped"] else math.inf
        scores = {"psnr": sums["psnr"] / self.frames, "psnr_legacy": legacy}
        for name in ("ssim", *self.metrics, "colourfulness", "colourfulness_absolute"):
            scores[name] = sums[name] / self.frames
        if f"pairs {max(_STEPS)}" in sums:
            scores["cdc"] = mean(sums[f"moved {step}"] / sums[f"pairs {step}"] for step in _STEPS)
        return scores

    def _add(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0) + value


def score_colours(
    model: ColorMNet,
    films: Sequence[Pictures],
    *,
    options: Colorizing | None = None,
    metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
) -> dict[str, float]:
    """Every film in colour, from its first frame, against itself: means over films of what :class:`ColourScores` gives for all frames but the first.

    ``metrics`` are further ones by name, of coloured and true pictures [frames, 3, height, width] in [0, 1] (LPIPS, say, with weights of one's own).

    >>> from lineament.modules import ColorMNet, ColorMNetConfig
    >>> film = torch.randint(256, (6, 32, 32, 3), dtype=torch.uint8)
    >>> sorted(score_colours(ColorMNet(ColorMNetConfig.tiny()), [film]))
    ['cdc', 'colourfulness', 'colourfulness_absolute', 'psnr', 'psnr_legacy', 'ssim']
    """
    found: list[dict[str, float]] = []
    for film in films:
        scores = ColourScores(metrics=metrics)
        # Of each frame only the lightness is shown.
        for frame in colorize(film, {0: film[0]}, model, options=options):
            if frame.index:
                scores.update(frame.picture.cpu(), film[frame.index])
        found.append(scores.compute())
    names = dict.fromkeys(name for scores in found for name in scores)
    return {name: mean(scores[name] for scores in found if name in scores) for name in names}


def _bytes(what: str, x: Tensor) -> Tensor:
    require(
        x.dtype == torch.uint8 and x.ndim >= 3 and x.shape[-1] == 3,
        f"{what}: got {show(x)}, expected bytes of shape (..., height, width, 3)",
    )
    number(f"{what}: pixels", x.numel(), low=1, integer=True)
    return x
