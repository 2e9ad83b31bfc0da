"""LPIPS, the perceptual distance of rebuilt pictures (Zhang et al., CVPR 2018, arXiv 1801.03924): by the package ``lpips`` and its weights, or not at all."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, one_of, require, show


def lpips_distance(
    first: Tensor, second: Tensor, *, net: Literal["vgg", "alex"] = "vgg", model: nn.Module | None = None
) -> Tensor:
    """LPIPS of pictures [n, channels, height, width] in [0, 1], [n]; 0 for equal ones. Grey pictures are taken as coloured ones.

    Args:
        net: whose features are compared. model: an ``lpips.LPIPS`` that was made before, in place of a new one, which reads weights from torchvision's store.

    Raises:
        InputError: the package ``lpips`` is not installed; pictures of unequal shapes, or too small for the network.

    >>> x = torch.zeros(1, 3, 64, 64)
    >>> lpips_distance(x, x, model=nn.L1Loss()).item()  # where the package is installed, without ``model``
    0.0
    """
    require(
        first.shape == second.shape and first.ndim == 4 and first.shape[1] in (1, 3),
        f"second: got {show(second)}, expected the shape of {show(first)}, with 1 or 3 channels",
    )
    one_of("net", net, ("vgg", "alex"))
    judge: Any = model
    if judge is None:
        try:
            import lpips  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise InputError(
                f"lpips: the package cannot be imported ({error}), and nothing else is called LPIPS here; pip install lpips, or take picture_scores and cw_ssim"
            ) from None
        judge = lpips.LPIPS(net=net, verbose=False)
    judge = judge.to(first).eval()
    pair = [(2 * x - 1).expand(-1, 3, -1, -1) for x in (first, second)]
    try:
        with torch.no_grad():
            return judge(*pair).flatten()
    except RuntimeError as error:
        raise InputError(
            f"first: got pictures of {tuple(first.shape[2:])}, which LPIPS cannot see ({str(error).splitlines()[0]}); expected 64 x 64 or more"
        ) from None
