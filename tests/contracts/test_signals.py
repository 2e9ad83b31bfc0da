"""A signal (batch, channels, steps) is read as the picture one pixel high that it is: channels are features, steps are positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lineament.measure import alignment, complexity, importance
from lineament.measure.complexity.features import feature_function


@dataclass
class Atoms:
    """A dictionary of given directions at a site."""

    atoms: Tensor
    site: str

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.atoms.T)

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.atoms


def atoms() -> Any:
    return Atoms(torch.eye(4)[:3], "3")


def twins() -> tuple[nn.Module, Tensor, nn.Module, Tensor]:
    """A network on signals and the same one on pictures of height 1; each layer's output has as many steps as the last has channels or fewer."""
    torch.manual_seed(0)
    signal = nn.Sequential(
        nn.Conv1d(2, 5, 3), nn.ReLU(), nn.Conv1d(5, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    )
    picture = nn.Sequential(
        nn.Conv2d(2, 5, (1, 3)), nn.ReLU(), nn.Conv2d(5, 4, (1, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    )
    weights = {k: v[:, :, None] if v.ndim == 3 else v for k, v in signal.state_dict().items()}
    picture.load_state_dict(weights)
    x = torch.randn(80, 2, 7)
    return signal.eval(), x, picture.eval(), x[:, :, None]


def read_complexity(net, x):
    found = complexity(net, (x, torch.zeros(len(x))), atoms(), sites=["1", "3"])
    return found.information


def read_importance(net, x):
    return importance(net, (x, torch.zeros(len(x))), atoms()).values


def read_features(net, x):
    return feature_function(net, atoms())(x)


def read_alignment(net, x):
    return alignment(net, net, x, sites=["1"], nulls=(), positions=64).sites["1"].correlations


@pytest.mark.parametrize("read", [read_complexity, read_importance, read_features, read_alignment])
def test_a_signal_reads_as_the_picture_that_it_is(read):
    signal, x, picture, pixels = twins()
    torch.testing.assert_close(read(signal, x), read(picture, pixels), rtol=1e-4, atol=1e-5)
