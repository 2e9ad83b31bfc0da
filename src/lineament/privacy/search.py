"""How an attacker looks: one record for all attacks, which are presets of the same search.

Fang et al. 2023, arXiv 2308.04699, section 1.5: deep leakage with labels of its own or with those read off first (DLG, iDLG), inverting gradients (IG), GradInversion (GI), generative gradient leakage (GGL), and inversion with
an alternative space (GIAS) beside GIFD and its ablations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lineament.core.checks import number, one_of, require
from lineament.privacy.costs import COSTS, WEIGHTS, index_set
from lineament.privacy.inversion import OPTIMIZERS

ATTACKS = (
    "gifd",
    "no ball",
    "no regulariser",
    "one layer",
    "latent",
    "gias",
    "ggl",
    "ig",
    "gi",
    "idlg",
    "dlg",
    "closed form",
)
ON_PIXELS = ("ig", "gi", "idlg", "dlg", "closed form")


@dataclass(frozen=True)
class Search:
    """How an attacker looks.

    Attributes:
        steps: of each layer. Attacks without layers take as many in all.
        rate, feature_rate: peak learning rates of codes (or pixels) and of features. weight_rate: of a generator's weights (GIAS).
        layers: features that are searched behind the code; by default all inputs of later blocks.
        layer: the one whose features alone are searched behind the code ("one layer"), 1 the first; by default the middle one of ``layers``.
        radius: of each layer's l1 ball for each entry, None for no ball.
        restarts: from other codes; the best score is kept.
        radii: of the balls of layers 1, 2, ... themselves, in place of ``radius`` times their entries; the last one holds for all further layers.
        cost, ratio, weights: see :func:`lineament.privacy.matching_cost`. tensors: which tensors of a message count, ``"all"``, or one of ``"first"``, ``"last"``,
            ``"topk"`` (of largest norm) and ``"random"`` with their number, as in ``"topk 4"``. variation, norm: weights of what keeps pictures natural.
        divergence: weight of the divergence of codes from a standard normal, deviation: of the first codes that are drawn (GGL).
        group: weight of the distance from the mean of the restarts. statistics: weight of the distance from the batch norms' statistics, where they were sent.
        optimizer: ``"adam"``; ``"sgd"``, with Nesterov's momentum of 0.9; or ``"lbfgs"``, which searches each message and restart by itself.
        chunk: pictures of a message that are differentiated at a time, for the memory of so many in place of all; a gradient more is then computed. Of messages that
            are gradients, by networks in which pictures do not meet.
        patience: end when the score of every row rose over so many layers in a row.

    >>> Search().restarts
    2
    """

    steps: int = 150
    rate: float = 0.1
    feature_rate: float = 0.03
    weight_rate: float = 1e-3
    layers: int | None = None
    layer: int | None = None
    radius: float | None = 0.04
    radii: tuple[float, ...] = ()
    restarts: int = 2
    cost: str = "sim"
    ratio: float = 0.0
    weights: str = "equal"
    tensors: str = "all"
    variation: float = 1e-3
    norm: float = 0.0
    divergence: float = 0.1
    deviation: float = 1.0
    group: float = 0.0
    statistics: float = 0.01
    optimizer: str = "adam"
    chunk: int | None = None
    patience: int | None = 2

    def __post_init__(self) -> None:
        for name in ("steps", "restarts"):
            number(name, getattr(self, name), low=1, integer=True)
        for name in ("rate", "feature_rate", "weight_rate", "deviation"):
            number(name, getattr(self, name), low=0, open_low=True)
        for name in ("variation", "norm", "divergence", "group", "statistics"):
            number(name, getattr(self, name), low=0)
        for name, radii in (("radius", [self.radius] * (self.radius is not None)), ("radii", self.radii)):
            for radius in radii:
                require(radius != 0, f"{name}: got 0, with which nothing moves; expected a positive number, or radius=None for no ball")  # fmt: skip
                number(name, radius, low=0, open_low=True)
        one_of("cost", self.cost, COSTS)
        one_of("weights", self.weights, WEIGHTS)
        index_set(self.tensors)
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        if self.layers is not None:
            number("layers", self.layers, low=0, integer=True)
        if self.layer is not None:
            number("layer", self.layer, low=1, integer=True)
        if self.chunk is not None:
            number("chunk", self.chunk, low=1, integer=True)
        if self.patience is not None:
            number("patience", self.patience, low=1, integer=True)

    def preset(self, attack: str, layers: int) -> Search:
        """The search of one attack; what has no layers takes the steps of all."""
        own = replace(self, layer=None)
        whole = replace(own, layers=0, steps=self.steps * (1 + layers))
        half = max(1, whole.steps // 2)
        one = whole
        if attack == "one layer" and layers > 0:
            at = number("layer", self.layer or (layers + 1) // 2, low=1, high=layers, integer=True)
            one = replace(self, layer=at, steps=half)
        return {
            "gifd": own,
            "no ball": replace(own, radius=None, radii=()),
            "no regulariser": replace(own, variation=0.0, norm=0.0),
            "one layer": one,
            "latent": whole,
            "gias": replace(whole, steps=half),
            "ggl": replace(whole, cost="l2", variation=0.0, norm=0.0, group=0.0),
            "ig": replace(whole, cost="sim", variation=1e-4, norm=0.0, group=0.0),
            "gi": replace(whole, cost="l2", variation=1e-4, norm=1e-6, group=1e-2),
            "idlg": replace(whole, cost="l2", variation=0.0, norm=0.0, group=0.0),
            "dlg": replace(whole, cost="l2", variation=0.0, norm=0.0, group=0.0),
            "closed form": whole,
        }[attack]
