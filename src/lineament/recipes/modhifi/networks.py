"""The networks that the modhifi recipe trains, and the unlabelled images that their layers are scored on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.data.augmentation import flip_and_crop
from lineament.data.formats import folder_of, read_npz
from lineament.data.samples import Samples
from lineament.data.shape_texture_colour import shape_texture_colour
from lineament.recipes.kit.networks import network
from lineament.recipes.kit.threads import few_threads
from lineament.train.callbacks import Augment, Cosine
from lineament.train.loop import fit

SOURCES = ("generated", "real", "foreign", "noise")
_COMPONENTS = 12
_BANGLA = "bangla-digits/cmaterdb_3_1_1.npz"


def trained(config: Any, samples: Samples, name: str, seed: int, model: nn.Module | None = None) -> nn.Module:
    """A network after its training with weight decay, in eval mode; ``model`` gives another one to train."""
    shape, classes = tuple(samples.inputs.shape[1:]), int(samples.targets.max()) + 1
    net = model or network(name, shape, classes, seed=seed, widths=config.width)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    augment = [Augment(flip_and_crop)] if config.data == "cifar10" else []
    with few_threads(samples.inputs, device):
        fit(
            net.to(device), samples, epochs=config.epochs, batch_size=config.batch_size, seed=seed, callbacks=[*augment, Cosine()],
            optimizer=lambda net: torch.optim.SGD(net.parameters(), config.lr, momentum=0.9, weight_decay=5e-4),
        )  # fmt: skip
    return net.eval()


def anew(config: Any, samples: Samples, pruned: nn.Module, seed: int) -> nn.Module:
    """A network of the pruned sizes, drawn anew and trained as the whole one was."""
    fresh = copy.deepcopy(pruned)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in fresh.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    return trained(config, samples, "", seed, fresh)


def images(config: Any, samples: Samples, source: str, seed: int) -> Tensor:
    """Images to score layers on.

    ``"generated"``: of each class a Gaussian in twelve principal components, clipped; ``"real"``: of the training set; ``"foreign"``: of another one,
    Bangla digits where they are and drawn shapes else; ``"noise"``: uniform.
    """
    generator = torch.Generator().manual_seed(seed)
    x, count = samples.inputs.float(), config.calibration
    if source == "real":
        return x[torch.randperm(len(x), generator=generator)[:count]]
    if source == "noise":
        return torch.rand((count, *x.shape[1:]), generator=generator)
    if source == "foreign":
        return _foreign(config, x.shape, seed)
    classes = samples.targets.unique().tolist()
    drawn = [_gaussian(x[samples.targets == c], -(-count // len(classes)), generator) for c in classes]
    found = torch.cat(drawn)
    return found[torch.randperm(len(found), generator=generator)[:count]]


def of_class(samples: Samples, label: int, count: int, seed: int) -> Tensor:
    """Generated images of one class."""
    return _gaussian(
        samples.inputs.float()[samples.targets == label], count, torch.Generator().manual_seed(seed)
    )


def _gaussian(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    flat = x[:2000].flatten(1)
    mean = flat.mean(0)
    parts = min(_COMPONENTS, len(flat) - 1)
    _, spread, axes = torch.linalg.svd(flat - mean, full_matrices=False)
    codes = torch.randn(count, parts, generator=generator) * (spread[:parts] / (len(flat) - 1) ** 0.5)
    return (mean + codes @ axes[:parts]).clamp(0, 1).view(count, *x.shape[1:])


def _foreign(config: Any, shape: torch.Size, seed: int) -> Tensor:
    folder = folder_of(config.data_folder)
    if folder is not None and (folder / _BANGLA).is_file():
        stored = torch.from_numpy(read_npz(folder / _BANGLA, ("train_images",))["train_images"])
        some = torch.randperm(len(stored), generator=torch.Generator().manual_seed(seed))[
            : config.calibration
        ]
        drawn = stored[some].float() / 255
        drawn = drawn[:, None] if drawn.ndim == 3 else drawn.movedim(3, 1)
    else:
        drawn = shape_texture_colour(config.calibration, seed=seed).inputs.float()
    drawn = drawn.mean(1, keepdim=True).expand(-1, shape[1], -1, -1)
    return F.interpolate(drawn, shape[2:], mode="area")
