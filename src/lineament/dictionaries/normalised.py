"""Dictionaries of activations that are brought to a common form token by token first, as a dictionary of the activations themselves.

What a token was divided by and what was taken from it are no constants, so that a decoder alone could not give them back. Here they are features too, the
last ones: one holds the mean of a token's numbers (its atom is all ones), one what the token was divided by (its atom is the dictionary's own bias). All
other features are in the units of x, the dictionary's own times what its token was divided by.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lineament.core.checks import InputError, one_of, require, show
from lineament.core.codes import Codes
from lineament.dictionaries.autoencoders import checked_rows
from lineament.dictionaries.saving import Saved, made_by_kind
from lineament.dictionaries.topk.step import decoded

FORMS = ("layer_norm", "constant_norm", "centred")


class Normalised(Saved):
    """A dictionary behind a normalisation of each token.

    ``layer_norm``: (x - mean) / (deviation + 1e-5), the deviation with n - 1; ``constant_norm``: x sqrt(d) / norm(x); ``centred``: x - mean, which is what
    TransformerLens' ``center_writing_weights`` leaves of a residual stream.

    Args:
        inner: the dictionary of normalised activations, or its kind and settings. form: one of the above.

    >>> from lineament.dictionaries import ReLU
    >>> sae = Normalised(ReLU(2, 3), form="centred")
    >>> sae.encode(torch.tensor([3.0, 1.0])).tolist(), sae.decode(sae.codes(torch.tensor([3.0, 1.0]))).tolist()
    ([0.0, 0.0, 0.0, 2.0], [2.0, 2.0])
    """

    def __init__(self, inner: Any, *, form: str, site: str | None = None):
        one_of("form", form, FORMS)
        inner = made_by_kind(**inner) if isinstance(inner, dict) else inner
        if not isinstance(getattr(inner, "b_dec", None), Tensor):
            raise InputError(f"inner: got {show(inner)}, expected an autoencoder of this library")
        said = {"kind": type(inner).__name__, "settings": inner.settings}
        super().__init__(site=site if site is not None else inner.site, inner=said, form=form)
        self.inner, self.form = inner, form
        self.carriers = {"layer_norm": 2, "constant_norm": 1, "centred": 1}[form]

    @property
    def width(self) -> int:
        return self.inner.width + self.carriers

    @property
    def d(self) -> int:
        return self.inner.d

    @property
    def atoms(self) -> Tensor:
        return self._atoms().detach()

    def _atoms(self) -> Tensor:
        rows = [self.inner.W_dec]
        rows += [] if self.form == "centred" else [self.inner.b_dec[None]]
        rows += [] if self.form == "constant_norm" else [torch.ones_like(self.inner.b_dec)[None]]
        return torch.cat(rows)

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(normalised x, (..., carriers): what it was divided by and the mean that was taken, as the form has them)."""
        x = checked_rows(x, self.d).to(self.inner.W_dec).reshape(x.shape).contiguous()
        mean = x.mean(-1, keepdim=True)
        if self.form == "centred":
            return x - mean, mean
        if self.form == "layer_norm":
            # A token of equal numbers has no deviation, and nothing is left to divide.
            by = ((x - mean).square().sum(-1, keepdim=True) / max(self.d - 1, 1)).sqrt()
            return (x - mean) / (by + 1e-5), torch.cat([by, mean], -1)
        by = x.norm(dim=-1, keepdim=True) / self.d**0.5
        require(
            bool((by > 0).all()) or not by.numel(),
            "x: a row is all zeros, which cannot be brought to a common norm",
        )
        return x / by, by

    def _factor(self, carriers: Tensor) -> Tensor | float:
        return 1.0 if self.form == "centred" else carriers[..., :1]

    def encode(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., width), dense."""
        y, carriers = self.normalise(x)
        return torch.cat([self.inner.encode(y) * self._factor(carriers), carriers], -1)

    def codes(self, x: Tensor) -> Codes:
        """(..., d) -> sparse codes."""
        y, carriers = self.normalise(x)
        inner = self.inner.codes(y)
        last = torch.arange(self.inner.width, self.width, device=y.device).expand(carriers.shape)
        values = inner.values * self._factor(carriers)
        return Codes(torch.cat([inner.indices, last], -1), torch.cat([values, carriers], -1), self.width)

    def decode(self, codes: Codes | Tensor) -> Tensor:
        """Codes or dense codes (..., width) -> (..., d)."""
        constant = self.inner.b_dec if self.form == "centred" else 0.0
        if isinstance(codes, Tensor):
            require(
                codes.ndim > 0 and codes.shape[-1] == self.width,
                f"codes: got {show(codes)}, expected a last dimension of {self.width}, the dictionary's width",
            )
            return codes.to(self.inner.W_dec) @ self._atoms() + constant
        require(codes.width == self.width, f"codes: of {codes.width} features, expected {self.width}")
        active = codes.indices.shape[-1]
        values = codes.values.reshape(-1, active).to(self.inner.W_dec)
        flat = decoded(codes.indices.reshape(-1, active), values, self._atoms()) + constant
        return flat.reshape(*codes.indices.shape[:-1], self.d)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.codes(x))
