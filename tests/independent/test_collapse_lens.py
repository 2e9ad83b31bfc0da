"""What the collapse lens says of the features that the classifier reads, measured again in a few lines of PyTorch in float64."""

from __future__ import annotations

import copy

import pytest
import torch


def spread(features, labels):
    """tr S_W / tr S_B, the means of the classes counted alike, and how often the nearest class mean is right."""
    means = torch.stack([features[labels == k].mean(0) for k in range(10)])
    within = (features - means[labels]).square().sum(1).mean()
    between = (means - means.mean(0)).square().sum(1).mean()
    return float(within / between), float((torch.cdist(features, means).argmin(1) == labels).double().mean())


@pytest.mark.parametrize("name", ["residual", "misnormalised"])
def test_the_variance_within_classes_on_all_samples_on_each_half_and_its_error(name, networks, reports):
    network, x, y, _ = networks[name]
    section, features = reports(name)["collapse"], []
    network = copy.deepcopy(network).double()
    network.fc.register_forward_pre_hook(lambda _, given: features.append(given[0].detach()))
    with torch.no_grad():
        network(x.double())
    last = section["numbers"]["sites"][-1]
    every, right = spread(features[0], y)
    halves = [torch.tensor(rows) for rows in section["numbers"]["rows"]]
    assert (
        section["numbers"]["samples"]
        == len(y)
        == sum(map(len, halves))
        == len(set(torch.cat(halves).tolist()))
    )
    parts = [spread(features[0][rows], y[rows])[0] for rows in halves]
    assert last["nc1_tilde"] == pytest.approx(every, rel=1e-3)
    assert last["halves"] == pytest.approx(parts, rel=1e-3)
    assert 0 < last["error"] < 0.5 * every and abs(parts[0] - parts[1]) < 3 * last["error"]
    assert last["nearest_mean_accuracy"] == pytest.approx(right, abs=2e-3)
    assert f"Over {len(y):,} samples of 10 classes" in section["sentence"]
