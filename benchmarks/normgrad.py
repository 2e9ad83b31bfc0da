"""Saliency against one bare forward and backward, the materialised outer products of the reference, and Captum.

The network is a ResNet-50 (transformers' configuration, random weights) on two images of 224 x 224 pixels. The bare forward and
backward is the least that any gradient method needs: parameters ask for nothing, and the backward ends at the site.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lineament.bench import Row, compare, quick, resident_mib
from lineament.core.models import frozen
from lineament.explain.saliency.aggregation import Window, aggregate_contributions
from lineament.explain.saliency.baselines import integrated_gradients
from lineament.explain.saliency.maps import saliency

SLUG = "normgrad"
STAGES = [f"resnet.encoder.stages.{k}" for k in range(4)]
STEPS = 16


def network() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    return ResNetForImageClassification(ResNetConfig(num_labels=1000)).eval()


class Logits(nn.Module):
    """Captum wants a tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def bare(model: nn.Module, x: Tensor, site: str) -> Callable[[], Any]:
    """One forward and one backward that ends at the site; no map is made."""
    module = model.get_submodule(site)

    def run() -> Any:
        kept: list[Tensor] = []
        handle = module.register_forward_hook(lambda *call: kept.append(call[2].requires_grad_()))
        try:
            with frozen(model):
                return torch.autograd.grad(model(x).logits[:, 1].sum(), kept)
        finally:
            handle.remove()

    return run


def materialised(x: Tensor, g: Tensor, size: int) -> Tensor:
    """The norm of each location's outer product, with the outer product formed, as the reference code does."""
    patches = nn.functional.unfold(x, size, padding=size // 2)
    outer = patches[:, :, None] * g.flatten(2)[:, None]
    return outer.flatten(1, 2).norm(dim=1).reshape(len(x), 1, *x.shape[-2:])


def peak_mib(side: str) -> float:
    """What integrated gradients add to this process's peak memory, in MiB. A peak never falls: one process, one side."""
    model, x = network(), torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        model(x)
    before = resident_mib()
    if side == "ours":
        integrated_gradients(model, x, 1, steps=STEPS)
    else:
        from captum.attr import IntegratedGradients

        IntegratedGradients(Logits(model)).attribute(x, target=1, n_steps=STEPS)
    return resident_mib() - before


def peak(side: str) -> str:
    command = [sys.executable, "-W", "ignore", __file__, "--peak", side]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{float(done.stdout):.0f} MiB" if done.returncode == 0 else "more than there was"


def rows(repeats: int = 7) -> Iterator[Row]:
    warnings.filterwarnings("ignore", module="captum")
    side = 64 if quick() else 224
    model, x = network(), torch.rand(2, 3, side, side)
    site = STAGES[1]
    yield compare(
        SLUG,
        "NormGrad at one site, ResNet-50, 2 images",
        lambda: saliency(model, x, 1, site=site),
        "bare forward and backward",
        bare(model, x, site),
        target=1 / 1.15,
        repeats=repeats,
        note="the limit is 1: the rest is two copies of the activation, two norms over its channels, and resizing",
    )
    generator = torch.Generator().manual_seed(0)
    for size in (1, 3):
        # 512 channels at 14 x 14 are VGG16's last; the 3 x 3 form has nine times the entries, so one image and a quarter of the channels.
        shape = (2, 512, 14, 14) if size == 1 else (1, 128, 14, 14)
        a, g = (torch.randn(shape, generator=generator) for _ in range(2))
        yield compare(
            SLUG,
            f"NormGrad {size}x{size} map from activation and gradient, {shape[1]} x 14 x 14",
            lambda a=a, g=g, size=size: aggregate_contributions(
                a, g, "conv", "norm", window=Window.square(size)
            ),
            "materialised outer products",
            lambda a=a, g=g, size=size: materialised(a, g, size),
            target=3.0,
            repeats=repeats,
            note="the closed form reads activation and gradient a few times; the limit is reading each once",
        )
    try:
        from captum.attr import IntegratedGradients, LayerGradCam, LayerGradientXActivation
    except ImportError:
        for what in ("Grad-CAM", "integrated gradients", "4 layers"):
            yield compare(SLUG, what, lambda: None, "captum", None, repeats=1)
        return
    wrapped = Logits(model)
    modules = [model.get_submodule(name) for name in STAGES]
    cam = LayerGradCam(wrapped, modules[3])
    yield compare(
        SLUG,
        "Grad-CAM at the last stage, ResNet-50, 2 images",
        lambda: saliency(model, x, 1, site=STAGES[3], method="grad_cam"),
        "captum LayerGradCam",
        lambda: cam.attribute(x, target=1, relu_attributions=True),
        target=1.0,
        repeats=repeats,
        note="both are one forward and a short backward; ours keeps no graph before the site",
    )
    one = x[:1]
    path = IntegratedGradients(wrapped)
    yield compare(
        SLUG,
        f"integrated gradients, {STEPS} steps, ResNet-50, 1 image",
        lambda: integrated_gradients(model, one, 1, steps=STEPS),
        "captum IntegratedGradients",
        lambda: path.attribute(one, target=1, n_steps=STEPS),
        target=1.0,
        repeats=min(repeats, 3),
        note=f"peak memory above the model's own forward: {peak('ours')} against {peak('captum')}",
    )
    methods = ["grad_cam", "linear_approx", "norm_grad", "norm_grad_selective"]
    peers = [LayerGradCam(wrapped, m) for m in modules]
    peers += [LayerGradientXActivation(wrapped, m) for m in modules]
    yield compare(
        SLUG,
        "4 layers x 4 methods, ResNet-50, 2 images",
        lambda: saliency(model, x, 1, site=STAGES, method=methods),
        "captum, 4 layers x the 2 methods it has",
        lambda: [peer.attribute(x, target=1) for peer in peers],
        target=3.0,
        repeats=min(repeats, 3),
        note="one forward and backward for sixteen maps, against one of each for every map",
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print(peak_mib(sys.argv[2]))
    else:
        for row in rows(3):
            print(row)
