"""Turn features up, down or off while a model runs: in a forward, in ``generate``, in a training loop.

An edit is in difference form, x + (f' - f) w, so that what the dictionary does not explain stays in place: a feature that keeps its value changes no bit.
Nothing but the hook at the site is needed, so that whatever calls the model is steered, with and without a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, number, one_of, require, show
from lineament.core.models import unwrapped
from lineament.core.redrawing import copied
from lineament.core.sites.families import blocks_of, hook_of_site
from lineament.core.sites.hooks import CHANGE, Function, eagerly, replace, watch
from lineament.core.sites.naming import Site
from lineament.dictionaries.splice import features_back, features_last, site_in

Positions = Literal["generated", "all", "last"] | Tensor
_WORDS = ("generated", "all", "last")
Where = Tensor | EllipsisType | tuple[slice, slice]


@dataclass(frozen=True)
class Steer:
    """One feature and what to do with it: exactly one of ``add``, ``clamp`` and ``scale``.

    Attributes:
        dictionary: where the feature is from. latent: its number.
        add: add so many typical norms of the site along the feature's direction, whatever its value.
        clamp: set it to so many times its maximum. scale: multiply it; 0 turns it off.
        unit: what 1 of ``add`` or ``clamp`` is, in the units of the activation; by default what was measured (see :func:`steer`).

    >>> from lineament.dictionaries import Neurons
    >>> Steer(Neurons(2, site="0"), 1, add=4.0).direction.tolist()
    [0.0, 1.0]
    """

    dictionary: Any
    latent: int
    add: float | None = None
    clamp: float | None = None
    scale: float | None = None
    unit: float | None = None

    def __post_init__(self) -> None:
        width = getattr(self.dictionary, "width", None) or len(self.dictionary.atoms)
        number("latent", self.latent, low=0, high=width - 1, integer=True)
        given = [name for name in ("add", "clamp", "scale") if getattr(self, name) is not None]
        require(
            len(given) == 1,
            f"add, clamp, scale: got {' and '.join(given) or 'none'}, expected one of them, such as Steer(dictionary, 12, add=4.0)",
        )
        number(given[0], getattr(self, given[0]))
        if self.unit is not None:
            number("unit", self.unit, low=0, open_low=True)

    @property
    def direction(self) -> Tensor:
        """The feature's atom."""
        return self.dictionary.atoms[self.latent].detach()


@contextmanager
def steer(
    model: nn.Module,
    steers: Steer | Sequence[Steer],
    *,
    positions: Positions = "generated",
    units: Any = None,
) -> Iterator[None]:
    """Steer a model while the block runs; afterwards, also after an exception, it is as it was.

    Args:
        steers: what to do; each feature once.
        positions: ``"generated"``: from the last token of the prompt on, whose output is the first new token; outside ``generate``, the last token of each
            row. ``"last"``: that one token alone. ``"all"``: every token of the prompt and after it. A mask (batch, positions): where it is true, and
            nowhere behind its end. Sites without token positions (vectors, maps) are steered everywhere, or by a mask of their shape.
        units: what measured the site's typical norm and the features' maxima: an :class:`~lineament.dictionaries.examples.Examples`, or any object with
            ``typical_norm`` and ``maxima``; not needed for ``scale`` and where ``unit`` is given.

    Raises:
        InputError: an unknown site or feature, a feature twice, a unit that was not measured, a feature that was never on clamped to its maximum.

    >>> from lineament.dictionaries import Neurons
    >>> net = nn.Sequential(nn.Identity())
    >>> with steer(net, Steer(Neurons(2, site="0"), 1, scale=10.0)):
    ...     net(torch.tensor([[1.0, 2.0]])).tolist()
    [[1.0, 20.0]]
    """
    listed = [steers] if isinstance(steers, Steer) else list(steers)
    require(
        bool(listed) and all(isinstance(each, Steer) for each in listed),
        f"steers: got {show(steers)}, expected a Steer or several",
    )
    if not isinstance(positions, Tensor):
        one_of("positions", positions, _WORDS)
    by_site: dict[tuple[int, str], tuple[Site, list[_Edit]]] = {}
    seen: set[tuple[int, int]] = set()
    for each in listed:
        key = (id(each.dictionary), each.latent)
        require(
            key not in seen, f"steers: latent {each.latent} of one dictionary is named twice, expected once"
        )
        seen.add(key)
        site = site_in(model, each.dictionary)
        by_site.setdefault(site.key, (site, []))[1].append(_Edit(each, units))
    tokens = _Tokens(model, positions)
    with ExitStack() as stack:
        tokens.watched(stack)
        for site, edits in by_site.values():
            stack.enter_context(replace(model, {site: _changed(site, edits, tokens)}))
        stack.enter_context(eagerly())
        yield


