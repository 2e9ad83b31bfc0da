"""One file per lens: ``TITLE``, ``METHOD``, ``applies(subject)`` (the reason why not, or "") and ``look(subject) -> Section``."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

# In the order of the report; the text is for `lineament audit --help`.
LENSES = {
    "accuracy": "how often it is right, by class and group, and whether its confidence can be trusted",
    "gaze": "where it looks, and whether it relies on one fixed place of the image",
    "collapse": "how far its features have collapsed to one point per class, layer by layer",
    "spectrum": "how many directions its features use, layer by layer",
    "landscape": "what the loss looks like around its weights, and whether that is a settled minimum",
    "parts": "which channels can be silenced, at what cost",
    "tokens": "which words of a prompt decide what a language model says next",
    "components": "which layers and heads of a language model carry a behaviour",
}
# Earlier names, which the command still takes.
ALIASES = {"sharpness": "landscape"}
# What each of them looks at: a language model and prompts; the others look at a network and labelled samples.
LANGUAGE = ("tokens", "components")


def lens(name: str) -> ModuleType:
    """The module of a lens."""
    return import_module(f"lineament.audit.lenses.{name}")
