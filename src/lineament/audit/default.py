"""The audit without arguments: a small network trained on digits with a planted mark, and that data's test images.

The network learns to read the mark, because the mark is easier than the digit; the audit must find that out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lineament.data.shortcut_digits import SIDE, shortcut_digits
from lineament.train.loop import fit


class SmallCNN(nn.Module):
    """Three convolutions with their activations, then a linear classifier that sees where each feature was."""

    def __init__(self, classes: int = 10, channels: int = 1, side: int = SIDE, width: int = 16):
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.stage2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.stage3 = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU())
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(2 * width * (side // 4) ** 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.stage3(self.stage2(self.stage1(images)))))


def small_cnn(seed: int = 0) -> SmallCNN:
    """The network before training; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallCNN()


def train(seed: int = 0, *, epochs: int = 15, batch_size: int = 64) -> dict[str, Tensor]:
    """The weights of :func:`small_cnn` after training on :func:`~lineament.data.shortcut_digits.shortcut_digits`.

    >>> weights = train(epochs=1)
    >>> tuple(weights["classifier.bias"].shape)
    (10,)
    """
    data = shortcut_digits("train", seed=seed)
    model = small_cnn(seed)
    adam = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-4)
    name = "training a small network on marked digits"
    fit(model, data, optimizer=adam, epochs=epochs, batch_size=batch_size, seed=seed, name=name)
    return {name: value.detach() for name, value in model.state_dict().items()}


def trained() -> SmallCNN:
    """The network that an audit without arguments looks at, for commands that take a factory: ``lineament edit prune lineament.audit.default:trained ...``."""
    network = small_cnn()
    network.load_state_dict(train())
    return network.eval()
