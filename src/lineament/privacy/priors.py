"""What an attacker knows of the world: a generator of pictures, in blocks whose features can be searched.

Fang et al. 2023, arXiv 2308.04699, sections 1.1 and 6. A prior is trained on public pictures, or brought along; one without a generator searches the pixels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lineament.core.checks import number, one_of, require, show
from lineament.train.loop import fit

Block = Callable[[Tensor], Tensor]


class Prior(Protocol):
    """What the search asks of a generator."""

    code: int

    def blocks(self, code: Tensor, targets: Tensor | None) -> Sequence[Block]:
        """For codes [n, d] and labels [n], the functions whose composition makes pictures."""
        ...

    @property
    def render(self) -> Block:
        """What the last block made, as normalised pictures."""
        ...


class Decoder:
    """A prior from an ``nn.Sequential`` whose children are the blocks, the first of which takes the code.

    >>> prior = Decoder(nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (1, 2, 2))), 2)
    >>> len(prior.blocks(torch.zeros(3, 2), None))
    2
    """

    def __init__(self, generator: nn.Sequential, code: int, render: Block = lambda x: x):
        require(
            isinstance(generator, nn.Sequential) and len(generator) > 1,
            f"generator: got {show(generator)}, expected an nn.Sequential of two or more blocks, between which features are searched",
        )
        number("code", code, low=1, integer=True)
        self.generator, self.code, self.render = generator.eval().requires_grad_(False), code, render

    def blocks(self, code: Tensor, targets: Tensor | None) -> Sequence[Block]:
        return [self.generator[k] for k in range(len(self.generator))]


class Mapped:
    """A generator of other classes than those of the audited model: which one a picture is of is found by a first, coarse search (label mapping).

    Its pictures, made of classes drawn at random, are named by a classifier, and the search begins anew with those classes (the later revision of Fang et al. 2023).

    Args:
        prior: a generator that is told a class. classifier: pictures [n, channels, height, width] in [0, 1] to logits of the generator's classes.
        steps: gradients of each layer of the first search.

    >>> plain = Decoder(nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (1, 2, 2))), 2)
    >>> Mapped(plain, lambda x: x.flatten(1)).named(torch.tensor([[[[0.1, 0.9], [0.2, 0.3]]]])).tolist()
    [1]
    """

    def __init__(self, prior: Prior, classifier: Block, *, steps: int = 100):
        number("steps", steps, low=1, integer=True)
        self.prior, self.classifier, self.steps = prior, classifier, steps
        self.code, self.render = prior.code, prior.render

    @cached_property
    def classes(self) -> int:
        """How many classes the classifier tells apart."""
        value = torch.zeros(1, self.code)
        with torch.no_grad():
            for block in self.prior.blocks(value, torch.zeros(1, dtype=torch.long)):
                value = block(value)
            return self.logits(self.render(value)).shape[1]

    def drawn(self, *sizes: int, seed: int = 0) -> Tensor:
        """Classes of the generator at random."""
        return torch.randint(self.classes, sizes, generator=torch.Generator().manual_seed(seed))

    def blocks(self, code: Tensor, targets: Tensor | None) -> Sequence[Block]:
        """The generator's, of classes drawn at random: labels of the audited model say nothing of them."""
        return self.prior.blocks(code, self.drawn(len(code)).to(code.device))

    @torch.no_grad()
    def logits(self, pictures: Tensor) -> Tensor:
        """What the classifier says [n, the generator's classes]."""
        found: Any = self.classifier(pictures)
        found = getattr(found, "logits", found)
        require(
            isinstance(found, Tensor) and found.ndim == 2 and len(found) == len(pictures),
            f"classifier: gave {show(found)} for {len(pictures)} pictures, expected logits [{len(pictures)}, classes]",
        )
        return found

    def named(self, pictures: Tensor) -> Tensor:
        """The class of each picture [n]."""
        return self.logits(pictures).argmax(1)


class Pixels:
    """No prior: the code is the picture itself.

    ``classes``: where labels are unknown and searched with the picture, logits of so many stand behind its pixels in each code.
    """

    def __init__(self, shape: Sequence[int], classes: int = 0):
        self.shape, self.classes = tuple(shape), classes
        self.code = math.prod(shape) + classes
        self._latest: Tensor | None = None

    def blocks(self, code: Tensor, targets: Tensor | None) -> Sequence[Block]:
        def picture(value: Tensor) -> Tensor:
            pixels, logits = value.split([self.code - self.classes, self.classes], 1)
            self._latest = logits.softmax(-1) if self.classes else None
            return pixels.reshape(len(value), *self.shape)

        return [picture]

    def soft_labels(self) -> Tensor | None:
        """Class probabilities [n, classes] beside the pictures that were made last; None where labels are known."""
        return self._latest

    @property
    def render(self) -> Block:
        return lambda made: made


