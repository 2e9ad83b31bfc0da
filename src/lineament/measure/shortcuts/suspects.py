"""Which simple attribute could a network be deciding by, where nobody has named one? Suspects, ranked.

Every image has a brightness, colours, a border; every text a length and first tokens. A shortcut among these (Hermann et al. 2024, arXiv 2310.16228; Geirhos et al.
2020, arXiv 2004.07780) shows in three numbers: how well the attribute alone predicts the label (a fact of the data), how the network fares where it predicts wrongly (natural
conflicts), and how often answers follow it when two samples exchange it, against the same exchange with a sample of another answer. Only the last is an
intervention, and only by it is a suspect said to decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.model_selection import KFold, cross_val_predict
from torch import Tensor, nn

from lineament.core import checks, results
from lineament.core.batching import auto_batch, progress
from lineament.core.checks import require
from lineament.core.models import answered, decided, device_of, dtype_of, frozen
from lineament.core.results import Readable
from lineament.core.statistics.shares import Interval, difference, share
from lineament.data.samples import Samples
from lineament.load.data import load_data
from lineament.measure.shortcuts.exchanges import (
    Change,
    recoloured,
    with_border,
    with_brightness,
    with_contrast,
    with_corners,
    with_hue,
    with_sharpness,
    with_slope,
)

# The excess over the control whose lower bound must be passed before a suspect is said to decide.
DECIDES = 0.15
_SIDE = 4
_FOLDS = 3
_TOKENS = 3
Measure = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Suspect(Readable):
    """One attribute; shares with 95 % intervals.

    Attributes:
        predicts: how often it alone gives the label, on samples that it was not fitted to; ``chance`` is the share of the commonest class.
        where_right, where_wrong: the network's accuracy where the attribute gives the label, and where it does not.
        follows_wrong: of the latter samples, how many get the class that the attribute wrongly gives.
        followed: of ``pairs`` samples that get the attribute of another one, how many get that one's answer; ``control``: under the same change from a
            sample answered like themselves. ``None`` where it cannot be exchanged.
        excess: the difference of the two.
    """

    name: str
    predicts: Interval
    chance: float
    where_right: Interval
    where_wrong: Interval
    follows_wrong: Interval
    wrong: int
    samples: int
    followed: Interval | None = None
    control: Interval | None = None
    excess: Interval | None = None
    pairs: int = 0

    @property
    def decides(self) -> bool:
        """Whether answers follow it beyond the control."""
        return self.excess is not None and self.excess[1] > DECIDES

    @property
    def predictive(self) -> bool:
        """Whether it gives the label more often than chance."""
        return self.predicts[1] > self.chance

    def to_dict(self) -> dict[str, Any]:
        return results.plain({**vars(self), "decides": self.decides, "predictive": self.predictive})


@dataclass(frozen=True)
class Suspects(Readable):
    """All attributes tried, those that answers follow most first; ``receivers`` and ``givers`` are the pairs of samples that exchanged them."""

    tried: tuple[Suspect, ...]
    receivers: Tensor = field(repr=False)
    givers: Tensor = field(repr=False)
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Suspect:
        checks.one_of("attributes", name, [s.name for s in self.tried])
        return next(s for s in self.tried if s.name == name)

    @property
    def deciding(self) -> tuple[Suspect, ...]:
        return tuple(s for s in self.tried if s.decides)

    def to_dict(self) -> dict[str, Any]:
        return {
            "tried": [s.to_dict() for s in self.tried],
            "pairs": {"receivers": self.receivers.tolist(), "givers": self.givers.tolist()},
            "notes": list(self.notes),
        }

    def plot(self, ax: Any = None) -> Any:
        """How many answers follow each attribute, beside the control, and how well it alone predicts the label."""
        ax = results.axes(ax)
        names = [s.name for s in self.tried]
        at = np.arange(len(names))
        for shift, label, values in (
            (-0.25, "answers that follow it", [s.followed for s in self.tried]),
            (0.0, "control", [s.control for s in self.tried]),
            (0.25, "labels that it alone gives", [s.predicts for s in self.tried]),
        ):
            ax.barh(at + shift, [0 if v is None else v[0] for v in values], height=0.22, label=label)
        ax.set_yticks(at, names)
        ax.set(xlim=(0, 1), xlabel="share")
        ax.invert_yaxis()
        ax.legend()
        return ax


def suspects(
    model: nn.Module,
    data: Any,
    *,
    attributes: Iterable[str] | None = None,
    pairs: int = 300,
    samples: int = 2000,
    seed: int = 0,
    batch_size: int = 64,
) -> Suspects:
    """Rank the simple attributes that every sample has by how far a network's answers follow them.

    Args:
        model: a classifier of images (batch, channel, height, width) or of token ids (batch, token).
        data: as the model takes it. ``extras`` of one number a sample (a file's size, an image's aspect ratio) are suspects too, which cannot be exchanged.
        attributes: only these of :data:`IMAGE_ATTRIBUTES` or :data:`TEXT_ATTRIBUTES`.
        pairs: how many exchanges, of samples that are answered differently.
        samples: read at most so many.
        seed: of the samples, pairs and folds.

    Returns:
        :class:`Suspects`.

    Raises:
        InputError: one class only, too few samples, inputs that are neither images nor token ids, unknown attributes.

    >>> x = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)) / 2; y = torch.arange(200) % 2
    >>> x[y == 1] += 0.3
    >>> class Bright(nn.Module):
    ...     def forward(self, x): return torch.stack([0.4 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.4], 1)
    >>> found = suspects(Bright(), (x, y), attributes=["brightness", "corners"])
    >>> [s.name for s in found.deciding], found["brightness"].followed[0]
    (['brightness'], 1.0)
    """
    found = data if isinstance(data, Samples) else load_data(data, samples=samples, seed=seed)
    x = found.inputs
    if not x.is_floating_point() and x.ndim == 4:
        x = x.to(dtype_of(model)) / 255
    device, dtype = device_of(model), dtype_of(model)

    def answers(inputs: Tensor) -> Tensor:
        def part(start: int, stop: int) -> Tensor:
            batch = inputs[start:stop].to(device)
            return decided(
                answered(model, batch.to(dtype) if batch.is_floating_point() else batch, "inputs")
            ).cpu()

        with frozen(model), torch.no_grad():
            return torch.cat(list(auto_batch(part, len(inputs), most=batch_size, memory=model)))

    numbers = {name: v for name, v in found.extras.items() if v.ndim == 1 and not v.dtype.is_complex}
    return suspects_of(
        answers, x, found.targets, attributes=attributes, numbers=numbers, pairs=pairs, seed=seed
    )


def suspects_of(
    answers: Callable[[Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    *,
    attributes: Iterable[str] | None = None,
    numbers: Mapping[str, Tensor] | None = None,
    pairs: int = 300,
    seed: int = 0,
) -> Suspects:
    """The same for anything that answers: ``answers(inputs)`` gives one class a sample.

    Args:
        numbers: further attributes, one number a sample, by name.
    """
    y = checks.labels("targets", targets, count=len(inputs)).cpu()
    require(
        len(y.unique()) > 1, f"targets: all {len(y)} are of class {int(y[0])}, expected at least two classes"
    )
    require(len(y) >= 2 * _FOLDS, f"data: got {len(y)} samples, expected at least {2 * _FOLDS}")
    checks.number("pairs", pairs, low=2, integer=True)
    kinds = _kinds(inputs)
    if attributes is not None:
        wanted = [attributes] if isinstance(attributes, str) else list(attributes)
        for name in wanted:
            checks.one_of("attributes", name, kinds)
        kinds = {name: kinds[name] for name in wanted}
    said = answers(inputs)
    receivers, givers, controls = _pairs(said, pairs, seed)
    notes = [] if len(receivers) else ["It gives all samples one answer, so that nothing could be exchanged."]
    found = []
    for name, (measure, change) in progress(list(kinds.items()), "suspects"):
        values = measure(inputs).double().cpu().numpy()
        found.append(
            _suspect(name, values, y, said, seed, change, answers, inputs, (receivers, givers, controls))
        )
    for name, one in (numbers or {}).items():
        found.append(_suspect(name.replace("_", " "), one.double().cpu().numpy()[:, None], y, said, seed))
    found.sort(key=lambda s: (-(s.excess[1] if s.excess else -1.0), -s.predicts[1]))
    return Suspects(tuple(found), receivers, givers, tuple(notes))


def _suspect(
    name: str,
    values: np.ndarray,
    y: Tensor,
    said: Tensor,
    seed: int,
    change: Change | None = None,
    answers: Callable[[Tensor], Tensor] | None = None,
    inputs: Tensor | None = None,
    drawn: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Suspect:
    trees = ExtraTreesClassifier(20, min_samples_leaf=3, random_state=seed % 2**32)
    folds = KFold(_FOLDS, shuffle=True, random_state=seed % 2**32)
    vote = torch.from_numpy(cross_val_predict(trees, values, y.numpy(), cv=folds))
    right = vote == y
    chance = float(torch.bincount(y).max()) / len(y)
    exchanged: dict[str, Any] = {}
    if (
        change is not None
        and answers is not None
        and inputs is not None
        and drawn is not None
        and len(drawn[0])
    ):
        receivers, givers, controls = drawn
        x = inputs[receivers]
        goal = said[givers]
        follows = answers(change(x, inputs[givers])) == goal
        control = answers(change(x, inputs[controls])) == goal
        exchanged = {
            "followed": share(follows),
            "control": share(control),
            "excess": difference(follows, control),
            "pairs": len(receivers),
        }
    return Suspect(
        name,
        share(right),
        chance,
        share((said == y)[right]),
        share((said == y)[~right]),
        share((said == vote)[~right]),
        int((~right).sum()),
        len(y),
        **exchanged,
    )


def _pairs(said: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Receivers, givers that are answered otherwise (of every answer about as many), and controls that are answered like the receivers."""
    draw = np.random.default_rng(seed)
    answers = said.unique()
    if len(answers) < 2:
        none = torch.empty(0, dtype=torch.long)
        return none, none, none
    own = {int(a): (said == a).nonzero().flatten().numpy() for a in answers}
    rows = []
    for number in range(count):
        goal = int(answers[number % len(answers)])
        giver = draw.choice(own[goal])
        others = np.flatnonzero((said != goal).numpy())
        receiver = draw.choice(others)
        alike = own[int(said[receiver])]
        alike = alike[alike != receiver] if len(alike) > 1 else alike
        rows.append((receiver, giver, draw.choice(alike)))
    receivers, givers, controls = torch.from_numpy(np.array(rows)).unbind(1)
    return receivers, givers, controls


