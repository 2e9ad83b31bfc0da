"""The two classifiers of NormGrad's pointing game, made fully convolutional: VGG16 and a transformers ResNet.

A map of logits comes out, one position for each place of the photograph that the classifier's window fits on. Weights are the
user's: a folder that ``save_pretrained`` wrote (ResNet), or a safetensors file with the usual names of VGG16's parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core import checks
from lineament.data.located import VOC_CLASSES

VGG_LAYERS = ("features.3", "features.8", "features.15", "features.22", "features.29")
RESNET_LAYERS = tuple(f"encoder.stages.{k}" for k in range(4))


def photographs_model(source: str) -> tuple[nn.Module, list[str], tuple[str, ...]]:
    """The user's multi-label classifier, the names of its classes, and the layers that the paper looks at.

    Args:
        source: a folder with a transformers ResNet, or a ``.safetensors`` file with VGG16's weights (its metadata entry ``classes``
            lists the names with commas between them; 20 outputs are VOC's classes).

    Raises:
        InputError: neither of the two, or weights that do not fit.
    """
    path = Path(source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if path.suffix == ".safetensors":
        checks.require(path.is_file(), f"model_folder: file {source!r} does not exist")
        model, names = _vgg16(path)
        return model.eval().to(device), names, VGG_LAYERS
    try:
        from transformers import AutoModelForImageClassification
    except ImportError as error:
        raise checks.InputError(
            "the paper preset needs transformers: pip install 'lineament[hub]'"
        ) from error
    checks.require(
        path.is_dir(),
        f"model_folder: {source!r} is no folder; expected a transformers ResNet fine-tuned for several labels, as save_pretrained "
        "writes it, or VGG16's weights as a .safetensors file",
    )
    classifier = AutoModelForImageClassification.from_pretrained(source, local_files_only=True)
    labels = classifier.config.id2label
    names = [str(labels[k]) for k in sorted(labels)]
    return FullyConvolutional(classifier).eval().to(device), names, RESNET_LAYERS


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


class VGG16(nn.Module):
    """VGG16 whose three linear layers are convolutions (7 x 7, 1 x 1, 1 x 1), parts numbered as everywhere.

    >>> VGG16(20, widths=(4, 4, 4, 4, 4), hidden=8)(torch.rand(1, 3, 224, 256)).shape
    torch.Size([1, 20, 1, 2])
    """

    def __init__(self, classes: int, widths: tuple[int, ...] = (64, 128, 256, 512, 512), hidden: int = 4096):
        super().__init__()
        parts: list[nn.Module] = []
        before = 3
        for width, depth in zip(widths, (2, 2, 3, 3, 3)):
            for _ in range(depth):
                parts += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
                before = width
            parts.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*parts)
        self.classifier = nn.Sequential(
            nn.Conv2d(before, hidden, 7), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Conv2d(hidden, hidden, 1), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Conv2d(hidden, classes, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


def _vgg16(path: Path) -> tuple[VGG16, list[str]]:
    """The network with the widths that the file's tensors have; linear weights are unrolled into kernels."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = (file.metadata() or {}).get("classes", "")
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise checks.InputError(f"model_folder: {str(path)!r} is corrupt ({error})") from error
    ends = [state.get(f"features.{k}.bias") for k in (0, 5, 10, 17, 24)] + [state.get("classifier.6.bias")]
    checks.require(
        all(isinstance(bias, Tensor) for bias in ends) and "classifier.0.weight" in state,
        f"model_folder: {str(path)!r} holds {', '.join(sorted(state)[:3])} ..., expected VGG16's features.0.weight to "
        "classifier.6.bias",
    )
    *widths, classes = (len(bias) for bias in ends if bias is not None)
    for key, side in (("classifier.0.weight", 7), ("classifier.3.weight", 1), ("classifier.6.weight", 1)):
        if state[key].ndim == 2:
            state[key] = state[key].unflatten(1, (-1, side, side))
    model = VGG16(classes, tuple(widths), len(state["classifier.0.weight"]))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise checks.InputError(
            f"model_folder: {str(path)!r} does not fit VGG16 ({str(error).splitlines()[-1].strip()})"
        ) from error
    listed: list[str] = [name.strip() for name in names.split(",")] if names else [*VOC_CLASSES]
    checks.require(
        len(listed) == classes,
        f"model_folder: {str(path)!r} has {classes} outputs and {len(listed)} class names; write the names into its metadata "
        "entry 'classes', with commas between them",
    )
    return model, listed
