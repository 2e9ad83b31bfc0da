"""Colour a film: pictures in one by one, coloured pictures out, in memory that does not grow with the film.

The film keeps its own lightness; only chroma is predicted. Exemplars are events: each is a picture for one frame, used once, and
remembered from then on.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import InputError, number, require, show
from lineament.core.models import device_of, dtype_of
from lineament.core.pictures import lab_to_rgb, rgb_to_lab
from lineament.core.results import Readable
from lineament.load.film_frames import BT601, BT709, luma_of
from lineament.modules.colormnet.film import Colorizing, Exemplar, FilmState, padded
from lineament.modules.colormnet.network import ColorMNet

_SAME = 1.0  # mean difference of L or luma, of 100, up to which an exemplar is the frame itself in colour
_GREY = 1.0  # largest |a|, |b| of a picture without colour


@dataclass(frozen=True)
class ColouredFrame(Readable):
    """A frame in colour.

    Attributes:
        index: its place in the film.
        picture: [height, width, 3], bytes.
        ab: its chroma in Lab [2, height, width], as it was predicted.
        confidence: the mean over pixels of exp(the largest similarity to memory); 1 where memory holds the very pixel.
        cut: whether a scene was taken to begin here.

    >>> ColouredFrame(0, torch.zeros(4, 6, 3, dtype=torch.uint8), torch.zeros(2, 4, 6), 0.5).confidence
    0.5
    """

    index: int
    picture: Tensor
    ab: Tensor
    confidence: float
    cut: bool = False


def colorize(
    frames: Iterable[Any],
    exemplars: Mapping[int, Any],
    model: ColorMNet,
    *,
    options: Colorizing | None = None,
    parity: bool = False,
    reverse: bool = False,
    cuts: Iterable[int] = (),
) -> Iterator[ColouredFrame]:
    """The frames in colour, one by one, as they come.

    Args:
        frames: pictures of one size, [height, width] or [height, width, 3]: bytes, or floating point in [0, 1].
        exemplars: {frame: picture in colour}. One whose lightness or luma is the frame's own is the frame itself; another one, of any size, shows colours
            for it. The first frame needs one.
        model: in evaluation mode while it runs, afterwards as it was.
        options: see :class:`Colorizing`.
        parity: the published loop, with its rounding (bytes are cut off, not rounded).
        reverse: from the last frame to the first; ``frames`` must be a sequence.
        cuts: frames at which a new scene begins: only exemplars are remembered.

    Raises:
        InputError: no exemplar for the first frame; a frame of another size or type than the first; an exemplar past the end.

    >>> from lineament.modules import ColorMNetConfig
    >>> model = ColorMNet(ColorMNetConfig.tiny())
    >>> film = [np.full((32, 48), 90 + t, dtype=np.uint8) for t in range(3)]
    >>> red = np.full((32, 48, 3), (200, 40, 40), dtype=np.uint8)
    >>> [tuple(frame.picture.shape) for frame in colorize(film, {0: red}, model)]
    [(32, 48, 3), (32, 48, 3), (32, 48, 3)]
    """
    require(isinstance(model, ColorMNet), f"model: got {show(model)}, expected a ColorMNet")
    require(
        isinstance(exemplars, Mapping) and all(isinstance(k, int) for k in exemplars),
        f"exemplars: got {show(exemplars)}, expected a dict {{frame: picture}}, such as {{0: picture}}",
    )
    require(bool(exemplars), "exemplars: got none, expected at least one, for the first frame: {0: picture}")
    if options is None:
        options = Colorizing.published() if parity else Colorizing()
    scenes, count = set(cuts), None
    if reverse:
        require(
            isinstance(frames, (Sequence, np.ndarray, Tensor)),
            f"frames: got {show(frames)}, expected a sequence, whose last frame is known (reverse)",
        )
        whole: Any = frames
        count = len(whole)
        frames = (whole[count - 1 - t] for t in range(count))
        exemplars = {count - 1 - t: picture for t, picture in exemplars.items()}
        # A scene that begins at t ends there, seen from behind.
        scenes = {count - t for t in scenes}
    first = count - 1 if count else 0
    require(
        0 in exemplars and min(exemplars) == 0,
        f"exemplars: none is for frame {first}, which is coloured first; give {{{first}: picture}} too",
    )
    found = _run(frames, dict(exemplars), model, options, scenes, truncate=parity)
    return found if count is None else (replace(x, index=count - 1 - x.index) for x in found)


def _run(
    frames: Iterable[Any],
    exemplars: dict[int, Any],
    model: ColorMNet,
    options: Colorizing,
    scenes: set[int],
    *,
    truncate: bool,
) -> Iterator[ColouredFrame]:
    colorizer = Colorizer(model, options, truncate=truncate)
    for frame, last in with_end(frames):
        index = colorizer.done
        yield colorizer.frame(frame, exemplars.pop(index, None), scene=index in scenes, last=last)
    require(colorizer.done > 0, "frames: got none, expected at least one picture")
    if exemplars:
        warnings.warn(
            f"exemplars: the film has {colorizer.done} frames; those for frames {sorted(exemplars)} were not used",
            stacklevel=3,
        )


class Colorizer:
    """:func:`colorize` frame by frame, with a state that can be stored: ``state_dict`` and ``load_state_dict``.

    >>> from lineament.modules import ColorMNetConfig
    >>> colorizer = Colorizer(ColorMNet(ColorMNetConfig.tiny()), Colorizing())
    >>> red = np.full((32, 48, 3), (200, 40, 40), dtype=np.uint8)
    >>> colorizer.frame(red, red).confidence, colorizer.done
    (1.0, 1)
    """

    def __init__(self, model: ColorMNet, options: Colorizing, *, truncate: bool = False):
        self.model, self.options, self.truncate = model, options, truncate
        self.films = [FilmState(model, options) for _ in range(1 + options.flip)]
        self.size: tuple[int, int] | None = None

    @property
    def done(self) -> int:
        """Frames so far."""
        return self.films[0].time + 1

    def frame(
        self, picture: Any, exemplar: Any = None, *, scene: bool = False, last: bool = False
    ) -> ColouredFrame:
        """The next frame in colour; ``scene``: a new one begins here."""
        index = self.done
        rgb = as_rgb(f"frame {index}", picture).to(device_of(self.model))
        size = (rgb.shape[1], rgb.shape[2])
        first = self.size = self.size or size
        require(
            size == first,
            f"frame {index}: is {size[0]} x {size[1]}, the first was {first[0]} x {first[1]} (height x width)",
        )
        lab = rgb_to_lab(rgb)
        shown = None if exemplar is None else _lab(f"exemplar of frame {index}", exemplar, lab)
        training = self.model.training
        self.model.eval()
        try:
            ab, confidence, cut = _step(self.films, lab, shown, self.options, scene, last)
        finally:
            self.model.train(training)
        if shown is not None and _is_frame(shown, lab):
            ab = shown[1:]
        picture = as_bytes(torch.cat([lab[:1], ab]), self.truncate)
        return ColouredFrame(index, picture, ab, confidence, cut)

    def state_dict(self) -> dict[str, Any]:
        """All that the frames so far have left."""
        return {"size": list(self.size or ()), "films": [film.state_dict() for film in self.films]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a stored state."""
        size = state["size"]
        self.size = (size[0], size[1]) if size else None
        for film, stored in zip(self.films, state["films"]):
            film.load_state_dict(stored)


