"""What the readers of other libraries' folders share: checked JSON, checked tensors, and a dictionary made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineament.core.checks import InputError, number, require, show
from lineament.core.sites.families import site_of_hook
from lineament.dictionaries.autoencoders import BatchTopK, Gated, JumpReLU, ReLU, TopK
from lineament.load.weights import require_finite


@dataclass(frozen=True)
class Request:
    """What the caller of ``load_dictionary`` said beside the folder."""

    site: str | None = None
    model: Any = None
    scale: float | None = None
    centred: bool | None = None


@dataclass
class Found:
    """What a folder said of its dictionary."""

    library: str
    model: str = ""
    hook: str = ""
    site: str | None = None
    notes: list[str] = field(default_factory=list)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: unreadable, or no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"folder: {path.name!r} in {str(path.parent)!r} cannot be read ({error})") from error
    require(
        isinstance(found, dict),
        f"folder: {path.name!r} in {str(path.parent)!r} holds {show(found)}, expected an object",
    )
    return found


class Weights:
    """The tensors of a file; what is missing or misshapen is named. Half precision becomes single."""

    def __init__(self, tensors: Mapping[str, Any], file: Path):
        self.file = file
        floats = {k: v for k, v in tensors.items() if isinstance(v, Tensor)}
        self.tensors = {
            k: v.float() if v.is_floating_point() and v.element_size() < 4 else v for k, v in floats.items()
        }
        require_finite(self.tensors.items(), f"folder ({file.name})")

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def get(self, *names: str, shape: Sequence[int] | None = None) -> Tensor:
        """The tensor of the first of these names that is there.

        Raises:
            InputError: none is; the message lists what is. Another shape than expected.
        """
        name = next((each for each in names if each in self.tensors), None)
        if name is None:
            there = ", ".join(sorted(self.tensors)[:12]) or "nothing"
            raise InputError(
                f"folder: {str(self.file)!r} lacks {' or '.join(map(repr, names))}; it holds {there}"
            )
        found = self.tensors[name]
        require(
            shape is None or tuple(found.shape) == tuple(shape),
            f"folder: {name!r} in {str(self.file)!r} is {show(found)}, expected shape {tuple(shape or ())}",
        )
        return found

    def matrix(self, *names: str) -> Tensor:
        found = self.get(*names)
        require(
            found.ndim == 2 and found.is_floating_point(),
            f"folder: {names[0]!r} in {str(self.file)!r} is {show(found)}, expected a matrix of real numbers",
        )
        return found

    def count(self, name: str, value: Any, width: int) -> int:
        """A number of latents that are on, from a configuration or a tensor."""
        if isinstance(value, Tensor) and value.numel() == 1:
            value = int(value)
        return number(f"{name} in {self.file.parent.name}", value, low=1, high=width, integer=True)


def autoencoder(
    kind: str,
    encoder: Tensor,
    decoder: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    *,
    subtract_bias: bool,
    unit_norm: bool = False,
    k: int | None = None,
    **extra: Tensor,
) -> Any:
    """A dictionary of this library from tensors with a latent a row.

    Args:
        kind: ReLU, TopK, BatchTopK, JumpReLU or Gated.
        unit_norm: fold the atoms' norms into the encoder, so that features grow by them.
        extra: ``threshold``; of gated ones ``b_gate`` and ``r_mag``, where ``b_enc`` is the magnitude's bias.
    """
    width, d = decoder.shape
    for name, found, shape in (
        ("encoder", encoder, (width, d)), ("encoder bias", b_enc, (width,)), ("decoder bias", b_dec, (d,)),
        *((key, value, (width,)) for key, value in extra.items() if value.ndim),
    ):  # fmt: skip
        require(
            tuple(found.shape) == tuple(shape),
            f"folder: the {name} is {show(found)}, expected shape {tuple(shape)} beside a decoder of {width} latents of {d}",
        )
    if unit_norm:
        norms = decoder.norm(dim=1)
        require(
            bool((norms > 0).all()),
            f"folder: {int((norms == 0).sum())} latents have a decoder of norm 0, which cannot be brought to 1",
        )
        decoder, encoder, b_enc = decoder / norms[:, None], encoder * norms[:, None], b_enc * norms
        extra = {name: value if name == "r_mag" else value * norms for name, value in extra.items()}
    options: dict[str, Any] = {"subtract_bias": subtract_bias}
    classes: dict[str, Any] = {
        "ReLU": ReLU,
        "TopK": TopK,
        "BatchTopK": BatchTopK,
        "JumpReLU": JumpReLU,
        "Gated": Gated,
    }
    if kind in ("TopK", "BatchTopK"):
        options["k"] = k
    made = classes[kind](d, width, **options).to(decoder.dtype)
    with torch.no_grad():
        made.W_enc.copy_(encoder)
        made.W_dec.copy_(decoder)
        made.b_enc.copy_(b_enc)
        made.b_dec.copy_(b_dec)
        if kind == "JumpReLU":
            # Below zero a threshold acts as zero does, since what passes is positive.
            made.log_threshold.copy_(extra["threshold"].clamp_min(0).log())
        elif kind == "BatchTopK":
            made.threshold.copy_(extra["threshold"])
        elif kind == "Gated":
            made.b_gate.copy_(extra["b_gate"])
            made.r_mag.copy_(extra["r_mag"])
    return made.eval().requires_grad_(False)


def placed(made: Any, found: Found, request: Request) -> Any:
    """The dictionary with its site and what its folder said of it."""
    site = request.site or found.site
    if site is None and found.hook:
        try:
            site = site_of_hook(found.hook, request.model if request.model is not None else found.model)
        except InputError as error:
            found.notes.append(f"its site is not known here ({error}); set dictionary.site")
    made.site = site
    made.info = {
        "library": found.library, "model": found.model, "hook": found.hook, "notes": list(found.notes),
    }  # fmt: skip
    return made
