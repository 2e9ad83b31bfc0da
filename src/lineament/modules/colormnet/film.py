"""The loop over a film: encode a frame, ask memory, decode its chroma, keep every few frames.

With ``local_source="memory"`` and without permanent exemplars this is the published loop; what a frame gets there:

- its own colours given: they are the answer, and memory keeps them with a deep update of the hidden state;
- a separate exemplar: memory keeps it, the frame is decoded from memory alone, without local attention, and is kept too; the hidden state stays;
- none: memory and local attention answer; every few frames it is kept with what was predicted and a deep update, else the decoder updates the hidden state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import number, one_of, require
from lineament.modules.colormnet.features import FrameFeatures
from lineament.modules.colormnet.memory import Memory, MemoryOptions, Store
from lineament.modules.colormnet.network import ColorMNet

Padding = tuple[int, int, int, int]
_KEPT = ("hidden", "key", "time", "last_memory", "last_deep", "confidence", "cut")


@dataclass(frozen=True)
class Colorizing:
    """How a film is coloured.

    Args:
        memory: how much is kept. every: a frame enters memory at least every so many.
        local_source: which frame local attention reads: the ``"previous"`` one, or the latest of ``"memory"`` (as published).
        deep_every: frames between deep updates of the hidden state; None: whenever a frame enters memory.
        permanent: exemplars never leave memory; an integer keeps so many of the latest.
        padding: beyond the frame lies ``"grey"`` (as published) or its ``"replicate"``-d border.
        flip: colour each frame and its mirror image, and take the mean (twice the work).
        max_side: colour at most this large and bring the chroma up; None: as large as the frame. guided: by the frame's own edges.
        cuts: a key distance between neighbouring frames that is a cut, after which the frames before are forgotten; None: none is looked for.

    >>> Colorizing().local_source, Colorizing.published().local_source
    ('previous', 'memory')
    """

    memory: MemoryOptions = field(default_factory=MemoryOptions)
    every: int = 5
    local_source: Literal["previous", "memory"] = "previous"
    deep_every: int | None = None
    permanent: bool | int = True
    padding: Literal["grey", "replicate"] = "grey"
    flip: bool = False
    max_side: int | None = None
    guided: bool = False
    cuts: float | None = None

    def __post_init__(self) -> None:
        number("every", self.every, low=1, integer=True)
        one_of("local_source", self.local_source, ("previous", "memory"))
        one_of("padding", self.padding, ("grey", "replicate"))
        if self.deep_every is not None:
            number("deep_every", self.deep_every, low=1, integer=True)
        if not isinstance(self.permanent, bool):
            number("permanent", self.permanent, low=1, integer=True)
        if self.max_side is not None:
            number("max_side", self.max_side, low=16, integer=True)
        if self.cuts is not None:
            number("cuts", self.cuts, low=0, open_low=True)

    @classmethod
    def published(cls, **changes: Any) -> Colorizing:
        """The published loop: exemplars are ordinary frames of memory, local attention reads the latest of them."""
        return replace(cls(local_source="memory", permanent=False), **changes)


def margins(height: int, width: int, multiple: int) -> Padding:
    """(left, right, top, bottom) that make both sides multiples; what is odd lies at the right and the bottom.

    >>> margins(100, 113, 112)
    (55, 56, 6, 6)
    """
    x, y = -width % multiple, -height % multiple
    return x // 2, x - x // 2, y // 2, y - y // 2


def padded(x: Tensor, multiple: int, how: str = "grey") -> Tensor:
    """``x`` [..., height, width] with sides that are multiples; grey is 0."""
    sides = margins(x.shape[-2], x.shape[-1], multiple)
    return F.pad(x, sides) if how == "grey" else F.pad(x, sides, mode="replicate")


def unpadded(x: Tensor, sides: Padding) -> Tensor:
    """What :func:`margins` were put around."""
    left, right, top, bottom = sides
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


@dataclass(frozen=True)
class Exemplar:
    """A coloured picture: lightness [1, 1, height, width] and chroma [1, 2, height, width], both normalised."""

    lightness: Tensor
    ab: Tensor


class FilmState:
    """A film in progress: :meth:`step` takes its frames one by one; all that it remembers is in it.

    >>> from lineament.modules.colormnet.configuration import ColorMNetConfig
    >>> model = ColorMNet(ColorMNetConfig.tiny()).eval()
    >>> film = FilmState(model, Colorizing())
    >>> grey, colours = torch.zeros(1, 1, 30, 40), torch.zeros(1, 2, 30, 40)
    >>> film.step(grey, given=colours).shape, film.step(grey).shape, film.memory.sizes
    (torch.Size([1, 2, 30, 40]), torch.Size([1, 2, 30, 40]), (0, 0))
    """

    def __init__(self, model: ColorMNet, options: Colorizing):
        self.model, self.options = model, options
        self.memory = Memory(options.memory)
        self.hidden: Tensor | None = None
        self.reference: tuple[Tensor, Tensor] | None = None
        self.key: Tensor | None = None  # of the frame before
        self.time, self.last_memory = -1, 0
        self.last_deep = -(options.deep_every or 0)
        self.confidence, self.cut = 1.0, False

    @torch.no_grad()
    def step(
        self,
        lightness: Float[Tensor, "1 1 height width"],
        *,
        given: Tensor | None = None,
        exemplars: Sequence[Exemplar] = (),
        last: bool = False,
        scene: bool = False,
        features: FrameFeatures | None = None,
    ) -> Float[Tensor, "1 2 height width"]:
        """The chroma of the next frame: ``given`` as its own, or predicted.

        ``last``: no frame follows, so that nothing is kept of it. ``scene``: a new one begins here. ``features``: of the padded frame, where they are known.
        """
        model, options = self.model, self.options
        self.time += 1
        told = given is not None or bool(exemplars)
        frame = self._frame(lightness)
        features = model.encode_frame(frame) if features is None else features
        # Also where colours are given: a new scene is where they are given most.
        self.cut = self.time > 0 and (scene or self.is_cut(features.key))
        if self.cut:
            self.forget()
        stored = (self.time - self.last_memory >= options.every or told or self.cut) and not last
        due = stored if options.deep_every is None else self.time - self.last_deep >= options.deep_every
        deep, update = due and not last, not last and (options.deep_every is not None or not due)
        if self.hidden is None:
            self.hidden = model.empty_hidden(features.key)
        for exemplar in exemplars:
            self._remember(exemplar)
            deep = False  # a separate exemplar moves the hidden state of no frame
        if given is None:
            require(
                self.memory.permanent != [] or self.memory.sizes != (0, 0),
                f"exemplars: there is none at or before frame {self.time}; give the colours of a frame first",
            )
            answer = self.memory.read(features.key, features.selection)
            self.confidence = float(self.memory.confidence)
            if not exemplars and self.reference is not None:
                answer = answer + model.near(features.key, *self.reference)
            hidden, ab = model.decode(features, answer, self.hidden, update=update)
            self.hidden = hidden if update else self.hidden
        else:
            ab, self.confidence = self._padded(given), 1.0
        if stored or (options.local_source == "previous" and not last):
            value, hidden = model.encode_value(frame, features.f16, self.hidden, ab, deep=deep and stored)
            self.reference = features.key, value
            if stored:
                # A frame with its true colours is an exemplar; one that was predicted is not.
                self._store(features, value, permanent=given is not None and bool(options.permanent))
                self.last_memory = self.time
            if deep and stored:
                self.hidden, self.last_deep = hidden, self.time
        self.key = features.key
        return unpadded(ab, margins(lightness.shape[-2], lightness.shape[-1], model.config.multiple))

    def state_dict(self) -> dict[str, Any]:
        """All that the frames so far have left, in plain values and tensors."""
        return {
            **{name: getattr(self, name) for name in _KEPT},
            "reference": list(self.reference or ()),
            "objects": self.memory.objects,
            "working": dict(vars(self.memory.working)),
            "long": dict(vars(self.memory.long)),
            "permanent": [dict(vars(store)) for store in self.memory.permanent],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        for name in _KEPT:
            setattr(self, name, state[name])
        key_and_value = state["reference"]
        self.reference = (key_and_value[0], key_and_value[1]) if key_and_value else None
        self.memory.objects = state["objects"]
        self.memory.working, self.memory.long = Store(**state["working"]), Store(**state["long"])
        self.memory.permanent = [Store(**stored) for stored in state["permanent"]]

    def is_cut(self, key: Tensor) -> bool:
        """Whether the frame of a key has little in common with the one before."""
        if self.options.cuts is None or self.key is None:
            return False
        return (
            float((key - self.key).square().mean().sqrt() / self.key.square().mean().sqrt())
            > self.options.cuts
        )

    def forget(self) -> None:
        """A scene ends: the hidden state and working memory go; exemplars and long-term memory stay."""
        if self.memory.permanent:
            self.memory.clear_working()
        self.hidden = self.reference = None

    def _frame(self, lightness: Tensor) -> Tensor:
        return self._padded(lightness).expand(-1, 3, -1, -1)

    def _padded(self, x: Tensor) -> Tensor:
        return padded(x, self.model.config.multiple, self.options.padding)

    def _remember(self, exemplar: Exemplar) -> None:
        frame, ab = self._frame(exemplar.lightness), self._padded(exemplar.ab)
        features = self.model.encode_frame(frame)
        hidden = self.model.empty_hidden(features.key)
        value, _ = self.model.encode_value(frame, features.f16, hidden, ab, deep=False)
        self._store(features, value, permanent=bool(self.options.permanent))
        self.last_memory = self.time
        self.reference = features.key, value

    def _store(self, features: FrameFeatures, value: Tensor, *, permanent: bool) -> None:
        self.memory.add(features.key, features.shrinkage, features.selection, value, permanent=permanent)
        if not isinstance(self.options.permanent, bool):
            del self.memory.permanent[: -self.options.permanent]
