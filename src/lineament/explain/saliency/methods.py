"""The saliency methods as settings of one family: what is extracted at a place, how it is aggregated over channels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lineament.core import checks
from lineament.explain.saliency.aggregation import AGGREGATES, EXTRACTS, Window


@dataclass(frozen=True)
class Method:
    """A saliency method: how contributions are extracted and aggregated, and what is special about it."""

    extract: str  # "" for a method of its own
    aggregate: str
    kernel: int = 1  # N of the virtual N x N convolution
    rule: str = ""  # how the signal flows backwards: "", "guided", "deconvnet", "excitation", "contrastive"
    pooled: bool = False  # the gradient is replaced by its mean over the map
    rectified: bool = False  # the map keeps its positive part


METHODS: dict[str, Method] = {
    "gradient": Method("bias", "max_abs"),
    "gradient_sum": Method("bias", "sum"),
    "linear_approx": Method("scaling", "sum"),
    "cam": Method("", ""),
    "grad_cam": Method("scaling", "sum", pooled=True, rectified=True),
    "norm_grad": Method("conv", "norm"),
    "norm_grad_3x3": Method("conv", "norm", kernel=3),
    "norm_grad_selective": Method("scaling", "filter_norm"),
    "norm_grad_proper": Method("proper", "norm"),
    "guided_backprop": Method("bias", "max_abs", rule="guided"),
    "guided_backprop_sum": Method("bias", "sum", rule="guided"),
    "deconvnet": Method("bias", "max_abs", rule="deconvnet"),
    "excitation_backprop": Method("bias", "sum", rule="excitation"),
    "contrastive_excitation_backprop": Method("bias", "sum", rule="contrastive", rectified=True),
    "integrated_gradients": Method("", ""),
    "center": Method("", ""),
    "random": Method("", ""),
}


def settings_of(
    method: str | Sequence[str], extract: str | None, aggregate: str | None, kernel: int | None
) -> dict[str, Method]:
    """{name: method} of what was asked for by name, or by the two phases."""
    names = [method] if isinstance(method, str) else list(method)
    checks.require(len(names) > 0, "method: got none, expected at least one")
    settings = {name: _named(name) for name in names}
    if extract is not None or aggregate is not None:
        checks.require(
            names == ["norm_grad"],
            f"extract and aggregate: they choose the phases instead of method={method!r}; give one",
        )
        checks.require(
            extract is not None and aggregate is not None,
            f"extract and aggregate: got {extract!r} and {aggregate!r}, expected both",
        )
        size = re.fullmatch(r"conv(\d+)x\1(_depthwise)?", str(extract))
        if size:
            extract, kernel = "depthwise" if size[2] else "conv", kernel or int(size[1])
        checks.one_of("extract", extract, (*EXTRACTS, "proper", "conv3x3", "conv3x3_depthwise"))
        checks.one_of("aggregate", aggregate, AGGREGATES)
        settings = {"norm_grad": Method(str(extract), str(aggregate))}
    if kernel is not None:
        Window.square(kernel)
        settings = {name: replace(m, kernel=kernel) for name, m in settings.items()}
    return settings


def _named(name: Any) -> Method:
    size = re.fullmatch(r"norm_grad_(\d+)x\1", str(name))
    if size:
        Window.square(int(size[1]))
        return Method("conv", "norm", kernel=int(size[1]))
    return METHODS[checks.one_of("method", name, METHODS)]
