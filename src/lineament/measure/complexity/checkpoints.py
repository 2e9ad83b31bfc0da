"""When in training does a feature become readable, and how do features change?

Fel et al. (NeurIPS 2024, arXiv 2407.06076, section 5): the temporal decoding score Λ(z) = 1 - (1/E) Σ_e I_V(f^(e)(x) -> z) reads the final network's
features from the same site of E checkpoints; a low score says that the feature could be read early. The final checkpoint's read-out at the last site is also
in the complexity K, so that K and Λ share a term: compare them without it as well (:meth:`without`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core import checks, results
from lineament.core.batching import progress
from lineament.core.checks import require
from lineament.core.models import called, frozen, holding
from lineament.core.results import Readable
from lineament.core.sites.activations import capture
from lineament.core.sites.depth import tokens_of
from lineament.measure.complexity.features import Features, Look, Reading, site_of
from lineament.measure.complexity.importance import Importance, importance
from lineament.measure.complexity.layers import complexity
from lineament.measure.complexity.readouts import ReadoutMoments
from lineament.measure.complexity.vinformation import Complexity, Residuals, kinds


def without(result: Complexity, *sites: str) -> Float[Tensor, " features"]:
    """The unclipped complexity, or temporal score, over the other sites or checkpoints only.

    >>> from lineament.measure.complexity.vinformation import vinformation
    >>> x = torch.arange(6.0)[:, None]
    >>> without(vinformation({"a": x, "b": x.square()}, x, ridge=0.0), "b").abs().round(decimals=6).tolist()
    [0.0]
    """
    for site in sites:
        require(
            site in result.sites,
            f"sites: got {site!r}, which was not read{checks.suggest(site, result.sites)}",
        )
    left = [number for number, site in enumerate(result.sites) if site not in sites]
    require(bool(left), "sites: none would be left")
    return 1 - result.information[left].mean(0)


def temporal_score(
    model: nn.Module,
    checkpoints: Sequence[Any] | Mapping[str, Any],
    data: Any,
    features: Features,
    *,
    site: str | None = None,
    ridge: float = 1e-3,
    pool: int | str = 1,
    rows: str | None = None,
    heldout: Any = 0.2,
    seed: int = 0,
    variance: str = "fixed",
    form: str = "ratio",
) -> Complexity:
    """How late in training each feature of the final network becomes linearly readable: Λ = 1 - mean over checkpoints of I_V.

    Args:
        model: the final network, which the features come from.
        checkpoints: of the same network, in the order of training: state dicts, networks, or files; a mapping gives them names.
        data, features, ridge, pool, rows, heldout, seed, variance, form: as for :func:`~lineament.measure.complexity.layers.complexity`.
        site: where checkpoints are read; by default the features' own site.

    Returns:
        :class:`~lineament.measure.complexity.vinformation.Complexity` whose ``sites`` are the checkpoints and whose ``complexity`` is Λ.

    Raises:
        InputError: no checkpoint, one that does not fit the network, features without a site where none is given.

    >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> found = temporal_score(net, [net.state_dict()], (x, torch.zeros(200)), "1", site="2:in")
    >>> found.sites, bool(found.complexity.max() < 0.01)
    (('checkpoint 0',), True)
    """
    kinds(variance, form)
    named = by_name(checkpoints)
    place = site or site_of(model, features)
    require(
        place is not None,
        "site: the features have none of their own; name the site where the checkpoints are read",
    )
    reading = Reading(
        model, data, features, sites=str(place), pool=pool, rows=rows, heldout=heldout, seed=seed
    )
    require(len(reading.sites) == 1, f"site: {site!r} names {len(reading.sites)} sites, expected one")
    states = {name: weights_of(model, value, name) for name, value in named.items()}
    moments = ReadoutMoments()
    for look in _walk(reading, states, "train"):
        moments.update(look.activations, look.z)
    require(moments.count > 0, "data: got no samples to fit the read-outs on, expected some")
    residuals = Residuals(moments.readouts(ridge))
    for look in _walk(reading, states, "heldout"):
        residuals.update(look.activations, look.z, look.samples)
    found = residuals.compute(variance=variance, form=form)[0]
    return replace(found, rows=reading.rows, pool=reading.pool)


def by_name(checkpoints: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    """Checkpoints by their names, numbered where they have none."""
    several = isinstance(checkpoints, Mapping) and not any(
        isinstance(v, Tensor) for v in checkpoints.values()
    )
    if several:
        found = dict(checkpoints)  # pyright: ignore[reportArgumentType]
    else:
        require(
            isinstance(checkpoints, (list, tuple)),
            f"checkpoints: got {checks.show(checkpoints)}, expected a list or a mapping of state dicts, networks or files",
        )
        found = {f"checkpoint {number}": value for number, value in enumerate(checkpoints)}
    require(bool(found), "checkpoints: got none, expected at least one")
    return found


def weights_of(model: nn.Module, checkpoint: Any, name: str) -> dict[str, Tensor]:
    """Parameters and buffers of a checkpoint, which must be the model's own by name and shape."""
    if isinstance(checkpoint, (str, Path)):
        from lineament.load.checkpoints import read_checkpoint
        from lineament.load.weight_names import weights_for

        path = Path(checkpoint)
        checkpoint = weights_for(model.state_dict(), read_checkpoint(path), path.name, type(model).__name__)[
            0
        ]
    state = checkpoint.state_dict() if isinstance(checkpoint, nn.Module) else checkpoint
    require(
        isinstance(state, Mapping),
        f"checkpoints: {name!r} is {checks.show(checkpoint)}, expected a state dict, a network or a file",
    )
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    require(
        not missing,
        f"checkpoints: {name!r} lacks {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}; expected the weights of the model",
    )
    wrong = [key for key, value in own.items() if state[key].shape != value.shape]
    require(
        not wrong,
        f"checkpoints: {name!r} has {wrong and tuple(state[wrong[0]].shape)} for {wrong and wrong[0]}, expected {wrong and tuple(own[wrong[0]].shape)}",
    )
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {key: state[key].to(held[key]) for key in own if key in held}


