"""Layer-wise relevance propagation on a model as it is: a block inside which only the backward pass changes.

Rezaei Jafari, Eberle, Khakzar, Nanda, "RelP", 2025 (arXiv 2508.21258); the rules are in :mod:`lineament.explain.relevance.functions`. Rules are set by
hooks when the block begins and are gone when it ends; the forward results are the model's to the bit. What each module got is in the
:class:`Coverage` that the block yields: a rule that matched nothing is an error, never a silent gradient under another name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lineament.core.checks import InputError, number, one_of, require, show, suggest
from lineament.core.models import unwrapped
from lineament.core.sites.heads import head_view
from lineament.core.sites.hooks import eagerly
from lineament.core.sites.naming import crossing, matching
from lineament.explain.relevance.functions import linear_map
from lineament.explain.relevance.hooks import Coverage, set_rule, softcap_of

RULES = {
    "ln": "normalisation with its statistic held constant",
    "identity": "activation phi(x) as x times the constant phi(x)/x",
    "half": "gate times up: half of the coefficient to each factor",
    "ah": "attention pattern held constant: nothing flows to queries and keys",
    "uniform": "attention shared evenly: half to the values, a quarter each to queries and keys",
    "softcap": "logit soft-cap s·tanh(z/s) as z times a constant",
    "epsilon": "linear maps with a stabilised denominator",
    "gamma": "linear maps that favour contributions of the output's sign",
    "detach": "the module's output is a constant",
    "gradient": "the plain gradient",
}
PRESETS = {
    "relp": ("ln", "identity", "half"),
    "relp+ah": ("ln", "identity", "half", "ah"),
    "attnlrp": ("ln", "identity", "half", "uniform"),
    "gradient": (),
}
# A preset or rule; several of them, with mappings for exceptions; or a mapping that alone decides.
Rules = str | Sequence[Any] | Mapping[Any, str]
# Modules that need no rule: linear in their input, or without influence in eval mode.
_LINEAR = {
    "Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D", "Embedding", "Identity", "Flatten", "Unflatten", "AvgPool1d", "AvgPool2d", "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d", "BatchNorm1d", "BatchNorm2d", "Dropout", "ZeroPad2d", "Upsample",
}  # fmt: skip
_ACTIVATIONS = (
    nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Tanh, nn.ELU, nn.CELU, nn.SELU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Softsign, nn.Softplus,
    nn.Sigmoid, nn.Hardsigmoid, nn.Hardtanh, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink, nn.LogSigmoid,
)  # fmt: skip


@contextmanager
def relevance_rules(
    model: nn.Module,
    rules: Rules = "relp",
    *,
    eps: float = 1e-6,
    gamma: float = 0.25,
) -> Iterator[Coverage]:
    """Give a model's modules LRP rules while the block runs; gradients taken of forwards inside are LRP coefficients.

    | rule | module | coefficient handed down for an upstream v |
    | --- | --- | --- |
    | ``ln`` | layer and RMS norms | centre(v·w/σ), v·w/rms |
    | ``identity`` | activations | v·phi(x)/x, its limit at 0 |
    | ``half`` | gate times up | v·q/2 to p, v·p/2 to q |
    | ``ah`` | attention | Aᵀv to the values, nothing to queries and keys |
    | ``uniform`` | attention | half the gradient to the values, a quarter each to queries and keys (AttnLRP) |
    | ``softcap`` | s·tanh(z/s) on the logits | v·s·tanh(z/s)/z |
    | ``epsilon`` | linear maps | v·z/(z + eps·sign z), then Wᵀ |
    | ``gamma`` | linear maps | contributions of the sign of z count 1 + gamma times |

    Args:
        model: any module in eval mode. Norms, activations (also those of transformers), gated MLPs (``gate_proj``, ``up_proj``,
            ``down_proj``) and attention blocks of known layouts are found by themselves.
        rules: a preset (``"relp"``: ln, identity, and half where there are gates; ``"relp+ah"``; ``"attnlrp"``; ``"gradient"``: none); a rule, which must
            match; or several of them. A mapping names modules by the module itself, class, name or glob, and alone decides,
            ``{nn.LayerNorm: "ln", MyAct: "identity"}``; among several rules it makes exceptions and additions,
            ``["relp", {"**.gate": "gradient", "blocks.*.q": "detach"}]``. ``"half"`` is given to the module that takes the product, ``"ah"`` and
            ``"uniform"`` to attention blocks, ``"detach"`` to anything.
        eps: of the epsilon-rule. gamma: of the gamma-rule.

    Raises:
        InputError: an unknown rule or module, a rule that matches nothing, contradictory rules, an activation with phi(0) != 0, a norm that
            is none, or a model in training mode.

    Source: Rezaei Jafari et al. 2025, section 3 and its official configuration (ah is off there).

    >>> import torch
    >>> net = nn.Sequential(nn.SiLU()).eval()
    >>> x = torch.tensor([0.0, 2.0], requires_grad=True)
    >>> with relevance_rules(net) as coverage:
    ...     y = net(x).sum()
    >>> torch.autograd.grad(y, x)[0], coverage.active()
    (tensor([0.5000, 0.8808]), {'identity': 1})
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: got {show(model)}, expected a torch.nn.Module")
    number("eps", eps, low=0, open_low=True)
    number("gamma", gamma, low=0)
    named = _named(model)
    busy = [name or type(model).__name__ for name, module in named.items() if module.training]
    require(
        not busy,
        f"model: {busy[0] if busy else ''!r} is in training mode, where dropout and gradient checkpointing change coefficients silently; "
        "call model.eval() first",
    )
    coverage = Coverage()
    with ExitStack() as stack:
        for name, module, rule in assigned(model, rules, named):
            set_rule(model, name, module, rule, coverage, stack, eps=eps, gamma=gamma)
        stack.enter_context(eagerly())
        yield coverage


