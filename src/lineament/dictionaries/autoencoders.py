"""Sparse autoencoders: an activation as a sum of few directions, found by one matrix product and a rule of what is on.

All kinds share the affine part and differ in the rule:

    z = W_enc (x - b_dec) + b_enc       f = rule(z)       x' = sum_i f_i w_i + b_dec

**Conventions.** ``W_enc`` and ``W_dec`` are (width, d): a latent a row, so that ``W_dec`` holds the atoms w_i. Trained dictionaries have atoms
of norm 1. Everything is in the units of x: what a training scales it by is folded into biases and thresholds afterwards (all rules are
homogeneous), and so is the gradient's scale into ``Selection.influence_scale``. ``subtract_bias=False``: b_dec is added to the output and
not subtracted from the input. A dictionary computes in the dtype of its weights. Dense codes are (..., width); :class:`Codes` are sparse.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.batching import auto_batch
from lineament.core.checks import InputError, number, require, show
from lineament.core.codes import Codes
from lineament.dictionaries.saving import Saved
from lineament.dictionaries.selection import Selection
from lineament.dictionaries.topk import shards
from lineament.dictionaries.topk.select import rows_at_once, select
from lineament.dictionaries.topk.step import kept, written


def checked_rows(x: Any, d: int, what: str = "x") -> Tensor:
    """x as rows (n, d).

    Raises:
        InputError: another last dimension than the dictionary's, or NaN and infinity; the message says in which rows.
    """
    checks.tensor(what, x, floating=True, finite=False, empty=True)
    if x.ndim == 0 or x.shape[-1] != d:
        raise InputError(
            f"{what}: got {show(x)}, expected a last dimension of {d}, which the dictionary was made for"
        )
    rows = x.reshape(-1, d)
    if rows.numel() and not bool(torch.isfinite(rows.detach().sum())):
        bad = (~torch.isfinite(rows).all(1)).nonzero().flatten().tolist()
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        require(not bad, f"{what}: rows {', '.join(map(str, bad[:5]))}{more} hold NaN or infinity")
    return rows


class Autoencoder(Saved):
    """The affine part that the kinds share; each of them says by ``activate`` what is on."""

    def __init__(
        self, d: int, width: int, *, site: str | None = None, subtract_bias: bool = True, **settings: Any
    ):
        number("d", d, low=1, integer=True)
        number("width", width, low=1, integer=True)
        super().__init__(site=site, d=d, width=width, subtract_bias=subtract_bias, **settings)
        self.subtract_bias = subtract_bias
        self.W_enc = nn.Parameter(torch.zeros(width, d))
        self.b_enc = nn.Parameter(torch.zeros(width))
        self.W_dec = nn.Parameter(torch.zeros(width, d))
        self.b_dec = nn.Parameter(torch.zeros(d))

    @property
    def d(self) -> int:
        return self.W_dec.shape[1]

    @property
    def width(self) -> int:
        return self.W_dec.shape[0]

    @property
    def atoms(self) -> Tensor:
        """(width, d), detached; of features that lie with several processes all must ask for it, and each gets the whole."""
        if shards.divided(self.W_dec):
            return shards.whole(self.W_dec).to(self.b_dec.device)
        return self.W_dec.detach()

    def rows(self, x: Tensor) -> Tensor:
        """(n, d): the checked rows, centred, in the dictionary's dtype and on its device."""
        rows = checked_rows(x, self.d).to(self.b_dec)
        return rows - self.b_dec if self.subtract_bias else rows

    def pre_activations(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., width): z; of features that lie with several processes without a graph."""
        z = torch.addmm(shards.local(self.b_enc), self.rows(x), shards.local(self.W_enc).T)
        return shards.all_columns(z, self.W_enc).reshape(*x.shape[:-1], self.width)

    def activate(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., width), dense."""
        z = torch.addmm(self.b_enc, self.rows(x), self.W_enc.T)
        return self.activate(z).reshape(*x.shape[:-1], self.width)

    def codes(self, x: Tensor) -> Codes:
        """(..., d) -> sparse codes, computed in chunks of rows."""
        h = self.rows(x)

        def some(start: int, stop: int) -> Codes:
            return Codes.of_dense(self.activate(torch.addmm(self.b_enc, h[start:stop], self.W_enc.T)))

        most = rows_at_once(self.width, h.element_size(), 2)
        parts = list(
            auto_batch(some, len(h), most=most, memory=(Autoencoder.codes, (type(self), self.width)))
        )
        return _shaped(Codes.joined(parts) if parts else Codes.of_dense(h.new_zeros(0, self.width)), x)

    def decode(self, codes: Codes | Tensor) -> Tensor:
        """Codes or dense codes (..., width) -> (..., d)."""
        if isinstance(codes, Tensor):
            require(
                codes.ndim > 0 and codes.shape[-1] == self.width,
                f"codes: got {show(codes)}, expected a last dimension of {self.width}, the dictionary's width",
            )
            return shards.product(codes.to(self.b_dec), self.W_dec) + self.b_dec
        require(
            codes.width == self.width,
            f"codes: of a dictionary of {codes.width} features, expected {self.width}",
        )
        lead, active = codes.indices.shape[:-1], codes.indices.shape[-1]
        indices = codes.indices.reshape(lead.numel(), active)
        values = codes.values.reshape(lead.numel(), active).to(self.b_dec)
        return (written(self, indices, values) + self.b_dec).reshape(*lead, self.d)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x."""
        return self.decode(self.codes(x))

    @torch.no_grad()
    def rescale_(self, factor: float) -> Any:
        """In place, the dictionary of activations that are ``factor`` times those of before: biases and thresholds grow by it.

        >>> sae = ReLU(2, 4); _ = sae.rescale_(2.0)
        """
        number("factor", factor, low=0, open_low=True)
        self.b_enc.mul_(factor)
        self.b_dec.mul_(factor)
        return self


def _shaped(codes: Codes, x: Tensor) -> Codes:
    """Codes of rows, in the leading shape of x."""
    shape = x.shape[:-1]
    active = codes.indices.shape[-1]
    return Codes(codes.indices.reshape(*shape, active), codes.values.reshape(*shape, active), codes.width)


class TopK(Autoencoder):
    """The k latents of the largest pre-activations are on, with the values relu(z) (Gao et al. 2024, arXiv 2406.04093).

    With the gradient of the model's loss, latents are ranked by :class:`lineament.dictionaries.Selection` instead (gradient mode): of a
    dictionary trained so, and of any other.

    Args:
        d: the size of x. width: the number of latents. k: how many are on.
        selection: how gradient mode ranks; by default ``Selection()``.
        site: where its activations pass in the model.

    >>> sae = TopK(2, 3, k=1)
    >>> with torch.no_grad():
    ...     _ = sae.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])); _ = sae.W_dec.copy_(sae.W_enc)
    >>> sae.encode(torch.tensor([3.0, 2.0])).tolist()
    [3.0, 0.0, 0.0]
    >>> sae.encode(torch.tensor([3.0, 2.0]), gradient=torch.tensor([0.0, 1.0])).tolist()
    [0.0, 2.0, 0.0]
    >>> sae(torch.tensor([3.0, 2.0])).tolist()
    [3.0, 0.0]
    """

    pool: str | int | None = None  # what competes in activation mode: None is each row by itself

    def __init__(
        self,
        d: int,
        width: int,
        *,
        k: int,
        selection: Selection | dict[str, Any] | None = None,
        site: str | None = None,
        subtract_bias: bool = True,
        **settings: Any,
    ):
        number("width", width, low=1, integer=True)
        number("k", k, low=1, high=width, integer=True)
        chosen = Selection(**selection) if isinstance(selection, dict) else selection or Selection()
        super().__init__(
            d, width, site=site, subtract_bias=subtract_bias, k=k, selection=asdict(chosen), **settings
        )
        self.k = k
        self._selection = chosen

    @property
    def selection(self) -> Selection:
        """How gradient mode ranks; set another to change it."""
        return self._selection

    @selection.setter
    def selection(self, selection: Selection) -> None:
        self._selection = selection
        self.settings["selection"] = asdict(selection)

    @property
    def divided(self) -> bool:
        """Whether its features lie with several processes."""
        return shards.divided(self.W_enc)

    def shard(self, mesh: Any = None) -> None:
        """Divide the features among the processes of a training; called by all of them, and before an optimizer is given the parameters.

        ``W_enc``, ``b_enc`` and ``W_dec`` are then DTensors, ``Shard(0)``. From there on every process passes the same rows to ``codes`` and ``decode`` and has the same codes and
        losses, those of one process; gradients are those of its own features. What looks at a dictionary (:func:`evaluate`, :func:`max_examples`, :func:`steer`, ...) is
        called by all of them with the same data and finds the same. :func:`train_dictionary` joins the rows that processes harvest. ``save_pretrained``, called by all, writes one file,
        which one process opens, or any number that divide it anew. With the score ``"topk_of_l1"`` it is refused: its sums are over all latents.

        Args:
            mesh: a DeviceMesh of one dimension with all processes; made where there is none.

        >>> TopK(4, 8, k=2).shard()
        Traceback (most recent call last):
        ...
        lineament.core.checks.InputError: mesh: there is no process group; start the processes by torchrun and call torch.distributed.init_process_group() first
        """
        shards.divide(self, mesh)

    def encode(self, x: Tensor, *, gradient: Tensor | None = None, mode: str | None = None) -> Tensor:
        """(..., d) -> (..., width), dense; arguments as for :meth:`codes`."""
        return self.codes(x, gradient=gradient, mode=mode).dense()

    def codes(self, x: Tensor, *, gradient: Tensor | None = None, mode: str | None = None) -> Codes:
        """The k latents that are on in each row.

        Args:
            x: (..., d).
            gradient: of the model's loss, summed over tokens, at x; (..., d). With it latents are ranked in gradient mode.
            mode: ``"activation"`` or ``"gradient"``, to be explicit; by default what ``gradient`` says.

        Raises:
            InputError: shapes that do not fit, NaN or infinity, gradient mode without a gradient.
        """
        if mode is not None:
            checks.one_of("mode", mode, ("activation", "gradient"))
            require(
                mode == "activation" or gradient is not None,
                "gradient: missing, expected the loss's gradient at x, which mode='gradient' ranks latents by",
            )
        h = self.rows(x)
        g = None
        if gradient is not None and mode != "activation":
            require(
                isinstance(gradient, Tensor) and gradient.shape == x.shape,
                f"gradient: got {show(gradient)}, expected the shape of x {tuple(x.shape)}",
            )
            g = checked_rows(gradient.detach(), self.d, "gradient").to(self.b_dec)
        return _shaped(self.chosen(h, g), x)

    def chosen(self, h: Tensor, g: Tensor | None = None) -> Codes:
        """The codes of checked, centred rows; what :meth:`codes` does behind its checks."""
        selection = self._ranking(g)
        precision = self._selection.precision
        if self.divided:
            indices, values = shards.chosen(
                self, h.detach(), selection=selection, gradient=g, precision=precision
            )
        else:
            indices, values = select(
                h.detach(), self.W_enc, self.b_enc, self.k, selection=selection, gradient=g, atoms=self.W_dec,
                precision=precision,
            )  # fmt: skip
        if torch.is_grad_enabled() and (h.requires_grad or self.W_enc.requires_grad):
            values = kept(self, h, indices, values)
        return Codes(indices, values, self.width)

    def _ranking(self, g: Tensor | None) -> Selection | None:
        return self._selection if g is not None else None

    def rescale_(self, factor: float) -> Any:
        super().rescale_(factor)
        # |w . g| shrinks by the factor that x grows by.
        s = self._selection
        self.selection = Selection(**{**asdict(s), "influence_scale": s.influence_scale / factor})
        return self


class BatchTopK(TopK):
    """The k times rows largest pre-activations of all rows together are on: k on average (Bussmann et al. 2024, arXiv 2412.06410).

    ``threshold`` is what a training measured as the mean least value that was kept; with it (at 0 or more) a row's codes do not hang on the
    other rows: what lies above it is on. Gradient mode always pools.

    >>> sae = BatchTopK(2, 2, k=1)
    >>> with torch.no_grad():
    ...     _ = sae.W_enc.copy_(torch.eye(2)); _ = sae.W_dec.copy_(torch.eye(2))
    >>> sae.encode(torch.tensor([[3.0, 2.0], [1.0, 0.5]])).tolist()
    [[3.0, 2.0], [0.0, 0.0]]
    >>> _ = sae.threshold.fill_(0.8)
    >>> sae.encode(torch.tensor([[3.0, 2.0], [1.0, 0.5]])).tolist()
    [[3.0, 2.0], [1.0, 0.0]]
    """

    threshold: Tensor

    def __init__(self, d: int, width: int, *, k: int, selection: Any = None, **options: Any):
        super().__init__(d, width, k=k, selection=selection or Selection(pool="batch"), **options)
        self.register_buffer("threshold", torch.tensor(-1.0))

    def chosen(self, h: Tensor, g: Tensor | None = None) -> Codes:
        if g is None and float(self.threshold) >= 0:
            encoder, bias = shards.local(self.W_enc), shards.local(self.b_enc)

            def some(start: int, stop: int) -> Codes:
                z = torch.addmm(bias, h[start:stop], encoder.T)
                return Codes.of_dense(z * (z > self.threshold))

            most = rows_at_once(len(encoder), h.element_size(), 2)
            parts = list(auto_batch(some, len(h), most=most, memory=(BatchTopK.chosen, len(encoder))))
            found = Codes.joined(parts) if parts else Codes.of_dense(h.new_zeros(0, len(encoder)))
            return shards.all_codes(found, self.width) if self.divided else found
        return super().chosen(h, g)

    def _ranking(self, g: Tensor | None) -> Selection | None:
        return self._selection

    @torch.no_grad()
    def rescale_(self, factor: float) -> Any:
        self.threshold.mul_(factor)
        return super().rescale_(factor)


class ReLU(Autoencoder):
    """What is positive is on; trained with an L1 penalty (Bricken et al. 2023; Cunningham et al. 2023, arXiv 2309.08600).

    >>> ReLU(2, 4).codes(torch.ones(3, 2)).count().tolist()
    [0, 0, 0]
    """

    def activate(self, z: Tensor) -> Tensor:
        return z.relu()


class JumpReLU(Autoencoder):
    """A latent above its own threshold is on, with the value z (Rajamanoharan et al. 2024, arXiv 2407.14435).

    Thresholds are positive, kept as logarithms; the step's gradient is that of a window of ``bandwidth`` around the threshold, in the units of x (``None``:
    a training chooses a thousandth of the typical norm).

    >>> sae = JumpReLU(1, 1)
    >>> with torch.no_grad():
    ...     _ = sae.W_enc.fill_(1.0); _ = sae.log_threshold.fill_(0.0)
    >>> sae.encode(torch.tensor([[0.5], [1.5]])).tolist()
    [[0.0], [1.5]]
    """

    def __init__(self, d: int, width: int, *, bandwidth: float | None = None, **options: Any):
        if bandwidth is not None:
            number("bandwidth", bandwidth, low=0, open_low=True)
        super().__init__(d, width, bandwidth=bandwidth, **options)
        self.bandwidth = bandwidth
        self.log_threshold = nn.Parameter(torch.full((width,), -6.907755))

    @property
    def threshold(self) -> Tensor:
        return self.log_threshold.exp()

    def activate(self, z: Tensor) -> Tensor:
        return _Jump.apply(z, self.threshold, self.bandwidth or 1e-3)  # pyright: ignore[reportReturnType]

    def on(self, z: Tensor) -> Tensor:
        """1 where a latent is on, with the gradient of the window: its mean is the L0 of the training's penalty."""
        return _Step.apply(z, self.threshold, self.bandwidth or 1e-3)  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def rescale_(self, factor: float) -> Any:
        super().rescale_(factor)
        self.log_threshold.add_(torch.tensor(factor).log().to(self.log_threshold))
        if self.bandwidth is not None:
            self.bandwidth = self.settings["bandwidth"] = self.bandwidth * factor
        return self