def _walk(reading: Reading, states: Mapping[str, Mapping[str, Tensor]], part: str) -> Iterator[Look]:
    """The rows of each batch: features of the model, activations of every checkpoint."""
    site = reading.sites[0]
    for look in reading.walk(part, "checkpoints"):
        found: dict[str, Tensor] = {}
        with frozen(reading.model, requires_grad=None), torch.no_grad():
            for name, state in states.items():
                with holding(reading.model, state), capture(reading.model, site, stop_early=True) as acts:
                    called(reading.model, look.inputs)
                found[name] = look.form(site, tokens_of(reading.model, site, acts[site]))
        yield replace(look, activations=found)


@dataclass(frozen=True)
class Dynamics(Readable):
    """Features that were extracted anew at each checkpoint.

    Attributes:
        names: of the checkpoints, in the order of training.
        complexity, importance: of the features of each checkpoint; their numbers do not name the same feature in two of them.
        mean, mean_errors: mean complexity and its standard error over features.
        top: mean complexity of the most important features (``share`` of them).
        correlation: Spearman's, of complexity with importance.
    """

    names: tuple[str, ...]
    complexity: tuple[Complexity, ...]
    importance: tuple[Importance, ...]
    mean: Float[Tensor, " checkpoints"]
    mean_errors: Float[Tensor, " checkpoints"]
    top: Float[Tensor, " checkpoints"]
    correlation: Float[Tensor, " checkpoints"]
    share: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {name: results.plain(value) for name, value in vars(self).items()}

    def plot(self, ax: Any = None) -> Any:
        """Mean complexity of all features and of the most important ones from checkpoint to checkpoint."""
        ax = results.axes(ax)
        places = range(len(self.names))
        ax.errorbar(places, self.mean, yerr=self.mean_errors, fmt="o-", label="all features")
        ax.plot(places, self.top, "s--", label=f"the {self.share:.0%} most important")
        ax.set_xticks(places, self.names, rotation=30, ha="right", parse_math=False)
        ax.set_ylabel("mean complexity")
        ax.legend()
        return ax


def training_dynamics(
    model: nn.Module,
    checkpoints: Sequence[Any] | Mapping[str, Any],
    data: Any,
    extract: Callable[[nn.Module], Any],
    *,
    sites: Any = None,
    share: float = 0.01,
    ridge: float = 1e-3,
    pool: int | str = 1,
    seed: int = 0,
) -> Dynamics:
    """Complexity and importance of features that ``extract(model)`` finds anew in each checkpoint.

    Args:
        extract: a function of the network with the checkpoint's weights that returns a dictionary.
        share: of the features that count as the most important (at least one).
        model, checkpoints, data, sites, ridge, pool, seed: as for :func:`temporal_score`.

    >>> from types import SimpleNamespace
    >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> units = SimpleNamespace(site="2:in", atoms=torch.eye(6), encode=lambda x: x, decode=lambda z: z)
    >>> training_dynamics(net, [net.state_dict()], (x, torch.zeros(200)), lambda net: units, sites="1").mean.shape
    torch.Size([1])
    """
    checks.number("share", share, low=0, high=1, open_low=True)
    states = {name: weights_of(model, value, name) for name, value in by_name(checkpoints).items()}
    found: list[Complexity] = []
    weights: list[Importance] = []
    for state in progress(list(states.values()), "training dynamics"):
        with _weights(model, state):
            dictionary = extract(model)
            found.append(complexity(model, data, dictionary, sites=sites, ridge=ridge, pool=pool, seed=seed))
            weights.append(importance(model, data, dictionary))
    top = [
        c.complexity[w.order[: max(1, round(share * len(w.values)))].to(c.complexity.device)].nanmean()
        for c, w in zip(found, weights)
    ]
    known = [c.complexity[~c.constant] for c in found]
    return Dynamics(
        names=tuple(states),
        complexity=tuple(found),
        importance=tuple(weights),
        mean=torch.stack([k.mean() for k in known]),
        mean_errors=torch.stack([k.std() / len(k) ** 0.5 for k in known]),
        top=torch.stack(top),
        correlation=torch.tensor([spearman(c.complexity, w.values) for c, w in zip(found, weights)]),
        share=share,
    )


@contextmanager
def _weights(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    with holding(model, state):
        yield


def spearman(a: Float[Tensor, " features"], b: Float[Tensor, " features"]) -> float:
    """Spearman's rank correlation over the features where both are known; NaN for fewer than three.

    >>> spearman(torch.tensor([1.0, 2.0, 3.0, float("nan")]), torch.tensor([1.0, 4.0, 9.0, 0.0]))
    1.0
    """
    from scipy.stats import spearmanr

    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    known = ~(a.isnan() | b.isnan())
    if int(known.sum()) < 3 or float(a[known].std()) == 0 or float(b[known].std()) == 0:
        return float("nan")
    return float(spearmanr(a[known].numpy(), b[known].numpy()).statistic)  # pyright: ignore[reportAttributeAccessIssue]
