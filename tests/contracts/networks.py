"""A small image network with all the in-place traps, and what passes in it computed by hand."""

from __future__ import annotations

import torch
from torch import nn


class Residual(nn.Module):
    """All the in-place traps of an image network in one block."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.skip = nn.Identity()

    def forward(self, x):
        identity = self.skip(x)
        out = self.bn(self.conv(self.relu(self.first(x))))
        out += identity
        return self.relu(out)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(Residual(), Residual(), nn.Flatten(), nn.Linear(48, 5)).eval()


def out_of_place(net, x):
    """What passes at each site of ``network``, computed by hand without any in-place operation."""
    seen = {}
    for index in range(2):
        block = net[index]
        seen[f"{index}:in"] = x
        first = seen[f"{index}.first"] = torch.conv2d(x, block.first.weight, block.first.bias, padding=1)
        second = torch.relu(first)
        conv = seen[f"{index}.conv"] = torch.conv2d(second, block.conv.weight, block.conv.bias, padding=1)
        bn = seen[f"{index}.bn"] = nn.functional.batch_norm(
            conv, block.bn.running_mean, block.bn.running_var, block.bn.weight, block.bn.bias
        )
        seen[f"{index}.skip"] = x
        x = seen[f"{index}"] = torch.relu(bn + x)
    seen["2"] = x.flatten(1)
    seen[""] = seen["3"] = nn.functional.linear(seen["2"], net[3].weight, net[3].bias)
    return seen
