"""Where does a network that answers for every pixel look for a class in a region? Its logits averaged over the region are the score that a map explains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lineament.core.checks import require, show
from lineament.core.models import logits


@contextmanager
def over_region(model: nn.Module, region: Tensor) -> Iterator[nn.Module]:
    """Let a network of logits (batch, classes, height, width) answer with their mean over a region while the block runs, (batch, classes).

    Saliency maps, their scores and whatever else takes a classifier then explain a class of that region: what of the image makes these pixels so.

    Args:
        region: (height, width), the pixels' weights: true or positive inside, 0 outside; in the size of the logits.

    Raises:
        InputError: a region without pixels; when the network answers, logits of another size.

    >>> import torch
    >>> from lineament.explain import saliency
    >>> _ = torch.manual_seed(0)
    >>> net, region = nn.Conv2d(1, 3, 3, padding=1), torch.zeros(8, 8, dtype=torch.bool)
    >>> region[2, 2] = True
    >>> with over_region(net, region):
    ...     maps = saliency(net, torch.ones(1, 1, 8, 8), 0, site=":in", method="gradient")
    >>> int((maps[0, 0] != 0).sum())  # the pixels that a 3 x 3 convolution sees from there
    9
    """
    weight = region.double()
    require(
        region.ndim == 2 and bool((weight >= 0).all()) and float(weight.sum()) > 0,
        f"region: got {show(region)}, expected weights (height, width), none below 0 and some above",
    )

    def answer(_: nn.Module, _args: object, output: object) -> Tensor:
        found = logits(output)
        require(
            found.ndim == 4 and found.shape[2:] == region.shape,
            f"region: its size is {tuple(region.shape)}, and the model answers with {show(found)}, expected (batch, classes, height, width) of that size",
        )
        return (found * (weight / weight.sum()).to(found)).sum((2, 3))

    handle = model.register_forward_hook(answer)
    try:
        yield model
    finally:
        handle.remove()