class Gated(Autoencoder):
    """One bias says which latents are on, another how strongly (Rajamanoharan et al. 2024, arXiv 2404.16014).

    gate = W_enc h + b_gate, f = [gate > 0] relu(exp(r_mag) W_enc h + b_enc), with h = x - b_dec.

    >>> sae = Gated(1, 1)
    >>> with torch.no_grad():
    ...     _ = sae.W_enc.fill_(1.0); _ = sae.b_gate.fill_(-1.0)
    >>> sae.encode(torch.tensor([[0.5], [1.5]])).tolist()
    [[0.0], [1.5]]
    """

    def __init__(self, d: int, width: int, **options: Any):
        super().__init__(d, width, **options)
        self.b_gate = nn.Parameter(torch.zeros(width))
        self.r_mag = nn.Parameter(torch.zeros(width))

    def activate(self, z: Tensor) -> Tensor:
        inner = z - self.b_enc  # W_enc h
        return (inner + self.b_gate > 0) * (self.r_mag.exp() * inner + self.b_enc).relu()

    def gate(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., width): the gate's pre-activations, which the training's penalty acts on."""
        return self.pre_activations(x) - self.b_enc + self.b_gate

    @torch.no_grad()
    def rescale_(self, factor: float) -> Any:
        super().rescale_(factor)
        self.b_gate.mul_(factor)
        return self


class Neurons(Saved):
    """The coordinates of x themselves, or the k of largest absolute value a row: the dictionary that is no dictionary, to compare with.

    Args:
        d: the size of x. k: how many are kept of each row; ``None``: all. What is kept is the difference from ``mean`` (by default 0).

    >>> Neurons(3, k=1).encode(torch.tensor([1.0, -4.0, 2.0])).tolist()
    [0.0, -4.0, 0.0]
    """

    mean: Tensor

    def __init__(self, d: int, *, k: int | None = None, site: str | None = None):
        number("d", d, low=1, integer=True)
        if k is not None:
            number("k", k, low=1, high=d, integer=True)
        super().__init__(site=site, d=d, k=k)
        self.k = k
        self.register_buffer("mean", torch.zeros(d))

    @property
    def atoms(self) -> Tensor:
        return torch.eye(len(self.mean), dtype=self.mean.dtype, device=self.mean.device)

    def encode(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        rows = checked_rows(x, len(self.mean)).to(self.mean) - self.mean
        return _strongest(rows, self.k).reshape(x.shape)

    def codes(self, x: Tensor) -> Codes:
        return Codes.of_dense(self.encode(x))

    def decode(self, codes: Codes | Tensor) -> Tensor:
        dense = codes.dense() if isinstance(codes, Codes) else codes
        require(
            dense.shape[-1] == len(self.mean),
            f"codes: got {show(dense)}, expected a last dimension of {len(self.mean)}",
        )
        return dense.to(self.mean) + self.mean


def _strongest(values: Tensor, k: int | None) -> Tensor:
    """The k values of largest absolute value in each row, the others zero."""
    if k is None or k >= values.shape[-1]:
        return values
    places = values.detach().abs().topk(k, -1).indices
    return torch.zeros_like(values).scatter(-1, places, values.gather(-1, places))


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        z, threshold = ctx.saved_tensors
        window = ((z - threshold).abs() < ctx.bandwidth / 2) / ctx.bandwidth
        to_threshold = -(threshold * window * grads[0]).flatten(0, -2).sum(0)
        return grads[0] * (z > threshold), to_threshold, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        z, threshold = ctx.saved_tensors
        window = ((z - threshold).abs() < ctx.bandwidth / 2) / ctx.bandwidth
        return torch.zeros_like(z), -(window * grads[0]).flatten(0, -2).sum(0), None
