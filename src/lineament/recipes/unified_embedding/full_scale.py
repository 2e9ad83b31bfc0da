"""The paper's comparison on its own data: DCN-V2 on MovieLens 1M, Avazu or Criteo, one hashed look-up a feature, in separate tables or in one.

Sizes, splits, widths and budgets are those that the replication gives for its table 1. Features of ten values or fewer have rows of their own in every
scheme, outside the budget. Where there is a validation part, the test figure is that of the best of ten looks at it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checks import number, one_of
from lineament.data.click_logs import avazu, criteo
from lineament.data.movielens import movielens_1m
from lineament.data.samples import Samples
from lineament.modules.unified_embedding.table import UnifiedEmbedding
from lineament.recipes.kit.claims import Paired, judged, welch
from lineament.recipes.kit.stages import Stages
from lineament.recipes.unified_embedding.training import Score, auc, sizes_of
from lineament.report.outcome import Claim, Outcome, Table
from lineament.train.loop import Run, fit

SCHEMES = ("collisionless", "separate", "unified")
LABELS = ("without 3", "3 or more")
SMALL = 10
LOOKS = 10


@dataclass(frozen=True)
class Setting:
    """What the paper does on one data set; ``figures``: its AUC of separate and of one table, by fraction of the vocabulary."""

    read: Callable[[Any], Samples]
    width: int
    cross: int
    hidden: tuple[int, ...]
    batch: int
    steps: int
    figures: dict[float, tuple[float, float]]


SETTINGS = {
    "movielens-1m": Setting(
        lambda config: movielens_1m(config.data_folder, labels=config.labels), 30, 1, (192,), 128, 50_000,
        {1.0: (0.8537, 0.8774), 0.5: (0.8300, 0.8693), 0.1: (0.7707, 0.8200)},
    ),
    "avazu": Setting(
        lambda config: avazu(config.data_folder), 32, 1, (512, 512), 512, 300_000,
        {1.0: (0.7724, 0.7735), 0.1: (0.7671, 0.7718), 0.01: (0.7510, 0.7686)},
    ),
    "criteo": Setting(
        lambda config: criteo(config.data_folder), 39, 2, (748, 748), 512, 300_000,
        {1.0: (0.8021, 0.8043), 0.5: (0.7998, 0.8047), 0.1: (0.7944, 0.8049)},
    ),
}  # fmt: skip


class Cross(nn.Module):
    """DCN-V2's layer: x_0 * (W x + b) + x."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        return first * self.linear(x) + x


class DCN(nn.Module):
    """Embeddings (and dense features) joined, cross layers, then a perceptron; its tables by ``scheme``."""

    def __init__(
        self, scheme: str, sizes: list[int], rows: int, setting: Setting, *, dense: int = 0, seed: int = 0
    ):
        super().__init__()
        whole = sum(size for size in sizes if size > SMALL)
        names = [str(t) for t in range(len(sizes))]
        options: dict[str, Any] = {"chunk": setting.width, "seed": seed}
        if scheme == "separate":
            shares = [max(1, round(rows * size / max(whole, 1))) if size > SMALL else 1 for size in sizes]
            tables = [UnifiedEmbedding(share, **options) for share in shares]
        else:
            tables = [UnifiedEmbedding(1 if scheme == "collisionless" else rows, **options)]
        for t, size in enumerate(sizes):
            own = size if size <= SMALL or scheme == "collisionless" else 0
            tables[t if scheme == "separate" else 0].add(names[t], 1, collisionless_below=own)
        self.names, self.tables = names, nn.ModuleList(tables)
        joined = setting.width * len(sizes) + dense
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.cross = nn.ModuleList(Cross(joined) for _ in range(setting.cross))
            widths = (joined, *setting.hidden)
            layers = [m for a, b in zip(widths, setting.hidden) for m in (nn.Linear(a, b), nn.ReLU())]
            self.reader = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def forward(self, ids: Tensor, dense: Tensor | None = None) -> Tensor:
        columns = dict(zip(self.names, ids.long().unbind(1)))
        if len(self.tables) == 1:
            parts = [self.tables[0](columns)]
        else:
            parts = [table({name: columns[name]}) for name, table in zip(self.names, self.tables)]
        first = x = torch.cat(parts if dense is None else [*parts, dense], 1)
        for layer in self.cross:
            x = layer(x, first)
        return self.reader(x)[:, 0]


