"""The sizes of a ColorMNet: the published network, and a small one that trains anywhere."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from lineament.core.checks import number, one_of, require, suggest
from lineament.core.results import Readable

ENCODERS = ("fusion", "concatenation", "resnet", "dino")


@dataclass(frozen=True)
class ColorMNetConfig(Readable):
    """Sizes of a network; the defaults are the published one's.

    Args:
        key_width, value_width, hidden_width: channels of a memory's keys, of its values and of the hidden state; no hidden state is 0.
        encoder: what describes a frame: semantics fused with detail, both joined by a convolution, or one of them (ablations).
        window: how far local attention looks to each side; 0 for none.
        dino_width, dino_layers, dino_heads, dino_patch, dino_image: of the vision transformer. dino_taken: how many last blocks are read.
        stem, stages, depths, layer_type: of the residual network of frames; value_stem, value_stages, value_depths: of that of values.
        fusion_heads: of the cross-channel attention. fused, decoded: channels of fused values, and of the decoder's two finer maps.

    >>> ColorMNetConfig().multiple, ColorMNetConfig.tiny().multiple
    (112, 16)
    """

    key_width: int = 64
    value_width: int = 512
    hidden_width: int = 64
    encoder: str = "fusion"
    window: int = 7
    dino_width: int = 384
    dino_layers: int = 12
    dino_heads: int = 6
    dino_patch: int = 14
    dino_image: int = 518
    dino_taken: int = 4
    stem: int = 64
    stages: tuple[int, int, int] = (256, 512, 1024)
    depths: tuple[int, int, int] = (3, 4, 6)
    layer_type: str = "bottleneck"
    value_stem: int = 64
    value_stages: tuple[int, int, int] = (64, 128, 256)
    value_depths: tuple[int, int, int] = (2, 2, 2)
    fusion_heads: int = 8
    fused: int = 512
    decoded: int = 256

    def __post_init__(self) -> None:
        one_of("encoder", self.encoder, ENCODERS)
        one_of("layer_type", self.layer_type, ("basic", "bottleneck"))
        for name in ("stages", "depths", "value_stages", "value_depths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            require(
                len(getattr(self, name)) == 3, f"{name}: got {getattr(self, name)}, expected three numbers"
            )
        for field in fields(self):
            for value in (
                getattr(self, field.name)
                if isinstance(getattr(self, field.name), tuple)
                else (getattr(self, field.name),)
            ):
                if not isinstance(value, str):
                    number(
                        field.name,
                        value,
                        low=0 if field.name in ("window", "hidden_width") else 1,
                        integer=True,
                    )
        require(
            self.dino_width % self.dino_heads == 0,
            f"dino_heads: {self.dino_heads} heads cannot share a width of {self.dino_width} evenly",
        )
        require(
            self.dino_taken <= self.dino_layers,
            f"dino_taken: got {self.dino_taken}, expected at most dino_layers = {self.dino_layers}",
        )

    @classmethod
    def tiny(cls, **changes: Any) -> ColorMNetConfig:
        """A network of a few hundred thousand parameters, for small clips and tests."""
        small: dict[str, Any] = {
            "key_width": 16, "value_width": 32, "hidden_width": 8, "window": 2, "dino_width": 32, "dino_layers": 2,
            "dino_heads": 2, "dino_patch": 16, "dino_image": 64, "dino_taken": 1, "stem": 16, "stages": (24, 32, 48),
            "depths": (1, 1, 1), "layer_type": "basic", "value_stem": 16, "value_stages": (16, 24, 32),
            "value_depths": (1, 1, 1), "fusion_heads": 4, "fused": 32, "decoded": 32,
        }  # fmt: skip
        return cls(**(small | changes))

    @property
    def multiple(self) -> int:
        """What the sides of a frame are padded to multiples of."""
        return math.lcm(self.dino_patch, 16)

    @property
    def semantics_width(self) -> int:
        """Channels of the semantics map."""
        return self.dino_width * self.dino_taken

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ColorMNetConfig:
        """The record of :meth:`to_dict`; an unknown name is refused."""
        known = [field.name for field in fields(cls)]
        for name in values:
            require(
                name in known, f"config: has {name!r}, which is no setting of ColorMNet{suggest(name, known)}"
            )
        return cls(**values)
