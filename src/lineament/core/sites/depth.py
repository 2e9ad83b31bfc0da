"""Where to look at a network by default: its blocks in depth order, read off one forward, and the input of its head."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.models import called, frozen, rows_in, takes_hooks
from lineament.core.sites.activations import capture
from lineament.core.sites.data_flow import last_features
from lineament.core.sites.main_tensor import find

_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardswish,
)  # fmt: skip


_SIGNALS = (nn.Conv1d, nn.ConvTranspose1d)
_WEIGHTED = (*_SIGNALS, nn.Linear, nn.Embedding, nn.LayerNorm)


def default_sites(model: nn.Module, example: Any, most: int = 8) -> tuple[str, ...]:
    """Up to ``most`` sites in depth order: the outputs of the blocks, and last the input of the head.

    Blocks are modules numbered in a row (``layer.0``, ``layer.1``) or, in a plain network, its activations or layers.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    >>> default_sites(net, torch.zeros(1, 1, 8, 8))
    ('1', '3', '5:in')
    >>> default_sites(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(1, 4))
    ('1', '4:in')
    """
    modules = dict(model.named_modules())
    ran = _ran_once(model, example)
    last, around = last_features(model, example) or (None, ())
    head = around[-1] if around else None
    composite = [name for name in ran if _composite(modules[name])]
    blocks = _numbered(composite, modules) or _named(composite) or _activations(ran, modules, head)
    if last is not None:
        # What contains the head, or is the head, is the answer and no feature of it; so is what comes behind it.
        blocks = [name for name in blocks if name not in around and name != last]
        end = next((name for name in (head, last) if name in ran), None)
        if end is not None:
            blocks = [name for name in blocks if ran.index(name) < ran.index(end)]
        if blocks and _passes_on(model, example, blocks[-1], last):
            blocks = blocks[:-1]
    room = most - 1 if last is not None else most
    if len(blocks) > room:
        picked = torch.linspace(0, len(blocks) - 1, room).round().long().tolist()
        blocks = [blocks[i] for i in dict.fromkeys(picked)]
    chosen = [*blocks, *([last] if last is not None else [])]
    return tuple(chosen or ran[-most:])


def channel_axis(model: nn.Module, site: str, x: Tensor) -> int:
    """Which axis of what passes at a site holds its channels: the second of maps, the last of tokens and vectors.

    Three axes are a signal's (batch, channels, steps) where the layer with weights before it is a one-dimensional convolution of as many channels.

    >>> net = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU())
    >>> channel_axis(net, "1", torch.ones(2, 4, 7)), channel_axis(net, "1", torch.ones(2, 7, 9)), channel_axis(net, "1", torch.ones(2, 9))
    (1, 2, 1)
    """
    if x.ndim != 3:
        return 1
    name, _, side = site.partition(":")
    before: list[nn.Module] = []
    own: list[nn.Module] = []
    for path, module in model.named_modules():
        inside = path == name or path.startswith(f"{name}.")
        if own and not inside:
            break
        if isinstance(module, _WEIGHTED) or path == name:
            (own if inside else before).append(module)
    reads = [m for m in own if isinstance(m, _SIGNALS)][:1] if side == "in" else []
    if reads and reads[0].in_channels == x.shape[1]:
        return 1
    layers = [m for m in (before if side == "in" else [*before, *own]) if isinstance(m, _WEIGHTED)]
    last = layers[-1] if layers else None
    return 1 if isinstance(last, _SIGNALS) and last.out_channels == x.shape[1] else 2


def tokens_of(model: nn.Module, site: str, x: Tensor) -> Tensor:
    """What passes at a site, a signal (batch, channels, steps) as the sequence (batch, steps, channels) that it is; all else as it is.

    >>> tokens_of(nn.Sequential(nn.Conv1d(1, 4, 3)), "0", torch.ones(2, 4, 7)).shape
    torch.Size([2, 7, 4])
    """
    return x.transpose(1, 2) if x.ndim == 3 and channel_axis(model, site, x) == 1 else x


def layer_kind(module: nn.Module) -> str:
    """``"convolution"``, ``"linear"`` or ``""``, also in an exported network, whose modules have lost their classes."""
    if isinstance(module, nn.Conv2d):
        return "convolution"
    if isinstance(module, nn.Linear):
        return "linear"
    weight = getattr(module, "weight", None)  # also one that is computed anew at each use
    if (
        not isinstance(weight, Tensor)
        or any(True for _ in module.children())
        or isinstance(module, nn.Embedding)
    ):
        return ""
    return {2: "linear", 4: "convolution"}.get(weight.ndim, "")


def _ran_once(model: nn.Module, example: Any) -> list[str]:
    """The modules that ran once and returned floating-point rows, one a sample, in the order in which they finished."""
    calls: Counter[str] = Counter()
    ran: list[str] = []

    def hook(name: str):
        def seen(_module: nn.Module, _args: object, output: object) -> None:
            calls[name] += 1
            found = find(output)
            if found is None or not found[1].is_floating_point():
                return
            if found[1].ndim >= 2 and len(found[1]) == rows_in(example):
                ran.append(name)

        return seen

    with ExitStack() as hooks, frozen(model), torch.no_grad():
        for name, module in model.named_modules():
            if name and takes_hooks(module):
                hooks.callback(module.register_forward_hook(hook(name)).remove)
        called(model, example)
    return [name for name in ran if calls[name] == 1]


def _composite(module: nn.Module) -> bool:
    """Whether a module has parts and weights."""
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def _passes_on(model: nn.Module, example: Any, block: str, last: str) -> bool:
    """Whether what a block returns is, unchanged, what the head reads: one place, not two."""
    with frozen(model), torch.no_grad(), capture(model, [block, last]) as acts:
        called(model, example)
    given, taken = acts[block], acts[last]
    return given.shape == taken.shape and torch.equal(given, taken)


def _numbered(composite: list[str], modules: dict[str, nn.Module]) -> list[str]:
    """The outermost modules that are numbered beside others of their class."""
    rows: dict[tuple[str, type], list[str]] = {}
    for name in composite:
        parent, _, last = name.rpartition(".")
        if last.isdigit():
            rows.setdefault((parent, type(modules[name])), []).append(name)
    names = {name for row in rows.values() if len(row) >= 2 for name in row}
    outer = {n for n in names if not any(n.startswith(f"{other}.") for other in names)}
    return [name for name in composite if name in outer]


def _named(composite: list[str]) -> list[str]:
    """The children of the network, where there are several: ``stem``, ``block1``, ``block2``."""
    names = [name for name in composite if "." not in name]
    return names if len(names) >= 3 else []


def _activations(ran: list[str], modules: dict[str, nn.Module], head: str | None) -> list[str]:
    acted = [name for name in ran if isinstance(modules[name], _ACTIVATIONS)]
    layers = [
        name
        for name in ran
        if (layer_kind(modules[name]) or isinstance(modules[name], (nn.Conv1d, nn.Conv3d))) and name != head
    ]
    return acted if len(acted) >= max(1, len(layers) // 2) else layers
