"""The full-scale configuration of the normgrad recipe: VOC2007 or COCO, a fully convolutional classifier, the benchmark's protocol."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.batching import progress
from lineament.data.located import Located, coco, voc
from lineament.explain.saliency.aggregation import combined
from lineament.explain.saliency.maps import saliency
from lineament.explain.saliency.meta import meta_saliency
from lineament.explain.saliency.pointing import PointingGame, difficult, hits

_MEAN, _SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photographs(dataset: str, data_folder: str | None, limit: int | None) -> Iterator[Located]:
    """The images of VOC2007 test or COCO val2014 below ``data_folder`` (default: the environment's ``LINEAMENT_DATA``)."""
    folder = data_folder or os.environ.get("LINEAMENT_DATA")
    if not folder:
        raise checks.InputError(
            "data_folder: the paper preset reads VOC2007 or COCO from your disk; give the folder that holds VOC2007/ or "
            "coco/, or set LINEAMENT_DATA"
        )
    if dataset == "voc":
        return voc(Path(folder) / "VOC2007", "test", limit=limit)
    return coco(Path(folder) / "coco", "val2014", limit=limit)


def point_on_photographs(
    model: nn.Module,
    names: list[str],
    images: Iterator[Located],
    *,
    sites: list[str],
    methods: list[str],
    tolerance: float,
    meta: list[str],
    meta_eps: float,
    joined: list[str],
    short_side: int = 224,
) -> dict[str, dict[str, dict[str, float]]]:
    """{method: {site: {"all", "difficult": mean accuracy}}} by the benchmark's protocol, one image at a time.

    Each class of an image is one question. Maps at the image are blurred (sigma 0.02 of the longer side). Classes whose boxes
    are all flagged difficult are left out.

    Args:
        meta: methods that are also taken after one step of size ``meta_eps`` on the image, under ``"METHOD + meta"``.
        joined: methods whose maps are also multiplied over the sites, under the site ``"product"``.
    """
    game: dict[tuple[str, str, str], PointingGame] = {}
    device = next(model.parameters()).device

    def score(method: str, site: str, maps: Tensor, asked: list[str], image: Located) -> None:
        masks = [image.masks[label] for label in asked]
        found = hits(maps.cpu(), masks, tolerance=tolerance)
        for label, mask, hit in zip(asked, masks, found.tolist()):
            for part in ("all", "difficult") if difficult(mask, len(image.masks) > 1) else ("all",):
                played = game.setdefault((method, site, part), PointingGame(len(names)))
                played.add(names.index(label), hit)

    for image in progress(images, "pointing"):
        asked = [label for label in image.masks if label in names and label not in image.hard]
        if not asked:
            continue
        x = prepared_photograph(image.pixels, short_side).to(device)
        targets = torch.tensor([names.index(label) for label in asked])
        x = x.expand(len(asked), -1, -1, -1)
        for blur, some in ((0.02, [s for s in sites if s == ":in"]), (0.0, [s for s in sites if s != ":in"])):
            if not some:
                continue
            options: dict[str, Any] = {"site": some, "resize": False, "smooth": blur}
            maps = saliency(model, x, targets, method=methods, **options)
            after = meta_saliency(model, x, targets, method=meta, eps=meta_eps, **options)
            maps.update({f"{method} + meta": found for method, found in after.items()})
            for method, found in maps.items():
                for site in some:
                    score(method, site, found[site], asked, image)
                if method in joined and len(some) > 1:
                    size = (x.shape[-2], x.shape[-1])
                    score(method, "product", combined(list(found.values()), size), asked, image)

    def mean(key: tuple[str, str, str]) -> float:
        played = game.get(key)
        return played.mean() if played is not None else float("nan")

    return {
        m: {s: {part: mean((m, s, part)) for part in ("all", "difficult")} for s in (*sites, "product")}
        for m in (*methods, *(f"{m} + meta" for m in meta))
    }


def prepared_photograph(pixels: Tensor, short_side: int) -> Tensor:
    """(1, 3, h, w) with the shorter side as asked, in ImageNet's colour scale."""
    height, width = pixels.shape[-2:]
    scale = short_side / min(height, width)
    size = (max(round(height * scale), short_side), max(round(width * scale), short_side))
    x = F.interpolate(pixels[None], size, mode="bilinear", align_corners=False, antialias=True)
    return (x - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_SPREAD)[:, None, None]
