"""What a network is made of, read off one forward: its blocks in depth order, and the input its first layer expects."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lineament.core.models import frozen
from lineament.core.sites.activations import capture
from lineament.core.sites.main_tensor import find


@dataclass(frozen=True)
class Expected:
    """The input of the first layer with weights: ``size`` channels or features, whether images, and in words."""

    size: int
    images: bool | None
    text: str


@dataclass(frozen=True)
class Step:
    """A module that ran: its name, how often, and the shape of its first tensor."""

    name: str
    calls: int
    shape: tuple[int, ...]
    floating: bool


def expected_input(model: nn.Module) -> Expected:
    """What the first convolution or linear layer says about the input.

    >>> expected_input(nn.Sequential(nn.Conv2d(3, 8, 3))).text
    'images with 3 channels (batch, 3, height, width)'
    """
    config = getattr(model, "config", None)
    side = getattr(config, "image_size", None)
    for module in model.modules():
        kind = _kind(module)
        if kind == "convolution":
            channels = _channels(module)
            size = f", {side}, {side}" if isinstance(side, int) else ", height, width"
            return Expected(channels, True, f"images with {channels} channels (batch, {channels}{size})")
        if isinstance(module, nn.Linear):
            return Expected(
                module.in_features, None, f"{module.in_features} features in its first linear layer"
            )
    return Expected(-1, None, "an input that its layers do not tell")


def _kind(module: nn.Module) -> str:
    """Convolution or linear layer, also in an exported network, whose modules have lost their classes."""
    if isinstance(module, nn.Conv2d):
        return "convolution"
    if isinstance(module, nn.Linear):
        return "linear"
    weight = module._parameters.get("weight")
    if weight is None or any(True for _ in module.children()) or isinstance(module, nn.Embedding):
        return ""
    return {2: "linear", 4: "convolution"}.get(weight.ndim, "")


def _channels(module: nn.Module) -> int:
    weight = module.get_parameter("weight")
    return int(weight.shape[1]) * int(getattr(module, "groups", 1))


def steps(model: nn.Module, example: Tensor) -> list[Step]:
    """Every module that ran, in the order in which they finished."""
    order: list[str] = []
    count: dict[str, int] = {}
    shapes: dict[str, tuple[tuple[int, ...], bool]] = {}
    handles = []

    def hook(name: str):
        def seen(_module: nn.Module, _args: object, output: object) -> None:
            found = find(output)
            count[name] = count.get(name, 0) + 1
            if found is not None:
                shapes[name] = tuple(found[1].shape), found[1].is_floating_point()
                if count[name] == 1:
                    order.append(name)

        return seen

    try:
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_hook(hook(name)))
        with frozen(model), torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return [Step(name, count[name], *shapes[name]) for name in order]


def default_sites(model: nn.Module, example: Tensor, most: int = 8) -> tuple[str, ...]:
    """Up to ``most`` places in depth order: the outputs of the blocks, and last the input of the head.

    Blocks are modules numbered in a row (``layer.0``, ``layer.1``) or, in a plain network, its activations or layers.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    >>> default_sites(net, torch.zeros(1, 1, 8, 8))
    ('1', '3', '5:in')
    >>> default_sites(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(1, 4))
    ('1', '4:in')
    """
    modules = dict(model.named_modules())
    batch = len(example)
    ran = [
        s
        for s in steps(model, example)
        if s.calls == 1 and s.floating and len(s.shape) >= 2 and s.shape[0] == batch
    ]
    heads = [s.name for s in ran if _kind(modules[s.name]) == "linear"]
    head = heads[-1] if heads else None
    blocks = _numbered(ran, modules) or _named(ran, modules) or _activations(ran, modules, head)
    if head is not None:
        # What contains the head, or is the head, is the answer and no feature of it.
        blocks = [name for name in blocks if name != head and not head.startswith(f"{name}.")]
    if head is not None and blocks and _passes_on(model, example, blocks[-1], head):
        blocks = blocks[:-1]
    room = most - 1 if head is not None else most
    if len(blocks) > room:
        picked = torch.linspace(0, len(blocks) - 1, room).round().long().tolist()
        blocks = [blocks[i] for i in dict.fromkeys(picked)]
    chosen = [*blocks, *([f"{head}:in"] if head is not None else [])]
    return tuple(chosen) or tuple(s.name for s in ran[-most:])


def _passes_on(model: nn.Module, example: Tensor, block: str, head: str) -> bool:
    """Whether what a block gives is, unchanged, what the head takes: one place, not two."""
    with frozen(model), torch.no_grad(), capture(model, [block, f"{head}:in"]) as acts:
        model(example)
    given, taken = acts[block], acts[f"{head}:in"]
    return given.shape == taken.shape and torch.equal(given, taken)


def _numbered(ran: list[Step], modules: dict[str, nn.Module]) -> list[str]:
    """The outermost composite modules that stand numbered beside others of their class."""
    kin: dict[tuple[str, type], list[str]] = {}
    for step in ran:
        parent, _, last = step.name.rpartition(".")
        composite = any(True for _ in modules[step.name].children())
        if last.isdigit() and composite and any(True for _ in modules[step.name].parameters()):
            kin.setdefault((parent, type(modules[step.name])), []).append(step.name)
    names = {name for group in kin.values() if len(group) >= 2 for name in group}
    outer = {n for n in names if not any(n.startswith(f"{other}.") for other in names)}
    # A network of stages that each hold one row of blocks: the blocks are the finer and better known places.
    return [step.name for step in ran if step.name in outer]


def _named(ran: list[Step], modules: dict[str, nn.Module]) -> list[str]:
    """Composite children of the network with weights: ``stem``, ``block1``, ``block2``."""
    names = [
        step.name
        for step in ran
        if "." not in step.name
        and any(True for _ in modules[step.name].children())
        and any(True for _ in modules[step.name].parameters())
    ]
    return names if len(names) >= 3 else []


_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardswish,
)  # fmt: skip


def _activations(ran: list[Step], modules: dict[str, nn.Module], head: str | None) -> list[str]:
    acted = [step.name for step in ran if isinstance(modules[step.name], _ACTIVATIONS)]
    layers = [
        step.name
        for step in ran
        if (_kind(modules[step.name]) or isinstance(modules[step.name], (nn.Conv1d, nn.Conv3d)))
        and step.name != head
    ]
    return acted if len(acted) >= max(1, len(layers) // 2) else layers
