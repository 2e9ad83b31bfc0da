"""Small networks by name: those that the recipes train, for images from 8 x 8 to 64 x 64 pixels, and small language models.

Every image network is ``features`` and a linear ``head``, drawn from a seed alone; its width is that of its first layer.

| name | what it is | usual width |
| --- | --- | --- |
| ``mlp`` | a perceptron; hidden layers as wide as ``widths`` says | (128, 128) |
| ``two-conv`` | two convolutions, one pooling and a hidden layer | 16 |
| ``tiny-cnn`` | two convolutions with pooling and a hidden layer | 16 |
| ``cnn`` | three blocks of convolution, norm and pooling | 32 |
| ``cnn7`` | seven convolutions with norm (two of the width, two of twice, three of four times) and three poolings | 12 |
| ``small-resnet`` | one residual block for each of three widths | 16 |
| ``resnet14`` | two residual blocks for each of three widths | 16 |
| ``resnet18``, ``resnet34``, ``resnet50`` | He et al. 2016, with a 3 x 3 stem of stride 1 and no pooling before the blocks | 64 |
| ``vgg19`` | Simonyan and Zisserman 2015, with batch norm and one linear layer | 64 |
| ``densenet121`` | Huang et al. 2017; the growth is half the width | 64 |
| ``vit-s`` | Dosovitskiy et al. 2021 on patches of 4 x 4: 12 layers of six heads | 384 |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lineament.core.checks import InputError, one_of, require

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}
_VGG19 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512, 0)


class Network(nn.Module):
    """Features and a linear head."""

    def __init__(self, features: nn.Module, width: int, classes: int, *, bias: bool = True):
        super().__init__()
        self.features, self.head = features, nn.Linear(width, classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Block(nn.Module):
    """A residual block: two 3 x 3 convolutions, or a bottleneck of 1 x 1, 3 x 3 and 1 x 1 that ends four times as wide."""

    def __init__(self, inputs: int, width: int, stride: int, parts: Parts, *, bottleneck: bool = False):
        super().__init__()
        outputs = 4 * width if bottleneck else width
        sizes = (
            ((inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1))
            if bottleneck
            else ((inputs, width, 3, stride), (width, width, 3, 1))
        )
        layers: list[nn.Module] = []
        for before, after, kernel, step in sizes:
            layers += [*parts.conv(before, after, kernel, step), parts.act()]
        self.body = nn.Sequential(*layers[:-1])
        same = stride == 1 and inputs == outputs
        self.skip = nn.Identity() if same else nn.Sequential(*parts.conv(inputs, outputs, 1, stride))
        self.act, self.outputs = parts.act(), outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.skip(x))


@dataclass(frozen=True)
class Parts:
    """What layers are made of: the activation, and whether batch norm follows each convolution (which then has no bias)."""

    act: Callable[[], nn.Module]
    norm: bool

    def conv(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=not self.norm)
        return [layer, nn.BatchNorm2d(outputs)] if self.norm else [layer]


class Mean(nn.Module):
    """The mean over some dimensions."""

    def __init__(self, *dims: int):
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims)


class _Dense(nn.Module):
    def __init__(self, inputs: int, growth: int, parts: Parts):
        super().__init__()
        norm = nn.BatchNorm2d if parts.norm else nn.Identity
        self.body = nn.Sequential(
            *(norm(inputs), parts.act(), nn.Conv2d(inputs, 4 * growth, 1, bias=False)),
            *(norm(4 * growth), parts.act(), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


class _Patches(nn.Module):
    def __init__(self, shape: tuple[int, ...], width: int):
        super().__init__()
        self.project = nn.Conv2d(shape[0], width, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(1, (shape[1] // 4) * (shape[2] // 4), width))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x).flatten(2).mT + self.position


# Each of these takes the shape of one input, the widths and the parts, and gives the features and how many there are.
Features = tuple[list[nn.Module], int]


def _mlp(shape: tuple[int, ...], widths: tuple[int, ...], parts: Parts) -> Features:
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = torch.Size(shape).numel()
    for width in widths:
        layers += [nn.Linear(inputs, width), *([nn.BatchNorm1d(width)] if parts.norm else []), parts.act()]
        inputs = width
    return layers, inputs


def _two_conv(shape: tuple[int, ...], widths: tuple[int, ...], parts: Parts) -> Features:
    width = widths[0]
    inside = 2 * width * (shape[1] // 2) * (shape[2] // 2)
    return [
        *(*parts.conv(shape[0], width), parts.act(), *parts.conv(width, 2 * width), parts.act()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(inside, 4 * width), parts.act()),
    ], 4 * width


def _tiny_cnn(shape: tuple[int, ...], widths: tuple[int, ...], parts: Parts) -> Features:
    width = widths[0]
    side = (shape[1] // 4) * (shape[2] // 4)
    return [
        *(*parts.conv(shape[0], width), parts.act(), nn.MaxPool2d(2)),
        *(*parts.conv(width, 2 * width), parts.act(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(2 * width * side, 4 * width), parts.act()),
    ], 4 * width


def _strided_cnn(shape: tuple[int, ...], widths: tuple[int, ...], parts: Parts) -> Features:
    layers: list[nn.Module] = []
    inputs = shape[0]
    for outputs in (widths[0], 2 * widths[0], 4 * widths[0]):
        norm = [nn.BatchNorm2d(outputs)] if parts.norm else []
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=not parts.norm), *norm, parts.act()]
        inputs = outputs
    return [*layers, Mean(2, 3)], inputs


def _cnn(shape: tuple[int, ...], widths: tuple[int, ...], parts: Parts) -> Features:
    layers: list[nn.Module] = []
    inputs = shape[0]
    for outputs in (widths[0], 2 * widths[0], 4 * widths[0]):
        layers += [*parts.conv(inputs, outputs), parts.act(), nn.MaxPool2d(2)]
        inputs = outputs
    return [*layers, Mean(2, 3)], inputs


def _cnn7(shape: tuple[int, ...], widths: tuple[int, ...], parts: Parts) -> Features:
    layers: list[nn.Module] = []
    inputs = shape[0]
    for index, times in enumerate((1, 1, 2, 2, 4, 4, 4), start=1):
        layers += [*parts.conv(inputs, times * widths[0]), parts.act()]
        layers += [nn.MaxPool2d(2)] if index in (2, 4, 6) else []
        inputs = times * widths[0]
    return [*layers, Mean(2, 3)], inputs


def _resnet(*blocks: int, bottleneck: bool = False) -> Callable[..., Features]:
    def make(shape: tuple[int, ...], widths: tuple[int, ...], parts: Parts) -> Features:
        layers: list[nn.Module] = [*parts.conv(shape[0], widths[0]), parts.act()]
        inputs = widths[0]
        for stage, count in enumerate(blocks):
            for index in range(count):
                stride = 2 if stage and not index else 1
                block = Block(inputs, widths[0] * 2**stage, stride, parts, bottleneck=bottleneck)
                layers.append(block)
                inputs = block.outputs
        return [*layers, Mean(2, 3)], inputs

    return make


def _vgg19(shape: tuple[int, ...], widths: tuple[int, ...], parts: Parts) -> Features:
    layers: list[nn.Module] = []
    inputs = shape[0]
    for channels in _VGG19:
        if not channels:
            layers.append(nn.MaxPool2d(2))
            continue
        outputs = channels * widths[0] // 64
        layers += [*parts.conv(inputs, outputs), parts.act()]
        inputs = outputs
    return [*layers, Mean(2, 3)], inputs


def _densenet121(shape: tuple[int, ...], widths: tuple[int, ...], parts: Parts) -> Features:
    growth, channels = widths[0] // 2, widths[0]
    norm = nn.BatchNorm2d if parts.norm else nn.Identity
    layers: list[nn.Module] = [nn.Conv2d(shape[0], channels, 3, padding=1, bias=False)]
    for stage, count in enumerate((6, 12, 24, 16)):
        for _ in range(count):
            layers.append(_Dense(channels, growth, parts))
            channels += growth
        layers += [norm(channels), parts.act()]
        if stage < 3:
            layers += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
    return [*layers, Mean(2, 3)], channels


def _vit(shape: tuple[int, ...], widths: tuple[int, ...], parts: Parts) -> Features:
    width = widths[0]
    layer = nn.TransformerEncoderLayer(
        width, 6, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(layer, 12, norm=nn.LayerNorm(width), enable_nested_tensor=False)
    return [_Patches(shape, width), encoder, Mean(1)], width


# What makes each, its usual widths, and whether it usually has batch norm.
NETWORKS: dict[str, tuple[Callable[..., Features], tuple[int, ...], bool]] = {
    "mlp": (_mlp, (128, 128), False),
    "two-conv": (_two_conv, (16,), False),
    "tiny-cnn": (_tiny_cnn, (16,), False),
    "strided-cnn": (_strided_cnn, (16,), True),
    "cnn": (_cnn, (32,), True),
    "cnn7": (_cnn7, (12,), True),
    "small-resnet": (_resnet(1, 1, 1), (16,), True),
    "resnet14": (_resnet(2, 2, 2), (16,), True),
    "resnet18": (_resnet(2, 2, 2, 2), (64,), True),
    "resnet34": (_resnet(3, 4, 6, 3), (64,), True),
    "resnet50": (_resnet(3, 4, 6, 3, bottleneck=True), (64,), True),
    "vgg19": (_vgg19, (64,), True),
    "densenet121": (_densenet121, (64,), True),
    "vit-s": (_vit, (384,), False),
}


def network(
    name: str,
    shape: tuple[int, ...],
    classes: int,
    *,
    seed: int | None,
    widths: tuple[int, ...] | int | None = None,
    activation: str = "relu",
    norm: bool | None = None,
    head_bias: bool = True,
    weights: str | Path | None = None,
) -> Network:
    """A network by name, drawn from ``seed`` alone: the global random state stays as it was.

    Args:
        name: one of :data:`NETWORKS`.
        shape: of one input, (channels, height, width); for the perceptron any.
        seed: ``None`` draws from the global random state, as a factory for :mod:`lineament.train.stacked` must.
        widths: of the hidden layers of the perceptron, of the first layer of the others.
        activation: one of :data:`ACTIVATIONS`.
        norm: whether there is batch norm; as usual for the network by default.
        head_bias: whether the last layer has a bias.
        weights: a safetensors file; every tensor that fits is taken from it (fine-tuning).

    Raises:
        InputError: an unknown name, a file that is none or of which nothing fits.

    >>> net = network("tiny-cnn", (1, 8, 8), 10, seed=0)
    >>> tuple(net(torch.zeros(2, 1, 8, 8)).shape), sum(p.numel() for p in net.parameters())
    ((2, 10), 13706)
    """
    make, usual, has_norm = NETWORKS[one_of("network", name, NETWORKS)]
    parts = Parts(
        ACTIVATIONS[one_of("activation", activation, ACTIVATIONS)], has_norm if norm is None else norm
    )
    wide = usual if widths is None else (widths,) if isinstance(widths, int) else tuple(widths)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        layers, features = make(tuple(shape), wide, parts)
        model = Network(nn.Sequential(*layers), features, classes, bias=head_bias)
    if weights is not None:
        require(Path(weights).is_file(), f"weights: {str(weights)!r} is no file")
        own = model.state_dict()
        stored = {k: v for k, v in load_file(weights).items() if k in own and v.shape == own[k].shape}
        require(len(stored) > 0, f"weights: nothing in {str(weights)!r} fits the network {name!r}")
        model.load_state_dict({**own, **stored})
    return model


def gpt2(
    vocabulary: int,
    positions: int,
    *,
    seed: int,
    layers: int = 2,
    heads: int = 4,
    width: int = 64,
    tied: bool = False,
    std: tuple[float, float] | None = None,
    attention: str = "eager",
) -> Any:
    """A small GPT-2 of transformers without dropout, drawn from ``seed`` alone, in eval mode.

    Args:
        vocabulary, positions: the number of tokens, and of tokens in a row.
        tied: whether the unembedding is the embedding.
        std: of the embeddings and of all other matrices; by default GPT-2's own 0.02, which suits large widths.
        attention: the implementation, ``"eager"`` or ``"sdpa"``.

    >>> tuple(gpt2(20, 8, seed=0)(torch.zeros(1, 8, dtype=torch.long)).logits.shape)
    (1, 8, 20)
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    settings: dict[str, Any] = {"attn_implementation": attention, "tie_word_embeddings": tied}
    settings |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    settings |= dict.fromkeys(("bos_token_id", "eos_token_id"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary,
                n_positions=positions,
                n_embd=width,
                n_layer=layers,
                n_head=heads,
                activation_function="gelu",
                **settings,
            )
        ).eval()
        if std is not None:
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=std[0] if "wte" in name or "wpe" in name else std[1])
    return model


def vision_transformer(
    width: int,
    layers: int,
    heads: int,
    *,
    image: int = 32,
    patch: int = 4,
    classes: int = 10,
    seed: int | None = None,
) -> nn.Module:
    """A ViT of transformers without dropout, drawn from ``seed`` alone, or from the global random state."""
    try:
        from transformers import ViTConfig, ViTForImageClassification
    except ImportError as error:
        raise InputError(
            "networks: 'vit' needs the package transformers; install lineament[hub], or use other networks"
        ) from error
    sizes: dict[str, Any] = {
        "image_size": image,
        "patch_size": patch,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_labels": classes,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return ViTForImageClassification(ViTConfig(**sizes))