def _step(
    films: list[FilmState], lab: Tensor, exemplar: Tensor | None, options: Colorizing, scene: bool, last: bool
) -> tuple[Tensor, float, bool]:
    """The chroma in Lab of one frame, how sure it is, and whether a scene begins."""
    size = lab.shape[1:]
    small = _small(lab, options.max_side)
    dtype = dtype_of(films[0].model)
    lightness = ((small[:1] - 50) / 50)[None].to(dtype)
    told: dict[str, Any] = {}
    if exemplar is not None:
        other = F.interpolate(exemplar[None], size=small.shape[1:], mode="bilinear", align_corners=False)
        ab = (other[:, 1:] / 110).to(dtype)
        if _is_frame(exemplar, lab):
            told = {"given": ab}
        else:
            told = {"exemplars": [Exemplar(((other[:, :1] - 50) / 50).to(dtype), ab)]}
    found, cut = [], False
    for film, flip in zip(films, (False, True)):
        mirrored = {key: _mirrored(value) for key, value in told.items()} if flip else told
        ab = film.step(lightness.flip(-1) if flip else lightness, **mirrored, last=last, scene=scene)
        found.append(ab.flip(-1) if flip else ab)
        cut |= film.cut
    ab = torch.stack(found).mean(0) * 110
    if small.shape[1:] != size:
        ab = guided(ab, small[None, :1], lab[None, :1]) if options.guided else _resized(ab, size)
    return ab[0].to(lab.dtype), float(np.mean([film.confidence for film in films])), cut


def _mirrored(value: Any) -> Any:
    if isinstance(value, list):
        return [Exemplar(x.lightness.flip(-1), x.ab.flip(-1)) for x in value]
    return value.flip(-1)


def suggest(frames: Iterable[Any], n: int, model: ColorMNet) -> list[int]:
    """Which ``n`` frames to colour by hand: the first, then again and again the one that is least like those chosen.

    A frame is described by the mean of its keys, which is all that is kept of it.

    >>> from lineament.modules import ColorMNetConfig
    >>> film = [np.full((32, 32), value, dtype=np.uint8) for value in (10, 11, 12, 250, 13)]
    >>> suggest(film, 2, ColorMNet(ColorMNetConfig.tiny()).eval())
    [0, 3]
    """
    number("n", n, low=1, integer=True)
    rows = []
    multiple = model.config.multiple
    with torch.no_grad():
        for index, frame in enumerate(frames):
            lab = _small(rgb_to_lab(as_rgb(f"frame {index}", frame).to(device_of(model))), 448)
            lightness = padded(((lab[:1] - 50) / 50)[None].to(dtype_of(model)), multiple, "replicate")
            key = model.encode_frame(lightness.expand(-1, 3, -1, -1)).key
            rows.append(key.float().mean((0, 2, 3)))
    require(bool(rows), "frames: got none, expected at least one picture")
    table, chosen = torch.stack(rows), [0]
    distance = (table - table[0]).norm(dim=1)
    while len(chosen) < min(n, len(rows)):
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (table - table[chosen[-1]]).norm(dim=1))
    return sorted(chosen)