def _kinds(inputs: Tensor) -> dict[str, tuple[Measure, Change | None]]:
    if inputs.ndim == 4 and inputs.is_floating_point() and min(inputs.shape[-2:]) >= 4:
        out = {"channels"} if inputs.shape[1] == 1 else set()
        out |= {"hue"} if inputs.shape[1] != 3 else set()
        return {name: kind for name, kind in IMAGE_ATTRIBUTES.items() if name not in out}
    require(
        inputs.ndim == 2 and not inputs.is_floating_point(),
        f"data: got {checks.show(inputs)}, expected images (batch, channel, height, width) of at least 4 x 4 pixels, or token ids (batch, token)",
    )
    return TEXT_ATTRIBUTES


def _brightness(x: Tensor) -> Tensor:
    return x.mean((1, 2, 3))[:, None]


def _contrast(x: Tensor) -> Tensor:
    return x.std((1, 2, 3), correction=0)[:, None]


def _channels(x: Tensor) -> Tensor:
    means = x.mean((2, 3))
    return means - means.mean(1, keepdim=True)


def _hue(x: Tensor) -> Tensor:
    r, g, b = x.mean((2, 3)).unbind(1)
    return torch.atan2(3**0.5 / 2 * (g - b), r - (g + b) / 2)[:, None]