def parts_of(name: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Samples to train, to choose by, and to test: 80/10/10 (MovieLens), 90/0/10 (Avazu), or the last of seven days in halves (Criteo)."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    if name == "criteo":
        day = count * 6 // 7
        last = order[order >= day]
        return torch.arange(day), last[: len(last) // 2], last[len(last) // 2 :]
    train, test = count * (9 if name == "avazu" else 8) // 10, count * 9 // 10
    return order[:train], order[train:test], order[test:]


class Looks:
    """A training of so many steps in as many epochs as there are looks at ``chosen``: passes over ``fitted`` follow one another without a break, and the score on
    ``tested`` is kept of the look with the best AUC, or of the last one where nothing is there to choose by."""

    def __init__(
        self, data: Samples, parts: tuple[Tensor, Tensor, Tensor], steps: int, batch: int, seed: int
    ):
        self.data, self.batch, self.seed = data, batch, seed
        self.fitted, self.chosen, self.tested = parts
        count = min(LOOKS, steps) if len(self.chosen) else 1
        self.ends = [round(steps * k / count) for k in range(count + 1)]
        self.best, self.score = -1.0, Score(0.0, 0.0)

    def on_epoch(self, run: Run) -> None:
        count, (start, end) = len(self.fitted), (self.batch * at for at in self.ends[run.epoch :][:2])
        passes = range(start // count, -(-end // count))
        order = torch.cat([self._order(k) for k in passes])
        run.rows, run.shuffle = order[start - passes.start * count :][: end - start], False

    def _order(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + number)
        return self.fitted[torch.randperm(len(self.fitted), generator=generator)]

    def on_epoch_end(self, run: Run) -> None:
        value = self._scored(run, self.chosen).auc if len(self.chosen) else 0.0
        if value > self.best:
            self.best, self.score = value, self._scored(run, self.tested)

    @torch.no_grad()
    def _scored(self, run: Run, rows: Tensor) -> Score:
        inputs = inputs_of(self.data)
        z = torch.cat(
            [
                run.model(**{k: x[part].to(run.device) for k, x in inputs.items()}).cpu()
                for part in rows.split(8192)
            ]
        )
        targets = self.data.targets[rows]
        return Score(auc(z, targets), float(F.binary_cross_entropy_with_logits(z, targets.float())))

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best, **asdict(self.score)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.best, self.score = state["best"], Score(state["auc"], state["loss"])


def inputs_of(data: Samples) -> dict[str, Tensor]:
    """The arguments of :class:`DCN`."""
    return {"ids": data.inputs, **({"dense": data.others["dense"]} if "dense" in data.others else {})}


def train(scheme: str, fraction: float, data: Samples, config: Any, seed: int, stages: Stages) -> Score:
    """One network, trained with Adam; the test score where validation AUC was best, or the last one."""
    setting, sizes = SETTINGS[config.data], sizes_of(data)
    dense = data.others["dense"].shape[1] if "dense" in data.others else 0
    rows = max(1, round(fraction * sum(size for size in sizes if size > SMALL)))
    net = DCN(scheme, sizes, rows, setting, dense=dense, seed=seed)
    looks = Looks(data, parts_of(config.data, len(data)), config.steps or setting.steps, setting.batch, seed)
    fit(
        net.to("cuda" if torch.cuda.is_available() else "cpu"), (inputs_of(data), data.targets.float()), epochs=len(looks.ends) - 1, batch_size=setting.batch,
        optimizer=lambda net: torch.optim.Adam(net.parameters(), config.rate), loss=F.binary_cross_entropy_with_logits, callbacks=[looks], seed=seed,
        checkpoint=stages.checkpoint, name=f"{scheme}, {fraction:g}, seed {seed}, training",
    )  # fmt: skip
    return looks.score


def claims_of(scores: dict[tuple[str, float], list[Score]], setting: Setting) -> list[Claim]:
    """One table against separate ones at each budget: higher by more than two standard errors of the pairs, and by Welch's t-test at 5 %."""
    claims = []
    for fraction in sorted({f for _, f in scores}, reverse=True):
        both = [scores.get((scheme, fraction)) for scheme in ("unified", "separate")]
        if not (both[0] and both[1]):
            continue
        ours, theirs = ([score.auc for score in each or []] for each in both)
        pairs, p, known = Paired.of(ours, theirs), welch(ours, theirs), setting.figures.get(fraction)
        claims.append(
            judged(
                f"One table beats separate ones of as many rows at {fraction:g} of the vocabulary",
                f"{known[1]:.4f} against {known[0]:.4f}" if known else "not given",
                f"{statistics.mean(ours):.4f} against {statistics.mean(theirs):.4f}: {pairs}; Welch's t-test p = {p:.2g}",
                pairs.above and p < 0.05,
                "it is lower" if pairs.below else "not resolved with these seeds",
            )
        )
    return claims


def at_full_scale(config: Any, out: Path, slug: str, title: str) -> Outcome:
    """Every scheme at every budget; a killed run goes on from its last look."""
    for name in config.schemes:
        one_of("schemes", name, SCHEMES)
    number("seeds", config.seeds, low=1, integer=True)
    number("rate", config.rate, low=0, open_low=True)
    if config.steps is not None:
        number("steps", config.steps, low=1, integer=True)
    setting = SETTINGS[config.data]
    fractions = config.fractions or tuple(setting.figures)
    for fraction in fractions:
        number("fractions", fraction, low=0, open_low=True)
    data, stages = setting.read(config), Stages(out, config)
    scores: dict[tuple[str, float], list[Score]] = {}
    for scheme in config.schemes:
        for f in (1.0,) if scheme == "collisionless" else fractions:
            label = f"{scheme}, {f:g}, seed {{}}"
            each = stages.each(
                label,
                range(config.seeds),
                lambda s, n=scheme, f=f: train(n, f, data, config, s, stages),
                Score,
                jobs=None,
            )
            scores[scheme, f] = list(each.values())
    rows = [
        [
            scheme,
            None if scheme == "collisionless" else f,
            statistics.mean(s.auc for s in each),
            statistics.stdev(s.auc for s in each) if len(each) > 1 else None,
            statistics.mean(s.loss for s in each),
        ]
        for (scheme, f), each in scores.items()
    ]
    table = Table(
        f"{data.source}, {len(data):,} samples, {sum(sizes_of(data)):,} values ({'; '.join(data.notes)}): DCN-V2 on the test samples",
        ["scheme", "rows / vocabulary", "AUC", "sd", "log-loss"],
        rows,
    )
    return Outcome(slug, title, config.preset, asdict(config), claims_of(scores, setting), [table])
