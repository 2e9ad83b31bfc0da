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
from lineament.explain.pointing import PointingGame, difficult, hits
from lineament.explain.saliency import saliency

_MEAN, _SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FullyConvolutional(nn.Module):
    """A transformers ResNet whose logits are maps: its average pooling becomes 7 x 7 with stride 1, its head a 1 x 1 convolution.

    >>> from transformers import ResNetConfig, ResNetForImageClassification
    >>> config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic", num_labels=3)
    >>> FullyConvolutional(ResNetForImageClassification(config))(torch.rand(1, 3, 80, 64)).shape
    torch.Size([1, 3, 4, 2])
    """

    def __init__(self, classifier: Any):
        super().__init__()
        checks.require(
            hasattr(classifier, "resnet") and isinstance(classifier.classifier[-1], nn.Linear),
            f"model_folder: got {type(classifier).__name__}, expected a transformers ResNet for image classification",
        )
        linear = classifier.classifier[-1]
        self.embedder, self.encoder = classifier.resnet.embedder, classifier.resnet.encoder
        self.pool = nn.AvgPool2d(7, stride=1)
        self.head = nn.Conv2d(linear.in_features, linear.out_features, 1)
        weights = {"weight": linear.weight[:, :, None, None], "bias": linear.bias}
        self.head.load_state_dict(weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.encoder(self.embedder(x)).last_hidden_state))


def photographs_model(model_folder: str) -> tuple[nn.Module, list[str]]:
    """The classifier that the user saved with ``save_pretrained``, fully convolutional, and the names of its classes."""
    try:
        from transformers import AutoModelForImageClassification
    except ImportError as error:
        raise checks.InputError(
            "the paper preset needs transformers: pip install 'lineament[hub]'"
        ) from error
    checks.require(
        Path(model_folder).is_dir(),
        f"model_folder: {model_folder!r} is no folder; expected a transformers ResNet fine-tuned for several labels, as save_pretrained "
        "writes it (--model-folder FOLDER)",
    )
    classifier = AutoModelForImageClassification.from_pretrained(model_folder, local_files_only=True)
    labels = classifier.config.id2label
    names = [str(labels[k]) for k in sorted(labels)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return FullyConvolutional(classifier).eval().to(device), names


def photographs(dataset: str, data_folder: str | None, limit: int | None) -> Iterator[Located]:
    """The images of VOC2007 test or COCO val2014 below ``data_folder`` (default: the environment's ``LINEAMENT_DATA``)."""
    folder = data_folder or os.environ.get("LINEAMENT_DATA")
    if not folder:
        raise checks.InputError(
            "data_folder: the paper preset reads VOC2007 or COCO from your disk; pass --data-folder FOLDER (which holds VOC2007/ or "
            "coco/) or set LINEAMENT_DATA"
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
    short_side: int = 224,
) -> dict[str, dict[str, dict[str, float]]]:
    """{method: {site: {"all", "difficult": mean accuracy}}} by the benchmark's protocol, one image at a time.

    Each class of an image is one question. Maps at the image are blurred (sigma 0.02 of the longer side). Classes whose boxes
    are all flagged difficult are left out.
    """
    game = {
        (m, s, part): PointingGame(len(names))
        for m in methods
        for s in sites
        for part in ("all", "difficult")
    }
    device = next(model.parameters()).device
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
            maps = saliency(model, x, targets, site=some, method=methods, resize=False, smooth=blur)
            for method in methods:
                for site in some:
                    masks = [image.masks[label] for label in asked]
                    found = hits(maps[method][site].cpu(), masks, tolerance=tolerance)
                    for label, mask, hit in zip(asked, masks, found.tolist()):
                        game[method, site, "all"].add(names.index(label), hit)
                        if difficult(mask, len(image.masks) > 1):
                            game[method, site, "difficult"].add(names.index(label), hit)

    def mean(one: PointingGame) -> float:
        return one.mean() if int((one.hits + one.misses).sum()) else float("nan")

    return {
        m: {s: {part: mean(game[m, s, part]) for part in ("all", "difficult")} for s in sites}
        for m in methods
    }


def prepared_photograph(pixels: Tensor, short_side: int) -> Tensor:
    """(1, 3, h, w) with the shorter side as asked, in ImageNet's colour scale."""
    height, width = pixels.shape[-2:]
    scale = short_side / min(height, width)
    size = (max(round(height * scale), short_side), max(round(width * scale), short_side))
    x = F.interpolate(pixels[None], size, mode="bilinear", align_corners=False, antialias=True)
    return (x - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_SPREAD)[:, None, None]