def _spectrum(x: Tensor) -> tuple[Tensor, Tensor]:
    """Energy of each frequency of the grey image, and the frequency's radius."""
    grey = x.float().mean(1)
    energy = torch.fft.rfft2(grey - grey.mean((1, 2), keepdim=True)).abs().square()
    radius = torch.hypot(
        torch.fft.fftfreq(x.shape[-2])[:, None].to(x.device), torch.fft.rfftfreq(x.shape[-1]).to(x.device)
    )
    return energy.flatten(1), radius.flatten()


def _sharpness(x: Tensor) -> Tensor:
    energy, radius = _spectrum(x)
    return (energy[:, radius > 0.25].sum(1) / energy.sum(1).clamp_min(1e-12))[:, None]


def _slope(x: Tensor) -> Tensor:
    energy, radius = _spectrum(x)
    log = radius[radius > 0].log()
    log = log - log.mean()
    return ((energy[:, radius > 0] + 1e-12).log() @ log / log.square().sum())[:, None]


def _border(x: Tensor) -> Tensor:
    width = max(1, min(x.shape[-2:]) // 16)
    sides = (x[..., :width, :], x[..., -width:, :], x[..., :width], x[..., -width:])
    return torch.cat([v.mean((2, 3)) for v in sides] + [v.std((2, 3), correction=0) for v in sides], 1)


def _corners(x: Tensor) -> Tensor:
    height, width = (-(-side // 4) for side in x.shape[-2:])
    four = (
        x[..., :height, :width],
        x[..., :height, -width:],
        x[..., -height:, :width],
        x[..., -height:, -width:],
    )
    size = min(_SIDE, height), min(_SIDE, width)
    return torch.cat([F.adaptive_avg_pool2d(corner, size).flatten(1) for corner in four], 1)


def _length(x: Tensor) -> Tensor:
    """Tokens before the padding, which is what most samples end in."""
    pad = x[:, -1].mode().values
    held = (x != pad).long() * torch.arange(1, x.shape[1] + 1, device=x.device)
    return held.amax(1)[:, None]


def _first_tokens(x: Tensor) -> Tensor:
    return x[:, :_TOKENS]


def with_length(x: Tensor, giver: Tensor) -> Tensor:
    """Texts cut to the length of others, where those are shorter.

    >>> with_length(torch.tensor([[5, 6, 7, 0]]), torch.tensor([[4, 0, 0, 0]])).tolist()
    [[5, 0, 0, 0]]
    """
    pad = torch.cat([x, giver])[:, -1].mode().values
    held = (giver != pad).long() * torch.arange(1, giver.shape[1] + 1, device=x.device)
    return torch.where(torch.arange(x.shape[1], device=x.device) < held.amax(1)[:, None], x, pad)


def with_first_tokens(x: Tensor, giver: Tensor) -> Tensor:
    """Texts that begin with the first tokens of others.

    >>> with_first_tokens(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5, 6, 7, 8]])).tolist()
    [[5, 6, 7, 4]]
    """
    return torch.cat([giver[:, :_TOKENS], x[:, _TOKENS:]], 1)


IMAGE_ATTRIBUTES: dict[str, tuple[Measure, Change | None]] = {
    "brightness": (_brightness, with_brightness),
    "contrast": (_contrast, with_contrast),
    "channels": (_channels, recoloured),
    "hue": (_hue, with_hue),
    "sharpness": (_sharpness, with_sharpness),
    "spectral slope": (_slope, with_slope),
    "border": (_border, with_border),
    "corners": (_corners, with_corners),
}
TEXT_ATTRIBUTES: dict[str, tuple[Measure, Change | None]] = {
    "length": (_length, with_length),
    "first tokens": (_first_tokens, with_first_tokens),
}