class _Edit:
    """A checked :class:`Steer`: what it adds, or what value it gives."""

    def __init__(self, steer: Steer, units: Any):
        self.steer, self.dictionary, self.latent = steer, steer.dictionary, steer.latent
        self.direction = steer.direction
        self.constant: Tensor | None = None
        self.value = 0.0
        if steer.add is not None:
            unit = steer.unit if steer.unit is not None else _typical_norm(steer.dictionary, units)
            self.constant = steer.add * unit * self.direction / self.direction.norm()
        elif steer.clamp is not None:
            self.value = steer.clamp * (steer.unit if steer.unit is not None else _maximum(steer, units))
        if steer.add is None:
            threshold = getattr(steer.dictionary, "threshold", None)
            pooled = (
                getattr(steer.dictionary, "pool", None) is not None
                or type(steer.dictionary).__name__ == "BatchTopK"
            )
            require(
                not pooled or threshold is None or float(torch.as_tensor(threshold).max()) >= 0,
                "dictionary: its features hang on the other rows of a batch until its threshold is measured, so that only add=... has a meaning",
            )

    def moved(self, f: Tensor) -> Tensor:
        """f' - f for values of the feature."""
        return (self.steer.scale - 1) * f if self.steer.scale is not None else self.value - f


def _typical_norm(dictionary: Any, units: Any) -> float:
    found = getattr(units, "typical_norm", None)
    found = getattr(dictionary, "info", {}).get("typical_norm") if found is None else found
    if found is None:
        raise InputError(
            "units: the site's typical norm, of which add=1 is one, was not measured; expected units=max_examples(model, dictionary, data), "
            "or Steer(..., unit=...) in the units of the activation"
        )
    return float(number("typical_norm", float(found), low=0, open_low=True))


def _maximum(steer: Steer, units: Any) -> float:
    maxima = getattr(units, "maxima", None)
    maxima = getattr(steer.dictionary, "info", {}).get("maxima") if maxima is None else maxima
    if maxima is None:
        raise InputError(
            "units: the features' maxima, of which clamp=1 is one, were not measured; expected units=max_examples(model, dictionary, data), "
            "or Steer(..., unit=...) in the units of the activation"
        )
    require(
        len(maxima) == len(steer.dictionary.atoms),
        f"units: of {len(maxima)} features, expected those of this dictionary of {len(steer.dictionary.atoms)}",
    )
    found = float(maxima[steer.latent])
    require(
        found > 0,
        f"clamp: latent {steer.latent} was never on in the data that measured its maximum, so that there is none to clamp it to; give Steer(..., unit=...) or use add",
    )
    return found


