"""Small networks of every family whose channels are coupled in another way: what surgery has to follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Made = tuple[nn.Module, Any]


class Block(nn.Module):
    """A residual block, with a shortcut where the width changes."""

    def __init__(self, before: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride > 1 or before != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x):
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return torch.relu_(out)


class Dense(nn.Module):
    """Everything so far is concatenated."""

    def __init__(self, before: int, growth: int = 3, layers: int = 3):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(before + i * growth),
                nn.ReLU(),
                nn.Conv2d(before + i * growth, growth, 3, padding=1),
            )
            for i in range(layers)
        )

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class Inverted(nn.Module):
    """MobileNetV2's block: depthwise between two projections."""

    def __init__(self, width: int, expand: int = 2):
        super().__init__()
        inner = width * expand
        self.body = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(inplace=True),
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(inplace=True),
            nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x):
        return x + self.body(x)


class Twice(nn.Module):
    """The same channels twice, a gate in halves, and one channel alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.one = nn.Linear(4, 6), nn.Linear(13, 8), nn.Linear(4, 1)
        self.c = nn.Linear(4, 3)

    def forward(self, x):
        a = torch.relu(self.a(x))
        gate, value = self.b(torch.cat([a, a, self.one(x)], -1)).chunk(2, -1)
        return self.c(torch.sigmoid(gate) * value)


class ZeroPadded(nn.Module):
    """A shortcut that pads with channels of zeros."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.conv(x) + nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return self.head(x.mean((2, 3)))


def vgg() -> Made:
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]  # fmt: skip
    head = [
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(10, 4),
    ]
    return nn.Sequential(*layers, *head), torch.randn(2, 3, 8, 8)


def resnet() -> Made:
    stem = [nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(
        *stem, Block(6, 6), Block(6, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ), torch.randn(2, 3, 8, 8)


def densenet() -> Made:
    layers = [
        nn.Conv2d(3, 4, 3, padding=1),
        Dense(4),
        nn.BatchNorm2d(13),
        nn.ReLU(),
        nn.Conv2d(13, 6, 1),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)), torch.randn(
        2, 3, 8, 8
    )


def mobilenet() -> Made:
    layers = [nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU6(), Inverted(4), Inverted(4)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)), torch.randn(
        2, 3, 8, 8
    )


def grouped() -> Made:
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(12, 6, 1), nn.GroupNorm(3, 6), nn.ReLU()]  # fmt: skip
    end = [
        nn.Conv2d(6, 1, 3),
        nn.Conv2d(1, 4, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 5, 2),
        nn.Flatten(),
        nn.Linear(245, 3),
    ]
    return nn.Sequential(*layers, *end), torch.randn(2, 3, 8, 8)


def twice() -> Made:
    return Twice(), torch.randn(3, 4)


def zero_padded() -> Made:
    return ZeroPadded(), torch.randn(2, 3, 8, 8)


def normalised_weights() -> Made:
    norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(
        norm(nn.Linear(4, 6)), nn.Tanh(), norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 2)
    ), torch.randn(3, 4)


def encoder() -> Made:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    net = nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3))
    return net, torch.randn(2, 5, 5)


def gpt2() -> Made:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=30, n_positions=12, n_embd=12, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config), {"input_ids": torch.tensor([[1, 5, 2, 9]])}


def llama() -> Made:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=30,
        hidden_size=24,
        intermediate_size=14,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
    )
    return LlamaForCausalLM(config), {"input_ids": torch.tensor([[1, 5, 2, 9]])}


def qwen2() -> Made:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=30,
        hidden_size=24,
        intermediate_size=14,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
    )
    return Qwen2ForCausalLM(config), {"input_ids": torch.tensor([[1, 5, 2, 9]])}


def vit() -> Made:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=14,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    return ViTForImageClassification(config), torch.randn(2, 3, 8, 8)


def swin() -> Made:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 4], window_size=4, num_labels=3
    )
    return SwinForImageClassification(config), torch.randn(2, 3, 16, 16)


FAMILIES: dict[str, Callable[[], Made]] = {
    f.__name__: f
    for f in (
        vgg,
        resnet,
        densenet,
        mobilenet,
        grouped,
        twice,
        zero_padded,
        normalised_weights,
        encoder,
        gpt2,
        llama,
        qwen2,
        vit,
        swin,
    )
}
# How many groups each has, and how many of them are attention heads.
GROUPS = {
    "vgg": (3, 0), "resnet": (4, 0), "densenet": (5, 0), "mobilenet": (3, 0), "grouped": (4, 0), "twice": (2, 0), "zero_padded": (2, 0),
    "normalised_weights": (2, 0), "encoder": (5, 2), "gpt2": (5, 2), "llama": (5, 2), "qwen2": (5, 2), "vit": (5, 2), "swin": (8, 3),
}  # fmt: skip


def made(family: str, seed: int = 0) -> Made:
    torch.manual_seed(seed)
    net, example = FAMILIES[family]()
    with torch.no_grad():  # no norm is the identity
        for tensor in net.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.3 * torch.rand_like(tensor))
    return net.eval(), example
