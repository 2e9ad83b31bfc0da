"""The saliency methods as settings of one family: what is extracted at a site, and how it is aggregated over channels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lineament.core import checks
from lineament.explain.saliency.aggregation import AGGREGATES, EXTRACTS, Window


@dataclass(frozen=True)
class Method:
    """A saliency method: how contributions are extracted and aggregated, and what is special about it.

    Attributes:
        extract: ``"bias"``, ``"scaling"``, ``"conv"``, ``"depthwise"``, ``"proper"`` (the real convolution at the site), the paper's
            ``"conv3x3"`` and ``"conv3x3_depthwise"`` (any odd size), or ``""`` for a method of its own.
        aggregate: ``"sum"``, ``"norm"``, ``"filter_norm"``, ``"max"`` or ``"max_abs"``.
        kernel: N of the virtual N x N convolution.
        rule: how the signal flows backwards: ``""``, ``"guided"``, ``"deconvnet"``, ``"excitation"``, ``"contrastive"``.
        pooled: the gradient is replaced by its mean over the map.
        rectified: the map keeps its positive part.

    >>> Method("conv3x3_depthwise", "norm").kernel
    3
    """

    extract: str
    aggregate: str
    kernel: int = 1
    rule: str = ""
    pooled: bool = False
    rectified: bool = False

    def __post_init__(self) -> None:
        size = re.fullmatch(r"conv(\d+)x\1(_depthwise)?", str(self.extract))
        if size:
            object.__setattr__(self, "extract", "depthwise" if size[2] else "conv")
            object.__setattr__(self, "kernel", int(size[1]))
        Window.square(self.kernel)
        if self.extract != "":
            checks.one_of("extract", self.extract, (*EXTRACTS, "proper", "conv3x3", "conv3x3_depthwise"))
            checks.one_of("aggregate", self.aggregate, AGGREGATES)


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


def settings_of(method: str | Method | Sequence[str | Method]) -> dict[str | Method, Method]:
    """{what was asked for: its settings}; ``"norm_grad_5x5"`` and the like are names too.

    >>> settings_of("norm_grad_5x5")["norm_grad_5x5"].kernel
    5
    """
    asked = [method] if isinstance(method, (str, Method)) else list(method)
    checks.require(len(asked) > 0, "method: got none, expected at least one")
    found: dict[str | Method, Method] = {}
    for name in asked:
        size = re.fullmatch(r"norm_grad_(\d+)x\1", str(name))
        if isinstance(name, Method):
            found[name] = name
        elif size:
            found[name] = Method("conv", "norm", kernel=int(size[1]))
        else:
            found[name] = METHODS[checks.one_of("method", name, METHODS)]
    return found
