"""Generators that others trained, as priors: StyleGAN2 in the layouts of NVIDIA's ADA code and of rosinality's, and BigGAN-deep, from safetensors or files of tensors.

Which layout a file has is told by its names, and sizes by its shapes. NVIDIA publishes pickles of whole modules, which run code when they are opened; they are refused with the
lines that export the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import InputError, require
from lineament.load.checkpoints import read_checkpoint, tensors_by_path
from lineament.privacy.biggan import BigGANPrior
from lineament.privacy.priors import Block, Prior
from lineament.privacy.stylegan2 import StyleGAN2, StylePrior

_NESTED = ("g_ema.", "G_ema.", "generator.", "module.")


def load_prior(path: str | Path, shape: Sequence[int], bounds: tuple[Tensor, Tensor]) -> Prior:
    """A trained generator as a prior of pictures of one shape.

    Args:
        path: safetensors, or what ``torch.load(weights_only=True)`` reads, with the weights of a StyleGAN2 (the averaged ones, ``g_ema``, where there are several), or
            of a BigGAN-deep as Hugging Face converted it, whose classes are then those of the audited model.
        shape: (channels, height, width) of the pictures that are looked for; larger ones are averaged down to it, and colours to grey where it has one channel.
        bounds: least and greatest values of normalised pictures by channel, for a generator's -1 and 1.

    Raises:
        InputError: a pickle of modules, names of no known layout, a generator of smaller pictures.

    >>> import tempfile; from safetensors.torch import save_file
    >>> small = StyleGAN2(8, 3, code=4, widths=(8, 8)); path = f"{tempfile.mkdtemp()}/g.safetensors"
    >>> save_file(ada_names(small), path)
    >>> type(load_prior(path, (1, 8, 8), (torch.zeros(1), torch.ones(1)))).__name__
    'StylePrior'
    """
    path = Path(path)
    try:
        held = dict(tensors_by_path(read_checkpoint(path, "prior")))
    except InputError as error:
        if path.suffix == ".pkl":
            raise InputError(
                f"prior: {str(path)!r} is a pickle of whole modules, which can run code and is not read; where you trust it, export its weights in the folder of NVIDIA's code:\n"
                f"    import pickle, torch\n    g = pickle.load(open({str(path)!r}, 'rb'))['G_ema']\n    torch.save(g.state_dict(), {path.stem + '.pt'!r})"
            ) from None
        raise error
    if "generator.gen_z.weight_orig" in held:
        return _large_enough(BigGANPrior(held, rendered(shape, bounds)), shape)
    own = _averaged(held)
    if "mapping.fc0.weight" in own:
        generator = _filled(own, _ada(own), path)
    elif "style.1.weight" in own:
        generator = _filled(own, _rosinality(own), path)
    else:
        raise InputError(
            f"prior: {str(path)!r} holds {len(held)} tensors ({', '.join(list(held)[:3])}, ...), expected a StyleGAN2 as NVIDIA's ADA code (mapping.fc0.weight) or rosinality's (style.1.weight) names it, or a BigGAN-deep (generator.gen_z.weight_orig)"
        )
    require(
        generator.colours in (1, 3),
        f"prior: it makes pictures in {generator.colours} colours, expected 1 or 3",
    )
    return _large_enough(StylePrior(generator, rendered(shape, bounds)), shape)


def _large_enough(prior: Any, shape: Sequence[int]) -> Prior:
    side = prior.side
    require(
        side >= max(shape[1:]),
        f"prior: it makes pictures of side {side}, expected at least {max(shape[1:])}",
    )
    return prior


def rendered(shape: Sequence[int], bounds: tuple[Tensor, Tensor]) -> Block:
    """Pictures around [-1, 1] as normalised ones of a shape: means over areas, grey from colours and colours from grey; not clipped, so that slopes stay.

    >>> rendered((1, 2, 2), (torch.zeros(1), torch.ones(1)))(torch.ones(1, 3, 4, 4)).flatten().tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    low, high = (b.view(1, -1, 1, 1) for b in bounds)

    def render(made: Tensor) -> Tensor:
        if made.shape[2:] != tuple(shape[1:]):
            made = F.interpolate(made, size=tuple(shape[1:]), mode="area")
        if made.shape[1] != shape[0]:
            grey = made if made.shape[1] == 1 else torch.einsum("nchw,c->nhw", made, made.new_tensor([0.299, 0.587, 0.114]))[:, None]  # fmt: skip
            made = grey.expand(-1, shape[0], -1, -1)
        return low.to(made) + (high - low).to(made) * (made + 1) / 2

    return render


def ada_names(generator: StyleGAN2) -> dict[str, Tensor]:
    """A generator's weights by the names of NVIDIA's ADA code.

    >>> list(ada_names(StyleGAN2(8, 3, code=4, widths=(8, 8))))[0]
    'mapping.fc0.weight'
    """
    own = generator.state_dict()
    names = _ada_pairs(len(generator.mapping), len(generator.rgbs))
    return {theirs: own[name].clone() for name, theirs in names.items()}


