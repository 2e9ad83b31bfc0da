"""What the spectrum lens says of the features that the classifier reads, measured again in a few lines of PyTorch in float64."""

from __future__ import annotations

import copy

import pytest
import torch


def effective_rank(features):
    p = torch.linalg.svdvals(features - features.mean(0)).square()
    p = p / p.sum()
    return float((-(p * p.clamp_min(1e-300).log()).sum()).exp())


@pytest.mark.parametrize("name", ["residual", "normed"])
def test_the_effective_rank_on_all_samples_and_on_each_half(name, networks, reports):
    network, x, _, _ = networks[name]
    section, features = reports(name)["spectrum"], []
    network = copy.deepcopy(network).double()
    head = network.fc if name == "residual" else network.fc2
    head.register_forward_pre_hook(lambda _, given: features.append(given[0].detach()))
    halves = [torch.tensor(rows) for rows in section["numbers"]["rows"]]
    with torch.no_grad():
        parts = [network(x[rows].double()) is not None and effective_rank(features[-1]) for rows in halves]
    every = effective_rank(torch.cat(features))
    last = section["numbers"]["sites"][-1]
    assert section["numbers"]["samples"] == sum(map(len, halves)) == 1000
    assert last["effective_rank"] == pytest.approx(every, rel=1e-3)
    assert last["halves"] == pytest.approx(parts, rel=1e-3)
    assert 0 < last["error"] < 0.5 * every and abs(parts[0] - parts[1]) < 3 * last["error"]
    assert "Over 1,000 of 1,797 samples" in section["sentence"]
