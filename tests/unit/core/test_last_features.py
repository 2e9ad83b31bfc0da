"""The last of the default sites is what the last layer reads, however the network is written."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from lineament.core.sites.activations import record
from lineament.core.sites.depth import default_sites


class Imported(nn.Module):
    """As importers of other formats write networks: modules named by their operations, the last weights among the model's own."""

    def __init__(self):
        super().__init__()
        for name, module in (
            ("Conv@0", nn.Conv2d(1, 4, 3)),
            ("Clip@17", nn.ReLU6()),
            ("Pool@2", nn.AvgPool2d(6)),
            ("Reshape@18", nn.Flatten()),
        ):
            self.add_module(name, module)
        self.weight = nn.Parameter(torch.randn(3, 4))

    def features(self, x):
        for name in ("Conv@0", "Clip@17", "Pool@2", "Reshape@18"):
            x = self._modules[name](x)
        return x

    def forward(self, x):
        return self.features(x) @ self.weight.t()


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Linear(4, 3)

    def features(self, x):
        return torch.flatten(F.adaptive_avg_pool2d(self.relu(self.conv(x)), 1), 1)

    def forward(self, x):
        return self.fc(F.dropout(self.features(x), training=self.training)).log_softmax(1)


class Cosine(nn.Module):
    """A head of normalised features and weights: what is read is what the module is given."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU()), CosineHead()
        self.features = self.body

    def forward(self, x):
        return self.head(self.body(x))


class CosineHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(3, 5))

    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.prototypes))


class Auxiliary(nn.Module):
    """A second head that runs last, and whose answer is not the model's."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU())
        self.narrow, self.fc, self.other = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(6, 3)
        self.features = nn.Sequential(self.body, self.narrow)

    def forward(self, x):
        h = self.body(x)
        y = self.fc(self.narrow(h))
        self.unused = self.other(h)
        return y


class Split(nn.Module):
    def __init__(self, body, head):
        super().__init__()
        self.body, self.head = body, head

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.body(x))


def body():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5), nn.Tanh())


NETWORKS = {
    "imported": Imported,
    "functional": Functional,
    "cosine": Cosine,
    "auxiliary": Auxiliary,
    "plain": lambda: Split(body(), nn.Linear(5, 3)),
    "softmax": lambda: Split(body(), nn.Sequential(nn.Linear(5, 3), nn.Softmax(1))),
    "sigmoid": lambda: Split(body(), nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Sigmoid())),
    "weight norm": lambda: Split(body(), parametrizations.weight_norm(nn.Linear(5, 3))),
    "old weight norm": lambda: Split(body(), nn.utils.weight_norm(nn.Linear(5, 3))),
    "spectral norm": lambda: Split(body(), parametrizations.spectral_norm(nn.Linear(5, 3))),
    "pruned": lambda: Split(body(), prune.random_unstructured(nn.Linear(5, 3), "weight", 0.5)),
    "scripted body": lambda: Split(torch.jit.trace(body(), torch.zeros(2, 1, 8, 8)), nn.Linear(5, 3)),
    "fully convolutional": lambda: Split(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ),
    "double": lambda: Split(body(), nn.Linear(5, 3)).double(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_last_site_is_what_the_last_layer_reads(kind):
    torch.manual_seed(0)
    net = NETWORKS[kind]().eval()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64 if kind == "double" else torch.float32)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    chosen = default_sites(net, x)
    found = record(net, x, chosen[-1])[chosen[-1]]
    with torch.no_grad():
        wanted = net.features(x)
    assert found.numel() == wanted.numel() and torch.allclose(found.flatten(), wanted.flatten()), chosen
    assert len(set(chosen)) == len(chosen)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
