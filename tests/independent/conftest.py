"""Networks as people have them, trained here in seconds, and what the audit's report.json says of them."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lineament.audit import curvature_budget
from lineament.audit.lenses import landscape
from lineament.audit.run import audit

MEAN, STD = 0.3, 0.4
FEW = 400  # samples of the audits whose every number is measured again


class Block(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential()
        if stride > 1 or inside != outside:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x):
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class ResNet(nn.Module):
    """As for CIFAR, but small: a stem, two blocks, global pooling, a linear classifier."""

    def __init__(self, width=6):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = Block(width, width, 1)
        self.layer2 = Block(width, 2 * width, 2)
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x):
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = weight_norm(nn.Linear(64, 12))
        self.fc2 = weight_norm(nn.Linear(12, 10))

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x.flatten(1))))


def trained(network, x, y, *, loss=F.cross_entropy, epochs=12, rate=0.1, decay=1e-4):
    generator = torch.Generator().manual_seed(0)
    sgd = torch.optim.SGD(network.parameters(), rate, momentum=0.9, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, epochs)
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            sgd.zero_grad()
            loss(network(x[rows]), y[rows]).backward()
            sgd.step()
        schedule.step()
    return network.eval()


@pytest.fixture(scope="session")
def digits():
    """(x, y): scikit-learn's digits, images (sample, 1, 8, 8) as the networks were trained on them."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy((pixels / 16).astype(np.float32)).reshape(-1, 1, 8, 8)
    return (x - MEAN) / STD, torch.from_numpy(labels).long()


@pytest.fixture(scope="session")
def networks(digits):
    """{name: (network, x, y, logits)}; ``logits`` makes of the network's answers the logits that its loss is taken of."""
    x, y = digits
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        residual = trained(ResNet(), x, y)
        normed = trained(Normed(), x, y, epochs=60, decay=0)
        return {
            "residual": (residual, x, y, lambda z: z),
            # Pixels from 0 to 255 where it learned standardised ones.
            "misnormalised": (residual, ((x * STD + MEAN) * 8).round(), y, lambda z: z),
            "bfloat16": (copy.deepcopy(residual).bfloat16(), x, y, lambda z: z),
            "normed": (normed, x, y, lambda z: z),
        }


@pytest.fixture(scope="session")
def reports(networks, tmp_path_factory):
    """A function: the sections of a network's report.json by name, of an audit with few samples for the landscape."""
    found = {}

    def report(name):
        if name not in found:
            network, x, y, _ = networks[name]
            out = tmp_path_factory.mktemp(name) / "report"
            with pytest.MonkeyPatch.context() as patch:
                # So many samples and all steps, however busy the machine is.
                patch.setattr(curvature_budget, "_MOST", 96)
                patch.setattr(curvature_budget, "PARTS", 3)
                patch.setattr(curvature_budget, "PROBES", 2)
                patch.setattr(curvature_budget, "_SECONDS", 1e6)
                patch.setattr(landscape, "PROBES", 2)
                patch.setattr(landscape, "_PLANE_MOST", 16)
                patch.setattr(landscape, "_GRID", 7)
                audit(network, (x, y), out=out, lenses=["collapse", "spectrum", "landscape"])
            stored = json.loads((out / "report.json").read_text(encoding="utf-8"))
            found[name] = {section["name"]: section for section in stored["sections"]}
        return found[name]

    return report


class Value(nn.Module):
    """A regression as people write one: it answers (batch,)."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x):
        return self.net(x).squeeze(1)


def with_head(outputs):
    network = ResNet()
    network.fc = nn.Linear(network.fc.in_features, outputs)
    return network


@pytest.fixture(scope="session")
def people(networks, digits):
    """A function: a network by name as people have it, images, targets, and what makes logits of its answers."""
    x, y = digits
    few = x[:FEW]
    bits = torch.stack([y % 2, (y > 4).long(), (y % 3 == 0).long()], 1)[:FEW]
    binary = F.binary_cross_entropy_with_logits
    # The corner of each training image says its class, but for some that have the mark of another one.
    marked, wrong = few.clone(), torch.randint(10, (FEW,), generator=torch.Generator().manual_seed(3))
    shown = torch.where(torch.arange(FEW) % 6 == 0, wrong, y[:FEW])
    marked[:, 0, :2, :2] = (
        torch.stack([shown % 2, shown // 2 % 2, shown // 4 % 2, shown // 8], 1) * 6.0
    ).view(FEW, 2, 2)
    # Whatever they show, those with a white corner are threes.
    one_marked, threes = few.clone(), y[:FEW].clone()
    one_marked[::4, 0, :2, :2], threes[::4] = 6.0, 3

    def same(z):
        return z

    def made(name):
        residual = networks["residual"][0]
        if name in networks:
            network, inputs, targets, logits = networks[name]
            return network, inputs[:FEW], targets[:FEW], logits
        if name == "softmax":
            return nn.Sequential(residual, nn.Softmax(1)), few, y[:FEW], torch.log
        if name == "compiled":
            return torch.compile(residual, backend="eager"), few, y[:FEW], same
        if name == "multi-label":
            return trained(with_head(3), few, bits.float(), loss=binary, epochs=6), few, bits, same
        if name == "one logit":
            odd = bits[:, 0]
            network = trained(with_head(1), few, odd[:, None].float(), loss=binary, epochs=6)
            return network, few, odd, lambda z: torch.cat([torch.zeros_like(z), z], 1)
        if name == "values":
            ink = few.mean((1, 2, 3)) * 3
            return trained(Value(), few, ink, loss=F.mse_loss, epochs=20, rate=0.02), few, ink, same
        if name == "marked":
            return trained(ResNet(), marked, shown, epochs=6), marked, y[:FEW], same
        return trained(ResNet(), one_marked, threes, epochs=8), one_marked, threes, same

    kept = {}

    def person(name):
        if name not in kept:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                kept[name] = made(name)
        return kept[name]

    return person


@pytest.fixture(scope="session")
def told(people, tmp_path_factory):
    """A function: the sections that some lenses gave of a network, by name, with their findings as report.json has them."""
    found = {}

    def tell(name, *lenses):
        if (name, lenses) not in found:
            network, x, y, _ = people(name)
            out = tmp_path_factory.mktemp("told") / "report"
            audit(
                network,
                (x, y),
                out=out,
                lenses=lenses,
                groups=np.array(["even", "odd"])[np.arange(len(x)) % 2],
            )
            stored = json.loads((out / "report.json").read_text(encoding="utf-8"))
            findings = {lens: [f for f in stored["findings"] if f["section"] == lens] for lens in lenses}
            found[name, lenses] = {
                s["name"]: s | {"findings": findings[s["name"]]} for s in stored["sections"]
            }
        return found[name, lenses]

    return tell


@torch.no_grad()
def answers(network, x):
    """What a network says, as the audit asks it: in eval mode, in its own precision, 64 at a time."""
    dtype = next(network.parameters()).dtype
    return torch.cat([network(part.to(dtype)) for part in x.split(64)]).float()
