"""What a training of an embedding is told: the loss and its numbers, checked before any work, and the modules they make."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lineament.cli.loss_options import LOSSES, NAMES, TAKES
from lineament.core import checks
from lineament.core.checks import InputError, require
from lineament.learn.projection.heads import projection_head
from lineament.learn.projection.views import VIEWS
from lineament.losses import margins
from lineament.losses.class_head import ClassHead
from lineament.losses.contrastive import NTXent, SupCon
from lineament.losses.feature_transform import NegativeInterpolation, PositiveExtrapolation
from lineament.losses.info_nce import InfoNCE, ScoreLog
from lineament.losses.queue import Queue
from lineament.losses.unpg import UNPG

_TEMPERATURE = {"supcon": 0.1, "simclr": 0.5, "moco": 0.07}
# How many numbers a margin has, where it is not one.
_NUMBERS = {"combined": 3, "magface": 2}


@dataclass(frozen=True)
class EmbeddingOptions:
    """The options of a loss for embeddings; ``None`` is the loss's own default.

    Args:
        loss: a name of :data:`lineament.cli.loss_options.LOSSES`.
        scale, margin, sigma, match, guard, unpg, sample_classes: of losses with class directions, see :mod:`lineament.losses`.
        temperature: of supcon, simclr and moco. queue, ft, ft_start: of moco.
        head, head_lr: the projection that is trained with and thrown away, and the rate of it and of the class directions.
        views: what is done to the samples at random; supcon, simclr and moco see two views of each.
        embedding: the site where the embedding passes; the output by default.
        validation_classes: the share of classes that are held out; by default 0.2, or 2 classes where that is more and 2 are left.

    Raises:
        InputError: an unknown name, a number out of its range, an option that the loss does not take.

    >>> EmbeddingOptions("arcface", margin=(0.3,)).made(10, 4).margin.m
    0.3
    >>> EmbeddingOptions("arcface", sigma=0.1)
    Traceback (most recent call last):
    ...
    lineament.core.checks.InputError: sigma: arcface takes none; elastic-arc, elastic-cos do
    """

    loss: str
    scale: float | None = None
    margin: tuple[float, ...] | None = None
    sigma: float | None = None
    match: str | None = None
    guard: str | None = None
    unpg: float | None = None
    sample_classes: float | None = None
    temperature: float | None = None
    queue: int | None = None
    ft: tuple[str, ...] | None = None
    ft_start: int | None = None
    head: str | None = None
    head_lr: float | None = None
    views: tuple[str, ...] | None = None
    embedding: str | None = None
    validation_classes: float | None = None

    def __post_init__(self) -> None:
        checks.one_of("loss", self.loss, LOSSES)
        for name, losses in TAKES.items():
            require(
                getattr(self, name) is None or self.loss in losses,
                f"{name}: {self.loss} takes none; {', '.join(losses)} do{'es' * (len(losses) == 1)}",
            )
        for name in ("margin", "ft", "views"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.margin is not None:
            count = _NUMBERS.get(self.loss, 1)
            require(
                len(self.margin) == count,
                f"margin: got {len(self.margin)} numbers, expected {count} for {self.loss}",
            )
            self._check_margin(self.margin)
        for name in self.ft or ():
            checks.one_of("ft", name, ("pos", "neg"))
        require(
            self.ft_start is None or "pos" in (self.ft or ()),
            "ft_start: it is when positives are extrapolated from; give ft pos, too",
        )
        for name in self.views or ():
            checks.one_of("views", name, VIEWS)
        require(
            self.pairs == 1 or self.views != (),
            "views: got none, expected at least one of " + ", ".join(VIEWS),
        )
        if self.head_lr is not None:
            checks.number("head_lr", self.head_lr, low=0, open_low=True)
        if self.validation_classes is not None:
            checks.number("validation_classes", self.validation_classes, low=0, high=1, open_high=True)
        self.projection(2)
        self.made(2, 2)

    def _check_margin(self, margin: tuple[float, ...]) -> None:
        """Margins make the right class harder, and an angle ends at pi."""
        if self.loss == "sphereface":
            return  # a factor, which the loss itself judges
        angles = margin
        if self.loss == "combined":
            checks.number("m1", margin[0], low=0, open_low=True)
            checks.number("m3", margin[2], low=0)
            angles = margin[1:2]
        for m in angles:
            if self.loss in ("cosface", "elastic-cos", "adaface"):
                checks.number("margin", m, low=0)
                continue
            name = "m2" if self.loss == "combined" else "margin"
            checks.number(name, m)
            require(0 <= m < math.pi, f"{name}: got {m}, expected radians in [0, pi) for {self.loss}")
        require(
            self.loss != "magface" or margin[0] <= margin[1],
            f"margin: got {','.join(map(str, margin))}, expected magface's smallest first, then its largest",
        )

    @property
    def pairs(self) -> int:
        """The views of each sample that the loss compares."""
        return 1 if LOSSES[self.loss] == "classes" else 2

    def views_of(self, images: bool) -> tuple[str, ...]:
        """What a view does to samples that are images, or are none."""
        if self.views is not None:
            return self.views
        return () if self.pairs == 1 else ("flip", "crop") if images else ("jitter", "noise")

    def projection(self, dim: int) -> nn.Module:
        """The head that is trained with and thrown away."""
        kind, _, kappa = (self.head or ("none" if self.pairs == 1 else "mlp")).partition(":")
        checks.one_of("head", kind, ("none", "linear", "mlp", "mlp2", "fixed"))
        require(not kappa or kind == "fixed", f"head: {kind} takes no number; fixed:{kappa} does")
        try:
            rate = float(kappa or 1.05)
        except ValueError:
            raise InputError(f"head: got {self.head!r}, expected a number as in fixed:1.05") from None
        return projection_head(kind, dim, kappa=checks.number("head", rate, low=0, open_low=True))  # pyright: ignore[reportArgumentType]

    def made(self, classes: int, dim: int, seed: int = 0) -> nn.Module:
        """The loss over so many classes of embeddings with so many coordinates."""
        temperature = _TEMPERATURE.get(self.loss, 1.0) if self.temperature is None else self.temperature
        if self.loss == "supcon":
            return SupCon(temperature, on_missing="skip")
        if self.loss == "simclr":
            return NTXent(temperature)
        if self.loss == "moco":
            made = {"pos": PositiveExtrapolation(start=self.ft_start or 0), "neg": NegativeInterpolation()}
            return InfoNCE(
                temperature, queue=Queue(4096 if self.queue is None else self.queue, dim, seed=seed),
                transform=[made[name] for name in dict.fromkeys(self.ft or ())], log=ScoreLog(), seed=seed,
            )  # fmt: skip
        head = ClassHead(
            classes, dim, self._margin(), 64.0 if self.scale is None else self.scale,
            sample=1.0 if self.sample_classes is None else self.sample_classes, seed=seed,
        )  # fmt: skip
        return head if self.unpg is None else UNPG(head, self.unpg)

    def _margin(self) -> margins.Margin:
        m = self.margin or ()
        guard: Any = {} if self.guard is None else {"guard": self.guard}
        if self.loss in ("elastic-arc", "elastic-cos"):
            form: Any = self.loss.removeprefix("elastic-")
            sigma: Any = {} if self.sigma is None else {"sigma": self.sigma}
            return margins.Elastic(form, *m, **sigma, match=self.match, **guard)  # pyright: ignore[reportArgumentType]
        if self.loss == "magface":
            return margins.MagFace(**({"margins": m} if m else {}), **guard)  # pyright: ignore[reportArgumentType]
        if self.loss == "sphereface":
            # On the embedding's norm, as published, it shrinks every embedding to nothing.
            return margins.SphereFace(*m, by_norm=False)
        kinds: dict[str, Any] = {
            "norm-softmax": margins.Cosine, "cosface": margins.CosFace, "arcface": margins.ArcFace,
            "combined": margins.Combined, "curricularface": margins.CurricularFace, "adaface": margins.AdaFace,
        }  # fmt: skip
        return kinds[self.loss](*m, **guard)

    def words(self) -> str:
        """The loss and what was chosen for it, as a table shows them."""
        given = {name: getattr(self, name) for name in NAMES if name != "validation_classes"}
        said = [
            f"{name.replace('_', ' ')} {','.join(map(str, v)) if isinstance(v, tuple) else v}"
            for name, v in given.items()
            if v is not None
        ]
        return ", ".join([self.loss, *said])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
