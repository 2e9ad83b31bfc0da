"""What the parts lens says of groups of channels, each silenced again with a plain hook."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from tests.independent.conftest import answers
from tests.independent.said import Compact, Percent, numbers, says

LOSSES = {
    "multi-label": lambda z, y: F.binary_cross_entropy_with_logits(z, y.float(), reduction="none").mean(1),
    "values": lambda z, y: (z.reshape(len(y)) - y).square(),
}


def hooked(network, site, change):
    """A hook at a site; ``change`` gets its value and returns another, or ``None``."""
    if site.endswith(":in"):
        module = network.get_submodule(site.removesuffix(":in"))
        return module.register_forward_pre_hook(lambda m, given: change(given[0]))
    return network.get_submodule(site).register_forward_hook(lambda m, given, out: change(out))


@pytest.mark.parametrize("name", ["softmax", "normed", "compiled", "multi-label", "values"])
def test_every_number_and_every_group_that_is_named(name, people, told):
    network, x, y, logits = people(name)
    network = getattr(network, "_orig_mod", network)
    section = told(name, "accuracy", "parts")["parts"]
    numbers_of = section["numbers"]
    rows, task = torch.tensor(numbers_of["rows"]), numbers_of["task"]
    loss = LOSSES.get(name, lambda z, y: F.cross_entropy(z, y, reduction="none"))
    before = logits(answers(network, x[rows]))

    def silenced(group):
        """The rise of the loss, its standard error, and how much answers change."""
        seen = []
        handle = hooked(network, group["site"], lambda value: seen.append(value.detach()))
        answers(network, x[rows])
        handle.remove()
        channels = slice(group["from"], group["to"] + 1)
        mean = torch.cat(seen).transpose(0, 1).flatten(1).mean(1)[channels]

        def hold(value):
            value = value.clone()
            value[:, channels] = mean.view(-1, *[1] * (value.ndim - 2))
            return value

        handle = hooked(network, group["site"], hold)
        after = logits(answers(network, x[rows]))
        handle.remove()
        cost = (loss(after, y[rows]) - loss(before, y[rows])).double()
        if task == "classification":
            changed = float((after.argmax(1) != before.argmax(1)).double().mean())
        else:
            changed = float((after - before).double().square().mean().sqrt() / before.double().std())
        return float(cost.mean()), float(cost.std()) / len(rows) ** 0.5, changed

    # Every group again, so that "the most" and "fewer than 1 %" are what they say.
    measured = [silenced(group) for group in numbers_of["groups"]]
    for group, (cost, error, changed) in zip(numbers_of["groups"], measured):
        assert group["mean_cost"] == pytest.approx(cost, rel=1e-3, abs=1e-5)
        assert group["mean_error"] == pytest.approx(error, rel=1e-3, abs=1e-5)
        assert group["mean_changed"] == pytest.approx(changed, rel=1e-3, abs=1e-5)
    top = max(range(len(measured)), key=lambda k: measured[k][2])
    (cost, error, changed), group = measured[top], numbers_of["groups"][top]
    base, count = float(loss(before, y[rows]).mean()), len(measured)
    free = sum(each[2] < 0.01 for each in measured)
    alone = group["from"] == group["to"]
    expected = [
        len(rows),
        *([group["from"]] if alone else [group["from"], group["to"]]),
        Percent(changed),
        count,
        Compact(base),
        Compact(base + cost),
        Compact(1.96 * error),
        *([free, Percent(free / count, 0)] if 0 < free < count else [count] if free else []),
        1,
    ]
    if "even lowers" in section["sentence"]:
        least = min(range(count), key=lambda k: measured[k][0])
        helped = numbers_of["groups"][least]
        expected += [helped["from"], *([] if helped["from"] == helped["to"] else [helped["to"]])]
        expected += [Compact(base + measured[least][0]), Compact(1.96 * measured[least][1])]
        assert measured[least][0] < -2.9 * measured[least][1]
    # What channels that are taken out leave is measured again in tests/unit/audit/test_removal.py.
    says(re.split("Channels can be taken out|Taking channels out", section["sentence"])[0], *expected)
    assert f"at {group['site']} " in section["sentence"]
    (finding,) = section["findings"]
    if finding["key"] == "room to spare":
        says(finding["sentence"], Percent(free / count, 0), 1, len(rows))
        assert free > count / 2
    else:
        says(
            finding["sentence"],
            *([Percent(free / count, 0)] if free else []),
            1,
            len(rows),
            Percent(changed, 0),
        )
        assert free <= count / 2
    assert Percent(free / count, 0).fits(numbers(section["number"])[0])
