"""One dictionary's training, step by step: its options, its start values, its optimizer and its counters, in scaled units.

The harvest and the loop around it are in :mod:`lineament.dictionaries.training`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineament.core import checks, results
from lineament.core.checks import InputError, number, require
from lineament.core.codes import Codes
from lineament.core.shards import joined, totals
from lineament.dictionaries.autoencoders import BatchTopK, Gated, JumpReLU, TopK
from lineament.dictionaries.harvest import Rows, seeded
from lineament.dictionaries.saving import weights_hash
from lineament.dictionaries.topk import shards, step
from lineament.train.processes import OneProcess

_FIRED = 1e-3  # a latent counts as on above this, in scaled units


@dataclass(frozen=True)
class TrainingOptions:
    """What is rarely changed. Shares are of all steps.

    Attributes:
        warmup: the rate rises linearly over this share (at most 1,000 steps). decay: it falls linearly to zero over the last share.
        clip: the gradient's norm is at most this; ``None``: never clipped. betas, eps: Adam's.
        ema: the decay of a moving average of the weights, which is then what is returned.
        alpha: the weight of the dead latents' loss (TopK kinds). k_aux: at most so many of them a row; by default d / 2, no more than 256.
        dead_tokens: a latent is dead when it was not on for so many; by default a tenth of the training's, no more than ten million.
        sparsity: the weight of the penalty of the other kinds: of ReLU and Gated the mean sum of values over the root of the data's variance (by default
            0.1), of JumpReLU the mean number that is on (0.001); it rises over ``sparsity_warmup``.
        influence: ``"rms"``: a gradient-aware selection divides |w . g| by its root mean square over the first rows, measured once;
            ``"given"``: it keeps its ``influence_scale``.
        control: what is done to gradients: ``"shuffled"`` over the rows of a batch, or ``"random"`` directions of each row's norm.
        frozen: names of parameters that stay, such as ``("W_dec",)``.
        variance: the loss's denominator: ``"data"``, measured once, or ``"batch"``, each batch's own.
        exclude, buffer: of :func:`lineament.dictionaries.harvest`.
        log: a folder for TensorBoard.

    >>> TrainingOptions(k_aux=16).alpha
    0.03125
    """

    warmup: float = 0.05
    decay: float = 0.2
    clip: float | None = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 6.25e-10
    ema: float | None = None
    alpha: float = 1 / 32
    k_aux: int | None = None
    dead_tokens: int | None = None
    sparsity: float | None = None
    sparsity_warmup: float = 0.05
    influence: str = "rms"
    control: str | None = None
    frozen: tuple[str, ...] = ()
    variance: str = "data"
    exclude: Any = "special"
    buffer: int | str = "1GB"
    log: str | None = None

    def __post_init__(self) -> None:
        for name in ("warmup", "decay", "sparsity_warmup"):
            number(name, getattr(self, name), low=0, high=1)
        number("alpha", self.alpha, low=0)
        if self.sparsity is not None:
            number("sparsity", self.sparsity, low=0)
        if self.clip is not None:
            number("clip", self.clip, low=0, open_low=True)
        if self.ema is not None:
            number("ema", self.ema, low=0, high=1, open_high=True)
        checks.one_of("influence", self.influence, ("rms", "given"))
        checks.one_of("variance", self.variance, ("data", "batch"))
        if self.control is not None:
            checks.one_of("control", self.control, ("shuffled", "random"))


@dataclass(frozen=True)
class Moment:
    """How a training stood after a number of tokens: means over the steps since the moment before."""

    tokens: int
    fvu: float
    auxiliary: float
    l0: float
    dead: float


@dataclass(repr=False)
class Trained(results.Readable):
    """What :func:`train_dictionary` returns.

    Attributes:
        dictionary: in the units of x; its ``info`` holds all that repeats the training.
        history: how it went; ``dead`` is the share of latents that were not on for ``dead_tokens``.
        tokens: rows that it saw. zero_rows: those whose gradient was zero, where the selection was plain TopK's.
    """

    dictionary: Any
    history: list[Moment]
    tokens: int
    zero_rows: int
    dead: float
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        told = {
            "history": self.history,
            "tokens": self.tokens,
            "zero_rows": self.zero_rows,
            "dead": self.dead,
        }
        return results.plain({**told, "notes": self.notes, "info": self.dictionary.info})

    def plot(self, ax: Any = None) -> Any:
        """Unexplained variance and dead latents against tokens."""
        ax = results.axes(ax, figsize=(5, 3.2), layout="constrained")
        tokens = [m.tokens for m in self.history]
        ax.plot(tokens, [m.fvu for m in self.history], label="variance unexplained")
        ax.plot(tokens, [m.dead for m in self.history], label="dead latents")
        ax.set(xlabel="tokens", ylim=(0, None))
        ax.legend()
        return ax


class Trainer:
    """One dictionary's training, in scaled units."""

    def __init__(
        self,
        dictionary: Any,
        first: Rows,
        options: TrainingOptions,
        about: Mapping[str, Any],
        place: int,
        processes: OneProcess,
    ):
        # Of features that lie with several processes each step is one of all rows, in all of them.
        self.divided = isinstance(dictionary, TopK) and dictionary.divided
        self.options, self.processes = options, OneProcess(first.x.device) if self.divided else processes
        self.seed, self.place = about["seed"], place
        self.dictionary = sae = copy.deepcopy(dictionary)
        sae = sae if self.divided else sae.to(first.x.device)
        sae.site = about["site"]
        self.told = {
            "kind": type(sae).__name__,
            "settings": dict(sae.settings),
            "initial_sha256": weights_hash(sae),
            "options": asdict(options),
        }
        self.about = {**about, **self.told}
        d = sae.d
        x = first.x.to(sae.b_dec)
        spread = float((x - x.mean(0)).double().square().sum(1).mean())
        require(
            spread > 0,
            f"site: nothing varies at {about['site']!r} over {len(x):,} rows, so that there is nothing to explain; choose another site",
        )
        self.scale = math.sqrt(d / spread)
        self.variance = d if options.variance == "data" else None
        norms = shards.all_columns(shards.local(sae.W_dec).detach().norm(dim=1)[None], sae.W_dec)
        fresh = not bool(norms.any())
        if not fresh:
            off = float((norms - 1).abs().max())
            require(
                off < 1e-2,
                f"dictionary: atoms of norm {float(norms.min()):.3g} to {float(norms.max()):.3g}, expected 1; divide them by their norms",
            )
        sae.rescale_(self.scale)
        if fresh:
            initialise(sae, x * self.scale, seed=self.seed)
        self.gradient = isinstance(sae, TopK) and about["gradient"] is not None and _ranks(sae.selection)
        if self.gradient and first.gradient is not None and options.influence == "rms":
            g = first.gradient[:2048].to(sae.b_dec) / self.scale
            along = (g @ shards.local(sae.W_dec).detach().T).double().square().sum()
            root = math.sqrt(float(totals(along) if self.divided else along) / (len(g) * sae.width))
            require(
                root > 0,
                f"gradient: is zero in all of {len(first):,} rows, so that nothing is ranked by it (a loss that does not depend on the site, or that is at "
                "its minimum there, such as the KL divergence to the clean output); choose another",
            )
            sae.selection = replace(sae.selection, influence_scale=root)
        width = sae.width
        rate = about["learning_rate"]
        self.rate = 2e-4 * math.sqrt(2**14 / width) if rate == "auto" else float(rate)
        self.k_aux = min(256, max(1, d // 2)) if options.k_aux is None else options.k_aux
        told = options.dead_tokens
        self.dead_tokens = min(10_000_000, max(1, about["tokens"] // 10)) if told is None else told
        self.sparsity = (
            (1e-3 if isinstance(sae, JumpReLU) else 0.1) if options.sparsity is None else options.sparsity
        )
        self.silent = torch.zeros(width, dtype=torch.int64, device=first.x.device)
        known = dict(sae.named_parameters())
        for name in options.frozen:
            checks.one_of("frozen", name, known)
        trained = {name: shards.local(p).detach() for name, p in known.items() if name not in options.frozen}
        self.adam = step.Adam(
            trained, unit=("W_dec",) if "W_dec" in trained else (), betas=options.betas, eps=options.eps
        )
        self.average = {name: p.clone() for name, p in trained.items()} if options.ema is not None else {}
        self.history: list[list[float]] = []
        self.sums = torch.zeros(4, dtype=torch.float64, device=first.x.device)
        self.counted = self.seen = 0
        self.writer = _writer(options.log, place)

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": dict(self.dictionary.state_dict()),
            "adam": self.adam.state_dict(),
            "average": self.average,
            "silent": self.silent,
            "sums": self.sums,
            "numbers": [self.counted, self.seen],
            "history": self.history,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.dictionary.load_state_dict(state["weights"])
        self.adam.load_state_dict(state["adam"])
        for name, value in state["average"].items():
            self.average[name].copy_(value)
        self.silent.copy_(state["silent"])
        self.sums.copy_(state["sums"])
        self.counted, self.seen = state["numbers"]
        self.history = [list(moment) for moment in state["history"]]

    def step(self, rows: Rows, number_: int, steps: int) -> None:
        sae, options = self.dictionary, self.options
        if self.divided:
            rows = replace(rows, x=joined(rows.x), gradient=None if rows.gradient is None else joined(rows.gradient))  # fmt: skip
        x = rows.x.to(sae.b_dec) * self.scale
        done = number_ / steps
        if isinstance(sae, TopK):
            grads, found, codes = self._topk(x, self._gradient(rows, number_))
            losses = (found.reconstruction, found.auxiliary)
            l0 = codes.count().double().mean()
        else:
            weight = self.sparsity * min(
                1.0, done / options.sparsity_warmup if options.sparsity_warmup else 1.0
            )
            grads, losses, on = _by_autograd(sae, x, self.variance, weight)
            l0 = on.sum(1).double().mean()
            self.count(on.any(0).nonzero().flatten(), len(x))
        self.update(grads, losses, l0, len(x), number_, steps)

    def update(
        self,
        grads: dict[str, Tensor],
        losses: tuple[Tensor, Tensor],
        l0: Tensor,
        rows: int,
        number_: int,
        steps: int,
    ) -> None:
        """One step of Adam with these gradients, and what is told of it."""
        options = self.options
        if self.processes.count > 1:
            for name in grads:
                torch.distributed.all_reduce(grads[name])
                grads[name] /= self.processes.count
        scale: Any = 1.0
        if options.clip is not None:
            norm = self._norm(grads)
            scale = (options.clip / (norm + 1e-6)).clamp_max(1.0)
        self.adam.step(grads, self.rate * self._schedule(number_ / steps, steps), scale)
        for name, average in self.average.items():
            average.lerp_(self.adam.parameters[name], 1 - (options.ema or 0.0))
        dead = (self.silent > self.dead_tokens).double().mean()
        self.sums += torch.stack([losses[0].double(), losses[1].double(), l0, dead])
        self.counted += 1
        self.seen += rows * self.processes.count
        if self.counted * 50 >= steps or number_ + 1 == steps:
            self._record()

    def _norm(self, grads: dict[str, Tensor]) -> Tensor:
        sizes = {name: torch.linalg.vector_norm(g) for name, g in grads.items()}
        if self.divided:
            parts = [name for name in sizes if name in shards.DIVIDED]
            squares = totals(torch.stack([sizes[name].square() for name in parts]))
            sizes.update(zip(parts, squares.sqrt()))
        return torch.stack(list(sizes.values())).norm()

    def _topk(self, x: Tensor, g: Tensor | None) -> tuple[dict[str, Tensor], step.Losses, Codes]:
        sae = self.dictionary
        with torch.no_grad():
            # By the pool, whatever threshold rows are judged by one at a time.
            codes = TopK.chosen(sae, sae.rows(x), g)
            if isinstance(sae, BatchTopK):
                least = torch.where(codes.values > 0, codes.values, torch.inf).min()
                if self.processes.count > 1:
                    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
                if bool(least.isfinite()):
                    sae.threshold.copy_(
                        least if float(sae.threshold) < 0 else sae.threshold.lerp(least, 0.01)
                    )
        self.count(codes.indices[codes.values > _FIRED], len(x))
        dead = self.silent > self.dead_tokens
        grads, found = step.gradients(
            sae, x, codes, alpha=self.options.alpha, dead=dead, k_aux=self.k_aux, variance=self.variance
        )
        return {name: grad for name, grad in grads.items() if name in self.adam.parameters}, found, codes

    def _gradient(self, rows: Rows, number_: int) -> Tensor | None:
        if not self.gradient:
            return None
        g = rows.gradient.to(self.dictionary.b_dec) / self.scale
        if self.options.control is None:
            return g
        generator = seeded(self.seed, self.place, number_)
        if self.options.control == "shuffled":
            return g[torch.randperm(len(g), generator=generator)]
        directions = torch.randn(g.shape, generator=generator).to(g)
        return directions * (g.norm(dim=1) / directions.norm(dim=1))[:, None]

    def count(self, fired: Tensor, rows: int) -> None:
        self.silent += rows * self.processes.count
        self.silent[fired] = 0
        if self.processes.count > 1:
            torch.distributed.all_reduce(self.silent, torch.distributed.ReduceOp.MIN)

    def _schedule(self, done: float, steps: int) -> float:
        warm = min(self.options.warmup, 1000 / steps)
        rising = min(1.0, (done + 1 / steps) / warm) if warm > 0 else 1.0
        left = (1 - done) / self.options.decay if self.options.decay > 0 else 1.0
        return min(rising, left, 1.0)

    def _record(self) -> None:
        means = (self.sums / self.counted).tolist()
        if not math.isfinite(means[0]):
            raise checks.NotFiniteError(
                f"the loss is {means[0]} after {self.seen:,} tokens; expected a finite one; a lower learning_rate than {self.rate:.3g} may help"
            )
        self.history.append(
            [float(self.seen), *means[:3], float((self.silent > self.dead_tokens).double().mean())]
        )
        if self.writer is not None:
            for name, value in zip(("fvu", "auxiliary", "l0", "dead"), self.history[-1][1:]):
                self.writer.add_scalar(name, value, self.seen)
        self.sums.zero_()
        self.counted = 0

    def finished(self, tokens: int, zero_rows: int) -> Trained:
        sae = self.dictionary
        with torch.no_grad():
            for name, average in self.average.items():
                self.adam.parameters[name].copy_(average)
            if self.average and "W_dec" in self.average:
                atoms = shards.local(sae.W_dec)
                atoms.div_(atoms.norm(dim=1, keepdim=True))
        sae.rescale_(1 / self.scale)
        dead = float((self.silent > self.dead_tokens).double().mean())
        notes = []
        if self.gradient and zero_rows:
            notes.append(
                f"{zero_rows:,} of {tokens:,} rows had a gradient of zero, where the selection was plain TopK's"
            )
        if dead:
            notes.append(f"{dead:.1%} of the latents were not on in the last {self.dead_tokens:,} tokens")
        sae.info = {
            **sae.info,
            "training": results.plain({**self.about, "dead_tokens": self.dead_tokens, "rate": self.rate}),
        }
        if self.writer is not None:
            self.writer.close()
        history = [Moment(int(m[0]), *m[1:]) for m in self.history]
        return Trained(sae, history, tokens, zero_rows if self.gradient else 0, dead, notes)


@torch.no_grad()
def initialise(dictionary: Any, x: Tensor, *, seed: int = 0) -> None:
    """Start values from some rows: b_dec at their geometric median, random atoms of norm 1, the encoder their transpose, scaled so that random rows of
    the typical norm get reconstructions of that norm.

    >>> sae = TopK(3, 8, k=2); initialise(sae, torch.randn(50, 3))
    >>> round(sae.atoms.norm(dim=1).mean().item(), 4)
    1.0
    """
    generator = seeded(seed)
    encoder, atoms = shards.local(dictionary.W_enc), shards.local(dictionary.W_dec)
    first = shards.bounds(dictionary.width)[0] if shards.divided(dictionary.W_dec) else 0
    _directions_(atoms, dictionary.width, first, generator)
    encoder.copy_(atoms)
    dictionary.b_enc.zero_()
    dictionary.b_dec.copy_(geometric_median(x))
    typical = float((x - x.mean(0)).square().sum(1).mean().sqrt())
    if isinstance(dictionary, JumpReLU):
        if dictionary.bandwidth is None:
            dictionary.bandwidth = dictionary.settings["bandwidth"] = 1e-3 * typical
        dictionary.log_threshold.fill_(math.log(dictionary.bandwidth))
    probe = torch.randn(256, dictionary.d, generator=generator, dtype=torch.float64).to(dictionary.b_dec)
    probe = probe / probe.norm(dim=1, keepdim=True) * typical
    offset = dictionary.b_dec if dictionary.subtract_bias else 0
    out = dictionary.decode(dictionary.codes(probe + offset)) - dictionary.b_dec
    encoder.mul_(typical / float(out.norm(dim=1).mean().clamp_min(0.01 * typical)))


def _directions_(
    own: Tensor, width: int, first: int, generator: torch.Generator, at_once: int = 2**14
) -> None:
    """Fill ``own`` with the rows from ``first`` on of ``width`` random directions, drawn some at a time: the same numbers whoever holds which."""
    for start in range(0, width, at_once):
        drawn = torch.randn(
            min(at_once, width - start), own.shape[1], generator=generator, dtype=torch.float64
        )
        drawn = drawn[max(0, first - start) : max(0, first + len(own) - start)]
        if len(drawn):
            place = max(0, start - first)
            own[place : place + len(drawn)] = (drawn / drawn.norm(dim=1, keepdim=True)).to(own)


def geometric_median(x: Tensor, steps: int = 30) -> Tensor:
    """(d): the point whose distances to the rows have the least sum (Weiszfeld's iteration).

    >>> geometric_median(torch.tensor([[0.0], [0.0], [9.0]])).round(decimals=3).item()
    0.0
    """
    found = x.double().mean(0)
    for _ in range(steps):
        weights = 1 / (x.double() - found).norm(dim=1).clamp_min(1e-9)
        found = (weights @ x.double()) / weights.sum()
    return found.to(x.dtype)


def _by_autograd(
    sae: Any, x: Tensor, variance: float | None, weight: float
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Gradients, (reconstruction, penalty) and what is on, of the kinds with a penalty."""
    var: Any = (
        (x - x.mean(0)).square().sum(1).mean()
        if variance is None
        else torch.tensor(float(variance), device=x.device)
    )
    with torch.enable_grad():
        z = sae.pre_activations(x)
        f = sae.activate(z)
        reconstruction = (x - sae.decode(f)).square().sum(1).mean() / var
        if isinstance(sae, JumpReLU):
            penalty = weight * sae.on(z).sum(1).mean()
            extra = torch.zeros_like(penalty)
        else:
            gate = (z - sae.b_enc + sae.b_gate).relu() if isinstance(sae, Gated) else f
            penalty = weight * gate.sum(1).mean() / var.sqrt()
            extra = torch.zeros_like(penalty)
            if isinstance(sae, Gated):
                # The gate alone must explain the activation too; the decoder is not moved by that.
                again = gate @ sae.W_dec.detach() + sae.b_dec.detach()
                extra = (x - again).square().sum(1).mean() / var
        named = dict(sae.named_parameters())
        found = torch.autograd.grad(
            reconstruction + penalty + extra, list(named.values()), allow_unused=True, materialize_grads=True
        )
    return dict(zip(named, found)), (reconstruction.detach(), (penalty + extra).detach()), f.detach() > _FIRED


def _ranks(selection: Any) -> bool:
    return selection.beta > 0 or selection.score in ("product", "signed")


def _writer(log: str | None, place: int) -> Any:
    if log is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "log: needs the package 'tensorboard', which is not installed; install lineament[train]"
        ) from error
    return SummaryWriter(str(Path(log) / f"dictionary-{place}"))