def with_end(items: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Each item, and whether it is the last.

    >>> list(with_end("ab"))
    [('a', False), ('b', True)]
    """
    waiting: list[Any] = []
    for item in items:
        if waiting:
            yield waiting.pop(), False
        waiting.append(item)
    if waiting:
        yield waiting.pop(), True


def as_rgb(what: str, picture: Any) -> Tensor:
    """A picture [3, height, width] in [0, 1] of what users have: arrays, tensors or PIL pictures, grey or in colour, of bytes or floats."""
    if hasattr(picture, "convert"):  # PIL: CMYK, palettes, alpha and 16 bits
        picture = _from_pil(picture)
    x = torch.as_tensor(np.array(picture) if isinstance(picture, np.ndarray) else picture)
    form = x.ndim == 2 or (x.ndim == 3 and x.shape[-1] in (1, 3, 4))
    require(
        form and x.numel() > 0,
        f"{what}: got {show(picture)}, expected a picture (height, width) or (height, width, 3)",
    )
    x = x[..., None] if x.ndim == 2 else x[..., :3]
    if x.dtype == torch.uint8:
        x = x.float() / 255
    elif x.dtype == torch.uint16:
        x = x.float() / 65535
    else:
        require(
            x.is_floating_point(), f"{what}: got {show(picture)}, expected bytes or floating point in [0, 1]"
        )
        low, high = float(x.min()), float(x.max())
        require(
            low >= 0 and high <= 1,
            f"{what}: has values from {low:g} to {high:g}, expected [0, 1]; divide by the largest there can be",
        )
        x = x.float()
    return x.movedim(-1, 0).expand(3, -1, -1)


def _from_pil(picture: Any) -> np.ndarray:
    if picture.mode.startswith("I;16") or picture.mode == "I":
        return np.asarray(picture).astype(np.uint16)
    return np.asarray(picture.convert("RGB"))


def as_bytes(lab: Tensor, truncate: bool = False) -> Tensor:
    """Lab [3, height, width] as RGB bytes [height, width, 3]."""
    rgb = lab_to_rgb(lab).movedim(0, -1) * 255
    return (rgb if truncate else rgb.round()).to(torch.uint8)


def guided(ab: Tensor, small: Tensor, large: Tensor, *, radius: int = 4, eps: float = 4.0) -> Tensor:
    """``ab`` brought to the size of ``large`` along its edges: in each window ab = p L + q, fitted at the small size (guided filter)."""
    side = 2 * radius + 1

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, side, stride=1, padding=radius, count_include_pad=False)

    small = small.to(ab.dtype)
    middle, target = mean(small), mean(ab)
    slope = (mean(small * ab) - middle * target) / (mean(small * small) - middle * middle + eps)
    offset = target - slope * middle
    size = large.shape[2:]
    return _resized(mean(slope), size) * large.to(ab.dtype) + _resized(mean(offset), size)


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _small(lab: Tensor, side: int | None) -> Tensor:
    factor = 1.0 if side is None else side / max(lab.shape[1:])
    if factor >= 1:
        return lab
    size = [max(1, round(length * factor)) for length in lab.shape[1:]]
    return F.interpolate(lab[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]


def _is_frame(exemplar: Tensor, lab: Tensor) -> bool:
    """Whether an exemplar is the frame itself in colour: by its lightness, or by the luma that most films are made grey by."""
    if exemplar.shape != lab.shape:
        return False
    if float((exemplar[0] - lab[0]).abs().mean()) < _SAME:
        return True
    pictures = [lab_to_rgb(x).movedim(0, -1) for x in (exemplar, lab)]
    lumas = [[luma_of(x, matrix) for x in pictures] for matrix in (BT601, BT709)]
    return any(100 * float((a - b).abs().mean()) < _SAME for a, b in lumas)


def _lab(what: str, picture: Any, frame: Tensor) -> Tensor:
    try:
        rgb = as_rgb(what, picture).to(frame.device)
    except InputError as error:
        raise InputError(f"exemplars: {error}") from error
    lab = rgb_to_lab(rgb)
    if float(lab[1:].abs().max()) < _GREY:
        warnings.warn(f"exemplars: the {what} is grey: there is no colour to take from it", stacklevel=4)
    own, wanted = lab.shape[2] / lab.shape[1], frame.shape[2] / frame.shape[1]
    if lab.shape != frame.shape and abs(own / wanted - 1) > 0.02:
        warnings.warn(
            f"exemplars: the {what} is {lab.shape[1]} x {lab.shape[2]} and is stretched to the frame's aspect, "
            f"{frame.shape[1]} x {frame.shape[2]} (height x width)",
            stacklevel=4,
        )
    return lab