def _changed(site: Site, edits: Sequence[_Edit], tokens: _Tokens) -> Function:
    constants = [edit.constant for edit in edits if edit.constant is not None]
    by_dictionary: dict[int, list[_Edit]] = {}
    for edit in edits:
        if edit.constant is None:
            by_dictionary.setdefault(id(edit.dictionary), []).append(edit)
    constant = torch.stack(constants).sum(0) if constants else None
    placed: dict[Any, Tensor] = {}

    def see(value: Tensor) -> Tensor | None:
        x = features_last(value, site)
        for edit in edits:
            width = len(edit.direction)
            require(
                x.shape[-1] == width,
                f"site {site.name!r}: passed {show(value)}, expected {width} features, which the dictionary was made for",
            )
        where = tokens.where(x, token=value.ndim == 3)
        if where is None or (isinstance(where, Tensor) and not bool(where.any())):
            return None
        rows = x[where]
        new = rows
        if constant is not None:
            key = (x.device, x.dtype)
            if key not in placed:
                placed[key] = constant.to(*key)
            new = new + placed[key]
        for group in by_dictionary.values():
            codes = group[0].dictionary.codes(rows)
            moves = torch.stack([edit.moved(codes.column(edit.latent)) for edit in group], -1)
            atoms = torch.stack([edit.direction for edit in group]).to(moves)
            # Where nothing moves, not even the sign of a zero changes.
            new = torch.where((moves != 0).any(-1, keepdim=True), new + (moves @ atoms).to(x.dtype), new)
        if new.shape != x.shape:
            changed = x.clone()
            changed[where] = new
            new = changed
        return features_back(new, value, site)

    return see