def train_prior(
    images: Tensor,
    *,
    kind: Literal["vae", "dcgan", "stylegan2"] = "vae",
    code: int = 16,
    width: int = 64,
    steps: int = 1500,
    batch_size: int = 64,
    seed: int = 0,
) -> Prior:
    """A generator of pictures like these: the decoder of a variational autoencoder, a DCGAN, or a small StyleGAN2.

    Args:
        images: public pictures [n, channels, side, side], normalised as the audited model takes them; the side is a multiple of 4,
            for StyleGAN2 times a power of 2.
        code: entries of a code. width: channels of the smallest map; each block halves them while it doubles the side.

    >>> prior = train_prior(torch.rand(8, 1, 8, 8), steps=1, width=8)
    >>> prior.blocks(torch.zeros(2, 16), None)[0](torch.zeros(2, 16)).shape
    torch.Size([2, 8, 4, 4])
    """
    one_of("kind", kind, ("vae", "dcgan", "stylegan2"))
    for name, value in (("code", code), ("width", width), ("steps", steps), ("batch_size", batch_size)):
        number(name, value, low=1, integer=True)
    require(
        images.ndim == 4
        and len(images) > 0
        and images.shape[2] == images.shape[3]
        and images.shape[2] % 4 == 0,
        f"images: got {show(images)}, expected [n, channels, side, side] with a side that 4 divides",
    )
    low, high = images.amin((0, 2, 3), keepdim=True), images.amax((0, 2, 3), keepdim=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _Generated(images.shape[1:], code, width, kind)
    fit(
        model.to(images.device),
        (2 * (images - low) / (high - low).clamp(min=1e-6) - 1, torch.zeros(len(images))),
        optimizer=lambda net: torch.optim.Adam(net.parameters(), lr=1e-3 if kind == "vae" else 4e-4, betas=(0.9 if kind == "vae" else 0.5, 0.999)),
        epochs=-(-steps * batch_size // len(images)),
        batch_size=batch_size,
        loss=lambda found, _: found.mean(),
        seed=seed,
    )  # fmt: skip
    if kind == "stylegan2":
        from lineament.privacy.stylegan2 import StylePrior

        return StylePrior(model.generator, lambda made: low + (high - low) * (made.tanh() + 1) / 2)
    return Decoder(model.generator, code, lambda made: low + (high - low) * (made.tanh() + 1) / 2)


class _Generated(nn.Module):
    """A generator beside what trains it, an encoder or an adversary; an input's loss is the output, so that the plain training loop trains both."""

    generator: Any

    def __init__(self, shape: Sequence[int], code: int, width: int, kind: str):
        super().__init__()
        channels, side = shape[0], shape[1]
        self.code, self.adversary, self.slope = code, kind != "vae", 1.0 if kind == "stylegan2" else 0.0
        doublings = 0
        while side % 2 == 0 and side > 4:
            side, doublings = side // 2, doublings + 1
        widths = [max(8, width >> k) for k in range(doublings + 1)]
        blocks: list[nn.Module] = [
            nn.Sequential(
                nn.Linear(code, width * side**2), nn.Unflatten(1, (width, side, side)), nn.LeakyReLU(0.2)
            )
        ]
        for before, after in itertools.pairwise(widths):
            blocks.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, padding=1), nn.LeakyReLU(0.2)))  # fmt: skip
        if kind == "stylegan2":
            from lineament.privacy.stylegan2 import StyleGAN2

            require(
                side == 4 and doublings > 0,
                f"images: got sides of {shape[1]}, expected 8, 16, 32, ... for a StyleGAN2",
            )
            self.generator = StyleGAN2(shape[1], channels, code=code, widths=widths)
        else:
            self.generator = nn.Sequential(*blocks, nn.Conv2d(widths[-1], channels, 3, padding=1))
        reading: list[nn.Module] = []
        inputs = channels
        for after in reversed(widths[:doublings]):
            reading += [nn.Conv2d(inputs, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            inputs = after
        self.reader = nn.Sequential(*reading, nn.Flatten(), nn.Linear(inputs * side**2, 1 if self.adversary else 2 * code))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if not self.adversary:
            mean, spread = self.reader(x).chunk(2, 1)
            made = self.generator(mean + spread.clamp(-8, 8).mul(0.5).exp() * torch.randn_like(mean)).tanh()
            apart = 0.5 * (mean.square() + spread.exp() - 1 - spread).sum(1)
            # The weight of a picture whose pixels have a deviation of 0.2 in [-1, 1].
            return ((made - x).square().flatten(1).sum(1) / (2 * 0.2**2) + apart)[:, None]
        made = self.generator(torch.randn(len(x), self.code, device=x.device, dtype=x.dtype)).tanh()
        judge = {name: value.detach() for name, value in self.reader.named_parameters()}
        fooled = functional_call(self.reader, judge, (made,))  # only the generator learns from this
        x = x.detach().requires_grad_(bool(self.slope) and torch.is_grad_enabled())
        real = self.reader(x)
        loss = F.softplus(-fooled) + F.softplus(-real) + F.softplus(self.reader(made.detach()))
        if x.requires_grad:  # the judge stays flat where pictures are real (Mescheder et al. 2018)
            (steep,) = torch.autograd.grad(real.sum(), x, create_graph=True)
            loss = loss + 0.5 * self.slope * steep.square().flatten(1).sum(1, keepdim=True)
        return loss
