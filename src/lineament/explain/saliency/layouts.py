"""From what passes at a site to a map over the image: convolutional, channels-last and patch-token layouts; the default site.

Convolutional sites hold (batch, channels, h, w). Vision transformers hold (batch, tokens, channels): prefix tokens (CLS, registers) come
first and are dropped, the rest are the patches in reading order. The number of prefix tokens is what remains beside the grid of the
patch embedding (halved for hierarchical transformers). ConvNeXt's inner layers and some Swin code hold (batch, h, w, channels).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.models import frozen, takes_hooks, unwrapped
from lineament.explain.inputs import of_signals

LAYOUTS = ("auto", "channels_first", "channels_last", "tokens")
_MOST_PREFIX = 16


def layout(
    x: Tensor,
    site: str,
    image_size: tuple[int, int],
    *,
    patch: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
    kind: str = "auto",
) -> Callable[[Tensor], Tensor]:
    """How to bring what passes at a site into (batch, channels, height, width).

    Args:
        x: what passes at the site.
        site: its name, for messages.
        image_size: (height, width) of the images, which an unnamed layout must fit.
        patch: (height, width) of the patches of the embedding, in pixels, where the model has one.
        grid: (rows, columns) of the patch tokens; by default found from ``patch`` or from the image's aspect ratio.
        kind: ``"auto"``, ``"channels_first"``, ``"channels_last"`` or ``"tokens"``.

    Raises:
        InputError: fewer than three or more than four dimensions, or tokens that are no grid.

    >>> layout(torch.zeros(2, 17, 8), "blocks.3", (32, 32), patch=(8, 8))(torch.zeros(2, 17, 8)).shape
    torch.Size([2, 8, 4, 4])
    """
    checks.one_of("layout", kind, LAYOUTS)
    heads = site.split("[")[0].endswith((":q", ":k", ":v", ":z"))
    if heads and x.ndim == 4:
        rows, columns = _token_grid(x.flatten(2), site, image_size, patch, grid)
        return lambda t: _tokens_to_map(t.flatten(2), rows, columns)
    if of_signals.get() and x.ndim in (2, 3):
        width = image_size[1]
        if x.ndim == 2:
            checks.require(
                x.shape[1] == width,
                f"site {site!r}: got {checks.show(x)}, which has no position of its own for each of {width} features; choose ':in'",
            )
            return lambda t: t[:, None, None]
        # Steps come last, as convolutions have them, but where only the other dimension can be steps.
        tokens = kind == "tokens" or (kind == "auto" and x.shape[1] == width != x.shape[2])
        return (lambda t: t.transpose(1, 2)[:, :, None]) if tokens else (lambda t: t[:, :, None])
    if x.ndim == 3 and kind in ("auto", "tokens"):
        rows, columns = _token_grid(x, site, image_size, patch, grid)
        return lambda t: _tokens_to_map(t, rows, columns)
    checks.require(
        x.ndim == 4 and kind != "tokens",
        f"site {site!r}: got {checks.show(x)}, expected a map (batch, channels, height, width) or tokens (batch, tokens, channels); "
        "choose a site before the network pools over space",
    )
    last = kind == "channels_last"
    if kind == "auto":
        last = not _fits(x.shape[2], x.shape[3], image_size) and _fits(x.shape[1], x.shape[2], image_size)
    return (lambda t: t.permute(0, 3, 1, 2)) if last else (lambda t: t)


def patch_of(model: nn.Module, channels: int) -> tuple[int, int] | None:
    """The patch size of the first convolution that cuts the image into patches, or ``None`` where there is none.

    >>> patch_of(nn.Sequential(nn.Conv2d(3, 8, 4, stride=4)), 3)
    (4, 4)
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == channels:
            size, stride = tuple(module.kernel_size), tuple(module.stride)
            if size == stride and min(size) > 1:
                return size[0], size[1]
    return None