class _Tokens:
    """Which tokens of the forward that is running are steered."""

    def __init__(self, model: nn.Module, positions: Positions):
        self.model, self.positions = unwrapped(model), positions
        self.prompt: int | None = None  # in generate, how long the prompt is
        self.past = 0
        self.padding: Tensor | None = None
        whole = isinstance(positions, str) and positions != "all"
        encodes = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        require(
            not (whole and encodes),
            f"positions: got {positions!r}, which means one sequence; of an encoder-decoder expected 'all' or a mask",
        )

    def watched(self, stack: ExitStack) -> None:
        """Follow the model's calls and its ``generate`` until ``stack`` closes."""
        watch(Site("", self.model, "in"), self._called, stack, CHANGE)
        generate = getattr(self.model, "generate", None)
        if callable(generate):
            before = vars(self.model).get("generate")
            vars(self.model)["generate"] = self._generating(generate)

            def back() -> None:
                if before is None:
                    del vars(self.model)["generate"]
                else:
                    vars(self.model)["generate"] = before

            stack.callback(back)

    def _called(self, passed: Any) -> None:
        _, named = passed
        cache = named.get("past_key_values")
        length = getattr(cache, "get_seq_length", None)
        self.past = int(length()) if callable(length) else 0  # pyright: ignore[reportArgumentType]
        mask = named.get("attention_mask")
        self.padding = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _generating(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            given = (args[0] if args else None, *map(kwargs.get, ("inputs", "input_ids", "inputs_embeds")))
            prompt = next((each for each in given if isinstance(each, Tensor)), None)
            outer, self.prompt = self.prompt, 1 if prompt is None else prompt.shape[1]
            try:
                return generate(*args, **kwargs)
            finally:
                self.prompt = outer

        return wrapped

    def where(self, x: Tensor, *, token: bool) -> Where | None:
        """What of x is steered: an index, or a mask of its shape without the features; ``None`` is nothing."""
        if isinstance(self.positions, Tensor):
            return self._masked(x, self.positions.to(x.device).bool(), token)
        if self.positions == "all" or not token:
            return ...
        if self.prompt is None:
            return self._last(x)
        # Of a token that is written, known without a look at any tensor.
        first, length = self.prompt - 1 - self.past, x.shape[1]
        start, stop = max(first, 0), length if self.positions == "generated" else min(first + 1, length)
        if start >= stop:
            return None
        return ... if stop - start == length else (slice(None), slice(start, stop))

    def _last(self, x: Tensor) -> Tensor:
        """The last token of each row that is no padding."""
        rows, length = x.shape[:2]
        last = torch.full((rows,), length - 1, device=x.device)
        if self.padding is not None and self.padding.shape == (rows, self.past + length):
            real = self.padding[:, self.past :].to(x.device).long()
            last = (real * torch.arange(1, length + 1, device=x.device)).argmax(1)
        return torch.arange(length, device=x.device) == last[:, None]

    def _masked(self, x: Tensor, mask: Tensor, token: bool) -> Tensor:
        shape = x.shape[:-1]
        if token:
            require(
                mask.ndim == 2 and len(mask) > 0 and shape[0] % len(mask) == 0,
                f"positions: got {show(mask)}, expected a mask (batch, positions) for {shape[0]} rows",
            )
            # Beams, and several answers to one prompt, stand beside each other.
            mask = mask.repeat_interleave(shape[0] // len(mask), 0)[:, self.past : self.past + shape[1]]
            return nn.functional.pad(mask, (0, shape[1] - mask.shape[1]))
        require(
            mask.shape == shape,
            f"positions: got {show(mask)}, expected the site's shape without its features, {tuple(shape)}",
        )
        return mask


def as_bias(model: nn.Module, steers: Steer | Sequence[Steer], *, units: Any = None) -> nn.Module:
    """A copy of the model that is steered for good: constant additions at all positions, put into the bias of the layer that makes the activation.

    The copy is a plain checkpoint, which ``save_pretrained`` writes.

    Args:
        steers: each with ``add``. units: as of :func:`steer`.

    Raises:
        InputError: ``clamp`` or ``scale``, which are no constants; a site whose producer has no bias (Llama's, say), or is not known.

    >>> from lineament.dictionaries import Neurons
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> steered = as_bias(net, Steer(Neurons(2, site="0"), 1, add=3.0, unit=1.0))
    >>> (steered[0].bias - net[0].bias).tolist()
    [0.0, 3.0]
    """
    listed = [steers] if isinstance(steers, Steer) else list(steers)
    for each in listed:
        require(
            each.add is not None,
            f"steers: latent {each.latent} is {'clamped' if each.clamp is not None else 'scaled'}, which depends on the input; only add=... is a constant",
        )
    made = copied(unwrapped(model))
    for each in listed:
        site = site_in(made, each.dictionary)
        constant = _Edit(each, units).constant
        bias = _producer(made, site)
        with torch.no_grad():
            assert constant is not None
            require(
                bias.shape == constant.shape,
                f"site: what makes {site.name!r} has a bias of {len(bias)}, expected {len(constant)}",
            )
            bias.add_(constant.to(bias))
    return made


def _producer(model: nn.Module, site: Site) -> Tensor:
    """The bias of the layer whose output is what passes at a site, or is added to it last."""
    module, name = site.module, site.name
    hook = hook_of_site(site.name.removesuffix(":out"), model)
    known = blocks_of(model)
    if hook is not None and known is not None and hook.startswith("blocks."):
        _, names, _, blocks = known
        _, layer, kind = hook.split(".", 2)
        at = int(layer) - (kind == "hook_resid_pre")
        own = {"hook_attn_out": "mixed", "hook_mlp_out": "neurons"}
        if kind in own or (kind in ("hook_resid_pre", "hook_resid_post") and at >= 0):
            # Of families that normalise what they add, the layer that makes it is the norm.
            part = names["attn_out" if kind == "hook_attn_out" else "mlp_out"]
            projection = names[own.get(kind, "neurons")].removesuffix(":in")
            name = projection if projection.startswith(f"{part}.") else part
            module = blocks[at].get_submodule(name)
            return _bias(module, name, site)
    if site.side == "in" or site.view is not None:
        raise InputError(
            f"site: what makes the input {site.name!r} is not known; name the output of the layer that makes it"
        )
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    return _bias(module, name, site)


def _bias(module: nn.Module, name: str, site: Site) -> Tensor:
    bias = getattr(module, "bias", None)
    if not isinstance(bias, Tensor):
        raise InputError(
            f"site: {type(module).__name__} ({name}), which makes {site.name!r}, has no bias to put a constant into; use `steer`, or another site"
        )
    return bias
