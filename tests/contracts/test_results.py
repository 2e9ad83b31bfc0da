"""What every result keeps: printed it is a few readable lines, in a notebook a table, whatever tensors it holds."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil

import pytest
import torch
from torch import nn

import lineament
from lineament.core.results import Readable

WINGS = (
    "core",
    "load",
    "data",
    "train",
    "optim",
    "losses",
    "modules",
    "dictionaries",
    "explain",
    "measure",
    "learn",
)


def says_what_was_found(kind):
    """Whether it has a ``to_dict`` of ours: transformers' configurations have one too."""
    return any("to_dict" in vars(c) and c.__module__.startswith("lineament.") for c in kind.__mro__)


def results():
    """Every dataclass of the wings that says what was found: it has ``to_dict``, or is :class:`Readable` without one."""
    found = {}
    for info in pkgutil.walk_packages(lineament.__path__, "lineament."):
        if info.name.split(".")[1] not in (*WINGS, "audit"):
            continue
        try:
            module = importlib.import_module(info.name)
        except ImportError:  # an extra that is not installed
            continue
        for name, value in vars(module).items():
            mine = isinstance(value, type) and value.__module__ == info.name and not name.startswith("_")
            if (
                mine
                and dataclasses.is_dataclass(value)
                and (says_what_was_found(value) or issubclass(value, Readable))
            ):
                found[f"{info.name}.{name}"] = value
    return found


# What a lens keeps for its section is no result of its own.
RESULTS = {
    name: kind
    for name, kind in results().items()
    if not name.startswith("lineament.audit.") or issubclass(kind, Readable)
}


def filled(kind, value):
    """An instance with the same value in every field, as no constructor would make it."""
    made = object.__new__(kind)
    for each in dataclasses.fields(kind):
        object.__setattr__(made, each.name, value)
    return made


def test_there_are_results_of_every_wing():
    assert {name.split(".")[1] for name in RESULTS} >= {
        "core",
        "data",
        "train",
        "optim",
        "explain",
        "measure",
        "learn",
    }
    assert len(RESULTS) > 50


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_prints_a_few_lines_and_a_table(name):
    kind = RESULTS[name]
    large = torch.linspace(-1, 1, 60_000).reshape(200, 300)
    for value in (large, [large] * 9, {f"<{k}>": large for k in range(9)}, "x" * 500, torch.zeros(0)):
        text = repr(filled(kind, value))
        lines = text.splitlines()
        assert lines[0] == kind.__name__ and 1 < len(lines) <= 18
        assert max(map(len, lines)) <= 140 and "tensor(" not in text
        assert str(filled(kind, value)) == text
    assert "(200, 300) float32, -1 to 1, mean" in repr(filled(kind, large))
    page = filled(kind, {"<b>": large})._repr_html_()
    assert page.startswith("<table>") and "<b>" not in page and "&lt;b&gt;" in page


def test_numbers_are_said_and_what_is_empty_is_not():
    from lineament.core.curvature.eigenpairs import top_eigenpairs
    from lineament.data.samples import Samples

    pairs = top_eigenpairs(torch.diag(torch.tensor([3.0, 1.0, 0.5])), 1)
    lines = repr(pairs).splitlines()
    assert lines[0] == "Eigenpairs" and any("[3]" in line for line in lines), lines
    samples = Samples(torch.rand(40, 1, 8, 8), torch.arange(40) % 4)
    assert "(40, 1, 8, 8) float32" in repr(samples) and len(repr(samples).splitlines()) < 10


def test_real_results_print_what_was_measured():
    from lineament.explain import activation_patching

    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    found = activation_patching(
        net, torch.ones(2, 8), torch.zeros(2, 8), lambda y: y[:, 0], sites={"hidden": "[01]"}
    )
    assert "scores       hidden: (2, 1) float32" in repr(found), repr(found)
    odd = torch.full((9,), torch.nan)
    odd[0] = 1
    assert "(9,) float32, 1 to 1, mean 1; 8 not finite" in repr(dataclasses.replace(found, scores={"x": odd}))