def _averaged(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The generator's own names: without what it is nested in; of several copies the running average."""
    for prefix in _NESTED:
        inside = {name.removeprefix(prefix): v for name, v in held.items() if name.startswith(prefix)}
        if inside:
            return _averaged(inside)
    return dict(held)


def _ada_pairs(depth: int, blocks: int) -> dict[str, str]:
    """Our names and those of NVIDIA's code."""
    found = {f"mapping.{k}.{part}": f"mapping.fc{k}.{part}" for k in range(depth) for part in ("weight", "bias")}  # fmt: skip
    found["const"] = "synthesis.b4.const"
    for k in range(blocks):
        block = f"synthesis.b{4 * 2**k}"
        layers = {f"rgbs.{k}": f"{block}.torgb"}
        layers |= {"convs.0": f"{block}.conv1"} if k == 0 else {f"convs.{2 * k - 1}": f"{block}.conv0", f"convs.{2 * k}": f"{block}.conv1"}  # fmt: skip
        for ours, theirs in layers.items():
            found |= {f"{ours}.{part}": f"{theirs}.{part}" for part in ("weight", "bias", "affine.weight", "affine.bias")}  # fmt: skip
            if ours.startswith("convs"):
                found[f"{ours}.strength"] = f"{theirs}.noise_strength"
    return found


def _rosinality_pairs(depth: int, blocks: int) -> dict[str, str]:
    """Our names and those of rosinality's code."""
    found = {f"mapping.{k}.{part}": f"style.{k + 1}.{part}" for k in range(depth) for part in ("weight", "bias")}  # fmt: skip
    found["const"] = "input.input"
    convs = ["conv1", *(f"convs.{k}" for k in range(2 * (blocks - 1)))]
    for k, theirs in enumerate(convs):
        found |= {f"convs.{k}.weight": f"{theirs}.conv.weight", f"convs.{k}.bias": f"{theirs}.activate.bias", f"convs.{k}.strength": f"{theirs}.noise.weight"}  # fmt: skip
        found |= {f"convs.{k}.affine.{part}": f"{theirs}.conv.modulation.{part}" for part in ("weight", "bias")}  # fmt: skip
    for k, theirs in enumerate(["to_rgb1", *(f"to_rgbs.{k}" for k in range(blocks - 1))]):
        found |= {f"rgbs.{k}.weight": f"{theirs}.conv.weight", f"rgbs.{k}.bias": f"{theirs}.bias"}
        found |= {f"rgbs.{k}.affine.{part}": f"{theirs}.conv.modulation.{part}" for part in ("weight", "bias")}  # fmt: skip
    return found


def _ada(own: Mapping[str, Tensor]) -> dict[str, str]:
    if "mapping.embed.weight" in own:
        raise InputError(
            "prior: it is a StyleGAN2 that is told a class (mapping.embed), expected one without classes"
        )
    depth = sum(name.startswith("mapping.fc") and name.endswith(".weight") for name in own)
    blocks = sum(name.endswith(".torgb.bias") for name in own)
    return _ada_pairs(depth, blocks)


def _rosinality(own: Mapping[str, Tensor]) -> dict[str, str]:
    depth = sum(name.startswith("style.") and name.endswith(".weight") for name in own)
    blocks = 1 + sum(name.startswith("to_rgbs.") and name.endswith("conv.weight") for name in own)
    return _rosinality_pairs(depth, blocks)


def _filled(own: Mapping[str, Tensor], pairs: Mapping[str, str], path: Path) -> StyleGAN2:
    """A generator of the sizes that the tensors have, with their values."""
    missing = [theirs for theirs in pairs.values() if theirs not in own]
    require(
        not missing and any(name.startswith("rgbs.1.") for name in pairs),
        f"prior: {str(path)!r} lacks {', '.join(missing[:3]) or 'a second resolution'}, expected a whole StyleGAN2 with colours at every resolution",
    )
    first = own[pairs["mapping.0.weight"]]
    require(
        first.shape[0] == first.shape[1],
        f"prior: its codes have {first.shape[1]} entries and its styles {first.shape[0]}, expected as many",
    )
    blocks = sum(name.startswith("rgbs.") and name.endswith(".affine.bias") for name in pairs)
    widths = [own[pairs[f"rgbs.{k}.weight"]].shape[-3] for k in range(blocks)]
    depth = sum(name.startswith("mapping.") and name.endswith(".weight") for name in pairs)
    colours = own[pairs["rgbs.0.bias"]].numel()
    made = StyleGAN2(4 * 2 ** (blocks - 1), colours, code=len(first), widths=widths, depth=depth)
    state = made.state_dict()
    odd = [name for name, v in state.items() if own[pairs[name]].numel() != v.numel()]
    require(
        not odd,
        f"prior: in {str(path)!r}, {pairs[odd[0]] if odd else ''} has an unexpected size; expected a StyleGAN2 with kernels of 3 x 3",
    )
    # Some layouts have further axes of length 1.
    made.load_state_dict({name: own[pairs[name]].float().reshape(v.shape) for name, v in state.items()})
    return made
