"""What a training leaves behind: its options, a line for each epoch, and how good it became; the numbers of `train.json`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lineament.cli.loss_options import LOSSES
from lineament.cli.train_options import Options
from lineament.core.checks import InputError, one_of

# Of an embedding, on the classes held out: TAR at FAR 1e-2 and 1e-3, R@1, mAP@R, the smallest genuine less the largest impostor score,
# how many pairs of two classes there are, and their mean cosine.
RECOGNITION = (
    *("validation_tar2", "validation_tar3", "validation_recall", "validation_precision"),
    *("validation_gap", "validation_impostors", "validation_unlike"),
)
# An embedding crowds where the mean cosine of two classes is above this.
CROWDED = 0.9


def far_words(entry: dict[str, Any]) -> str:
    """At which rate of false accepts the TAR of an epoch is: below one pair in all, none is allowed.

    >>> far_words({"validation_impostors": 5000}), far_words({"validation_impostors": 384})
    ('at FAR 1e-3', 'with no false accept among 384 pairs')
    """
    pairs = entry["validation_impostors"]
    return "at FAR 1e-3" if pairs >= 1000 else f"with no false accept among {pairs:,.0f} pairs"


@dataclass(frozen=True)
class Fitted:
    """A training that is done.

    ``history`` has for each epoch: ``epoch`` (from 1), ``lr`` at its start, ``train_loss`` and ``train_accuracy`` of the batches as they were seen,
    ``validation_loss`` and ``validation_accuracy`` after it (``None`` without validation), ``skipped`` steps, ``seconds``. ``early`` says what USEFUL found:
    the separating ``epoch``, the training ``errors`` until then, how many ``slow`` examples, ``slow_by_class``, ``seconds``.
    Of an embedding the history has no accuracies but what :data:`RECOGNITION` names, and ``trained`` is everything that
    was trained, with the loss and the head. ``held_out``: the labels of the classes held out; ``before``: how well those
    were recognised before the training.
    """

    options: Options
    history: tuple[dict[str, Any], ...]
    samples: int
    validation_samples: int
    early: dict[str, Any] | None = None
    tract_layer: str | None = None
    processes: int = 1
    device: str = "cpu"
    held_out: tuple[int, ...] = ()
    before: dict[str, Any] | None = None
    trained: Any = field(default=None, compare=False, repr=False)

    @property
    def last(self) -> float | None:
        """The validation accuracy of the weights that are kept, those of the last epoch."""
        return self.history[-1]["validation_accuracy"]

    @property
    def best(self) -> float | None:
        """The best validation accuracy of any epoch: an optimistic figure, chosen on the data it is measured on."""
        found = [e["validation_accuracy"] for e in self.history if e["validation_accuracy"] is not None]
        return max(found) if found else None

    @property
    def recognised(self) -> tuple[float | None, float | None]:
        """TAR at FAR 1e-3 and R@1 on the classes held out, of the weights that are kept."""
        entry = self.history[-1]
        return entry.get("validation_tar3"), entry.get("validation_recall")

    @property
    def unlike(self) -> float | None:
        """The mean cosine of two samples of different classes that were held out, of the weights that are kept."""
        return self.history[-1].get("validation_unlike")

    @property
    def crowds(self) -> bool:
        """Whether an embedding of class directions ended with all classes in one narrow cone."""
        loss = self.options.embedding
        return loss is not None and LOSSES[loss.loss] == "classes" and (self.unlike or 0.0) > CROWDED

    @property
    def seconds(self) -> float:
        """Time in training and validation, over all runs it took, with USEFUL's early stage."""
        return sum(e["seconds"] for e in self.history) + (self.early["seconds"] if self.early else 0.0)

    def words(self) -> str:
        """The options besides the optimizer, as a table shows them."""
        o = self.options
        found = [f"lr {o.lr:g}", f"momentum {o.momentum:g}" if o.momentum is not None else ""]
        found += [f"decay {o.weight_decay:g}" if o.weight_decay else "", o.schedule]
        found += [f"{o.epochs} epochs of batches of {o.batch_size}", f"seed {o.seed}"]
        found += [f"{name} {getattr(o, name):g}" for name in ("sam", "asam", "tract", "multiplex") if getattr(o, name) is not None]  # fmt: skip
        if self.early is not None:
            found.append(
                f"useful (epoch {self.early['epoch']}, {self.early['slow'] / self.samples:.0%} twice)"
            )
        if o.embedding is not None:
            found = [o.embedding.words(), *found]
        return ", ".join(word for word in found if word)

    def plot(self, ax: Any = None, what: str = "loss") -> Any:
        """The learning curves of the ``"loss"``, the ``"accuracy"``, or of an embedding the ``"tar3"`` (TAR at FAR 1e-3)."""
        one_of("what", what, ("loss", "accuracy", "tar3"))
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        for name, colour in (("train", "C0"), ("validation", "C1")):
            values = [e.get(f"{name}_{what}") for e in self.history]
            if all(v is not None for v in values):
                marker = "o-" if len(values) <= 30 else "-"
                ax.plot([e["epoch"] for e in self.history], values, marker, color=colour, label=name)
        ax.set(xlabel="epoch", ylabel={"tar3": "TAR at FAR 1e-3"}.get(what, what))
        if ax.lines:
            ax.legend()
        return ax

    def to_dict(self) -> dict[str, Any]:
        return {
            "options": self.options.to_dict(),
            "samples": self.samples,
            "validation_samples": self.validation_samples,
            "best": self.best,
            "last": self.last,
            "seconds": self.seconds,
            "early": self.early,
            "tract_layer": self.tract_layer,
            "processes": self.processes,
            "device": self.device,
            **(
                {}
                if self.options.embedding is None
                else {"held_out": list(self.held_out), "before": self.before, "crowds": self.crowds}
            ),
            "history": list(self.history),
        }

    @classmethod
    def read(cls, path: str | Path) -> Fitted:
        """Read `train.json` (untrusted: only the documented fields are taken, and numbers must be numbers).

        Raises:
            InputError: not a file that ``lineament train`` wrote.
        """
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            found = cls(
                options=Options.read(raw["options"]),
                history=tuple(_entry(e) for e in raw["history"]),
                samples=int(raw["samples"]),
                validation_samples=int(raw["validation_samples"]),
                early=None
                if raw.get("early") is None
                else {
                    **raw["early"],
                    "epoch": int(raw["early"]["epoch"]),
                    "slow": int(raw["early"]["slow"]),
                    "seconds": float(raw["early"]["seconds"]),
                },
                tract_layer=None if raw.get("tract_layer") is None else str(raw["tract_layer"]),
                processes=int(raw.get("processes", 1)),
                device=str(raw.get("device", "")),
                held_out=tuple(map(int, raw.get("held_out", ()))),
                before=None
                if raw.get("before") is None
                else {n: _number(raw["before"][n]) for n in RECOGNITION if n in raw["before"]},
            )
            if not found.history or found.samples < 1:
                raise ValueError("no epochs")
            return found
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{str(path)!r} is no train.json of lineament train ({type(error).__name__}: {error})"
            ) from error


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _entry(raw: dict[str, Any]) -> dict[str, Any]:
    names = ("lr", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "seconds")
    found: dict[str, Any] = {"epoch": int(raw["epoch"])}
    names += tuple(name for name in RECOGNITION if name in raw)
    found |= {n: None if raw[n] is None else float(raw[n]) for n in names}
    if not all(v is None or math.isfinite(v) for v in found.values()):
        raise ValueError("a number that is not finite")
    return {**found, "skipped": int(raw.get("skipped", 0))}