def default_site(model: nn.Module, images: Tensor) -> str:
    """The last place with a spatial extent from which the score is made: the output of the last convolutional block.

    The rule: of all modules that ran after the last convolution (with more than one output position) and whose only output has
    its height and width, the last to finish. So VGG gives the ReLU before its last pooling, a ResNet its last stage. A vision
    transformer has tokens after its last convolution: there it is the input of the last block, because behind that
    block a CLS read-out no longer depends on the patches.

    Raises:
        InputError: a model without such a place; pass ``site=``.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
    >>> default_site(net, torch.zeros(1, 1, 8, 8))
    '1'
    """
    body = unwrapped(model)
    finished: list[tuple[str, nn.Module, tuple[int, ...]]] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def after(module: nn.Module, _: Any, output: Any) -> None:
            # Of several tensors, the score may be made from another than the first.
            tensors = list(_tensors(output))
            if len(tensors) == 1:
                finished.append((name, module, tuple(tensors[0].shape)))

        return after

    with ExitStack() as stack:
        stack.enter_context(frozen(model, requires_grad=None))
        stack.enter_context(torch.no_grad())
        for name, module in body.named_modules():
            if name and takes_hooks(module):
                stack.callback(module.register_forward_hook(watch(name)).remove)
        try:
            body(images[:1])
        except RuntimeError:
            # Exported for batches of one size only.
            finished.clear()
            body(images)
    lists = {
        name for name, module in body.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential))
    }
    if of_signals.get():
        # Of rows, and of signals that no convolution reads, the input itself.
        found = [
            (name, shape)
            for name, m, shape in finished
            if isinstance(m, nn.Conv1d) and len(shape) == 3 and shape[2] > 1
        ]
        if not found:
            return ":in"
        order = [name for name, _, _ in finished]
        behind = finished[order.index(found[-1][0]) :]
        return [name for name, _, shape in behind if len(shape) == 3 and shape[2:] == found[-1][1][2:]][-1]
    convolutions = [
        i
        for i, (_, module, shape) in enumerate(finished)
        if isinstance(module, nn.Conv2d) and len(shape) == 4 and shape[2] * shape[3] > 1
    ]
    last = convolutions[-1] if convolutions else -1
    blocks = [
        name
        for name, _, shape in finished[last + 1 :]
        if len(shape) == 3
        and shape[1] > 1
        and name.rpartition(".")[0] in lists
        and name.rpartition(".")[2].isdigit()
    ]
    if blocks:
        # The outermost of nested blocks: the fewest dots among those that finish last.
        depth = min(name.count(".") for name in blocks)
        return [name for name in blocks if name.count(".") == depth][-1] + ":in"
    checks.require(
        bool(convolutions),
        f"site: {type(body).__name__} has no convolution and no list of blocks; pass site=",
    )
    size = finished[last][2][-2:]
    names = [name for name, _, shape in finished[last:] if len(shape) == 4 and shape[-2:] == size]
    return names[-1]


def convolution_at(model: nn.Module, site: str) -> nn.Conv2d:
    """The convolution at a site whose real kernel is asked for; anything else raises.

    >>> convolution_at(nn.Sequential(nn.Conv2d(1, 2, 3)), "0").kernel_size
    (3, 3)
    """
    modules = dict(unwrapped(model).named_modules())
    module = modules.get(site.removesuffix(":out"))
    if not isinstance(module, nn.Conv2d):
        convolutions = [name for name, m in modules.items() if isinstance(m, nn.Conv2d)]
        raise checks.InputError(
            f"site {site!r} is {'no module output' if module is None else type(module).__name__}; the real convolution's map needs an nn.Conv2d"
            + checks.suggest(site, convolutions)
        )
    return module


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from _tensors(member)
    elif isinstance(value, (tuple, list)):
        for member in value:
            yield from _tensors(member)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(vars(value))


def _tokens_to_map(tokens: Tensor, rows: int, columns: int) -> Tensor:
    patches = tokens[:, tokens.shape[1] - rows * columns :]
    return patches.transpose(1, 2).reshape(len(tokens), tokens.shape[2], rows, columns)


def _fits(rows: int, columns: int, image_size: tuple[int, int]) -> bool:
    """Whether a grid has the image's aspect ratio, to one cell of rounding."""
    height, width = image_size
    return abs(rows * width - columns * height) <= max(height, width)


def _token_grid(
    x: Tensor,
    site: str,
    image_size: tuple[int, int],
    patch: tuple[int, int] | None,
    grid: tuple[int, int] | None,
) -> tuple[int, int]:
    tokens = x.shape[1]
    if grid is not None:
        fits = len(grid) == 2 and min(grid) >= 1 and grid[0] * grid[1] <= tokens
        checks.require(
            fits, f"grid: got {grid}, expected (rows, columns) of at most the {tokens} tokens at {site!r}"
        )
        return int(grid[0]), int(grid[1])
    candidates: list[tuple[int, int]] = []
    if patch is not None:
        rows, columns = image_size[0] // patch[0], image_size[1] // patch[1]
        # A hierarchical transformer merges 2 x 2 patches from stage to stage.
        candidates = [(-(-rows // 2**k), -(-columns // 2**k)) for k in range(6)]
    if not any(0 <= tokens - r * c <= _MOST_PREFIX for r, c in candidates):
        candidates = [
            (r, tokens_left // r) for tokens_left in range(tokens, 0, -1) for r in _divisors(tokens_left)
        ]
        candidates = [g for g in candidates if _proportional(*g, image_size)]
    candidates = [g for g in candidates if 0 <= tokens - g[0] * g[1] <= _MOST_PREFIX]
    checks.require(
        bool(candidates),
        f"site {site!r}: {tokens} tokens are no grid of the shape of a {image_size[0]} x {image_size[1]} image; "
        "pass grid=(rows, columns)",
    )
    return max(candidates, key=lambda g: g[0] * g[1])


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0] if n <= 65536 else []


def _proportional(rows: int, columns: int, image_size: tuple[int, int]) -> bool:
    return rows * image_size[1] == columns * image_size[0]