def assigned(
    model: nn.Module, rules: Rules, named: Mapping[str, nn.Module] | None = None
) -> list[tuple[str, nn.Module, str]]:
    """(name, module, rule) of every module that gets a rule; see :func:`relevance_rules`. ``named``: all modules, where they are known."""
    named = _named(model) if named is None else named
    parts = [rules] if isinstance(rules, (str, Mapping)) else list(rules)
    extra: dict[Any, str] = {}
    automatic: list[str] = []
    # Rules of a preset need not match; others must.
    strict: set[str] = set()
    for part in parts:
        if isinstance(part, Mapping):
            extra |= part
        elif one_of("rules", part, [*PRESETS, *RULES]) in PRESETS:
            automatic += PRESETS[part]
        else:
            automatic.append(part)
            strict.add(part)
    for rule in extra.values():
        one_of("rules", rule, RULES)
    strict |= set(extra.values())
    for a, b in (("ah", "uniform"), ("epsilon", "gamma")):
        require(
            not {a, b} <= set(automatic),
            f"rules: {a!r} and {b!r} treat the same modules; expected one of them",
        )
    found: list[tuple[str, nn.Module, str]] = []
    decided: set[tuple[int, bool]] = set()
    for key, rule in extra.items():
        matches = _matches(key, named)
        require(
            bool(matches),
            f"rules: {show(key)} matches no module of {type(unwrapped(model)).__name__}{crossing(str(key), named) or suggest(str(key), [n for n in named if n])}",
        )
        for name in matches:
            decided.update((id(named[name]), late) for late in _sides(rule))
            if rule != "gradient":
                found.append((name, named[name], rule))
    for rule in automatic:
        for name, module in _candidates(rule, model, named):
            if (id(module), *_sides(rule)) not in decided:
                found.append((name, module, rule))
    matched = {rule for _, _, rule in found}
    missing = sorted(strict - matched - {"gradient"})
    require(
        not missing,
        f"rules: {', '.join(map(repr, missing))} matched no module of {type(unwrapped(model)).__name__}; leave it out, or name the modules: "
        "{'name or class': rule}",
    )
    if automatic and not found:
        others = sorted({type(m).__name__ for m in named.values() if not any(m.children())} - _LINEAR)
        require(
            not others,
            f"rules: none of {list(automatic)} matched a module of {type(unwrapped(model)).__name__} (leaf modules: {', '.join(others)}); name "
            "them: rules=['relp', {'name or class': rule}]",
        )
    return found


def _named(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by name, without what ``torch.compile`` put around it."""
    found: dict[str, nn.Module] = {}
    for name, module in unwrapped(model).named_modules():
        if "_orig_mod" in name:
            name = ".".join(part for part in name.split(".") if part != "_orig_mod")
        found[name] = unwrapped(module)
    return found


def _sides(rule: str) -> tuple[bool, ...]:
    """What a named rule replaces: the rules of norms, activations and attention (False), of linear maps (True), or both."""
    return (True, False) if rule == "gradient" else (rule in ("epsilon", "gamma", "half", "softcap"),)


def _matches(key: Any, named: Mapping[str, nn.Module]) -> list[str]:
    if isinstance(key, nn.Module):
        return [name for name, module in named.items() if module is unwrapped(key)][:1]
    if isinstance(key, type):
        return [name for name, module in named.items() if isinstance(module, key)]
    if not isinstance(key, str):
        raise InputError(f"rules: got {show(key)}, expected a module, a class, a name or a glob")
    return matching(key, named)


def _candidates(
    rule: str, model: nn.Module, named: Mapping[str, nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a rule finds by itself."""
    for name, module in named.items():
        kind = type(module).__name__
        if rule == "ln":
            fits = isinstance(module, (nn.LayerNorm, nn.RMSNorm))
            if not fits and kind.endswith(("RMSNorm", "LayerNorm")):
                fits = isinstance(getattr(module, "weight", None), Tensor) and not any(module.children())
        elif rule == "identity":
            # Inside another activation (GELUTanh keeps functions, but XIELU and its like keep parts) only the outer one counts.
            fits = isinstance(module, _ACTIVATIONS) or type(module).__module__ == "transformers.activations"
        elif rule == "half":
            parts = module._modules.keys()
            if {"gate_proj", "up_proj", "down_proj"} <= parts or {"gate_up_proj", "down_proj"} <= parts:
                yield f"{name}.down_proj" if name else "down_proj", unwrapped(module.down_proj)
            fits = False
        elif rule in ("ah", "uniform"):
            fits = any(head_view(module, "q", config) is not None for config in _configs(model, module))
        elif rule == "softcap":
            fits = name == "" and softcap_of(model) is not None
        elif rule in ("epsilon", "gamma"):
            fits = linear_map(module) is not None
        else:
            fits = False
        if fits:
            yield name, module


def _configs(model: nn.Module, module: nn.Module) -> list[Any]:
    return [
        config
        for config in (getattr(module, "config", None), getattr(unwrapped(model), "config", None))
        if config is not None
    ]
