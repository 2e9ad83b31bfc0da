"""What a training leaves in its folder: the log while it runs, then the weights, the curves and `train.json`, which comes last."""

from __future__ import annotations

import argparse
import csv
import io
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lineament.cli.train_result import Fitted, far_words
from lineament.core.files import atomic_write, write_json, write_text
from lineament.load.loaded import Loaded
from lineament.report import figures
from lineament.report.outcome import versions
from lineament.report.text import duration, printable

BOARD = "tensorboard"
FILES = (
    *("model.safetensors", "train.json", "history.csv", "learning-curve.svg", "learning-curve-dark.svg"),
    *("network.py", "head.safetensors", "scores.csv", "scores.svg", "scores-dark.svg"),
)


class Log:
    """The history as it grows: TensorBoard's event files where it is installed, else `history.csv`."""

    def __init__(self, folder: Path, note: Callable[[str], None]):
        self.folder, self.writer = folder, None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.make: Any = None
            note("tensorboard is not installed: the log is history.csv instead of event files")
        else:
            self.make = SummaryWriter

    def __call__(self, history: list[dict[str, Any]]) -> None:
        if self.make is None:
            text = io.StringIO()
            rows = csv.DictWriter(text, list(history[-1]), lineterminator="\n")
            rows.writeheader()
            rows.writerows(history)
            write_text(self.folder / "history.csv", text.getvalue())
            return
        entry = history[-1]
        if self.writer is None:
            # What a killed run logged of this epoch and later ones does not count.
            self.writer = self.make(str(self.folder / BOARD), purge_step=entry["epoch"])
        for name, value in entry.items():
            if value is not None and name != "epoch":
                part, _, what = name.rpartition("_")
                self.writer.add_scalar(f"{what}/{part}" if part else name, value, entry["epoch"])
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    @property
    def place(self) -> str:
        return "history.csv" if self.make is None else f"{BOARD}/ (tensorboard --logdir)"


# The audit opens weights in the network that a factory makes.
_FACTORY = """# The network of this run: its embeddings are views of one shared table.
from lineament.load.models import load_model
from lineament.modules import multiplex


def make():
    network = load_model({model!r}).model
    multiplex(network, fraction={fraction!r}, seed={seed!r})
    return network
"""


def write(folder: Path, fitted: Fitted, loaded: Loaded, asked: dict[str, Any]) -> None:
    from safetensors.torch import save_model

    (folder / "train.json").unlink(missing_ok=True)
    with atomic_write(folder / "model.safetensors") as temporary:
        save_model(loaded.model, str(temporary))
    if fitted.trained is not None:
        _write_loss(folder, fitted.trained)
    o = fitted.options
    if o.multiplex is not None:
        place, _, name = asked["model"].rpartition(":")
        place = str(Path(place).resolve()) if place.endswith(".py") else place
        made = _FACTORY.format(model=f"{place}:{name}", fraction=o.multiplex, seed=o.seed)
        write_text(folder / "network.py", made)
    figures.save(_curves(fitted), folder, "learning-curve")
    value = {"model": asked["model"], "data": asked["data"], **fitted.to_dict(), "asked": asked}
    write_json(folder / "train.json", {**value, "versions": _versions()})


def _write_loss(folder: Path, trained: Any) -> None:
    """What an embedding was trained through: the class directions, the head, the queue; and the scores of a contrastive loss."""
    from safetensors.torch import save_file

    tensors = {
        f"{part}.{name}": value.detach().cpu().contiguous()
        for part in ("loss", "head")
        for name, value in getattr(trained, part).state_dict().items()
        if not name.endswith("_extra_state")
    }
    with atomic_write(folder / "head.safetensors") as temporary:
        save_file(tensors, str(temporary))
    log = getattr(trained.loss, "log", None)
    if log is None:
        return
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(log.curves)
    rows.writerows(zip(*log.curves.values()))
    write_text(folder / "scores.csv", text.getvalue())
    said = ", ".join(
        f"{name.replace('_mean', '')} {log.curves[name][-1]:.2f}"
        for name in ("positive_mean", "negative_mean")
    )
    drawn = figures.picture(
        log.plot, alt=f"Mean scores against the steps; at the last one {said}.", caption="Cosines of positives and negatives."
    )  # fmt: skip
    figures.save(drawn, folder, "scores")


def _versions() -> dict[str, str]:
    import accelerate

    return {**versions(), "accelerate": str(accelerate.__version__)}


def _curves(fitted: Fitted) -> Any:
    def draw(axes: Any) -> None:
        for ax, what in zip(axes[0], ("loss", right)):
            fitted.plot(ax, what)

    right = "accuracy" if fitted.options.embedding is None else "tar3"
    end = "" if fitted.last is None else f"; validation accuracy {fitted.last:.1%} after the last epoch"
    if fitted.recognised[0] is not None:
        end = f"; TAR {fitted.recognised[0]:.1%} {far_words(fitted.history[-1])} on classes held out after the last epoch"
    return figures.picture(
        draw,
        alt=f"Loss and {'accuracy' if right == 'accuracy' else 'TAR at FAR 1e-3'} over {len(fitted.history)} epochs{end}.",
        caption=f"{fitted.options.optimizer}, {fitted.words()}{end}.",
        size=(8.0, 3.4),
        panels=(1, 2),
    )


def _beside(fitted: Fitted) -> str:
    """The same before the training, and whether that was of use."""
    before = fitted.before or {}
    old_tar, old_recall = before.get("validation_tar3"), before.get("validation_recall")
    tar, recall = fitted.recognised
    if old_tar is None or old_recall is None or tar is None or recall is None:
        return ""
    told = f" Before the training: TAR {old_tar:.2%}, R@1 {old_recall:.2%}."
    worse = tar <= old_tar and recall <= old_recall
    return told + (" The training has not made them easier to recognise." if worse else "")


def _crowded(fitted: Fitted) -> str:
    """That all classes point one way, and what to try."""
    before = (fitted.before or {}).get("validation_unlike")
    was = "" if before is None else f" ({before:.3f} before the training)"
    return (
        f"Warning: the embedding crowds: two samples of different classes have a cosine of {fitted.unlike:.3f} on the mean{was}, where directions at random have 0. "
        "All share one direction, beside which they differ little; a batch norm at the end of the network takes it away."
    )


def say(a: argparse.Namespace, folder: Path, fitted: Fitted, log: Log) -> None:
    tar, recall = fitted.recognised
    loss = fitted.options.embedding
    if tar is not None and recall is not None:
        print(
            f"On {fitted.validation_samples:,} samples of {len(fitted.held_out)} classes held out (named in train.json), after the last epoch: TAR {tar:.2%} {far_words(fitted.history[-1])}, "
            f"R@1 {recall:.2%}, {duration(fitted.seconds)}.{_beside(fitted)}"
        )
        if fitted.crowds:
            print(_crowded(fitted))
    elif loss is not None:
        held = (
            "nothing was held out"
            if not fitted.validation_samples
            else "the classes held out cannot be recognised: an embedding has no direction"
        )
        print(
            f"Training loss {fitted.history[-1]['train_loss']:.4g} in the last epoch, {duration(fitted.seconds)}; {held}."
        )
    elif fitted.last is not None:
        print(
            f"Validation accuracy {fitted.last:.2%} after the last epoch (best {fitted.best:.2%}), {duration(fitted.seconds)}."
        )
    else:
        print(
            f"Training accuracy {fitted.history[-1]['train_accuracy']:.2%} in the last epoch, {duration(fitted.seconds)}; nothing was held out."
        )
    print(
        f"Written: {printable(folder.resolve())} (model.safetensors, {'' if loss is None else 'head.safetensors, '}train.json, learning-curve.svg, {log.place})"
    )
    model = a.model if a.multiplex is None else f"{folder / 'network.py'}:make"
    words = ["lineament", "audit", model, a.data, "--weights", str(folder / "model.safetensors")]
    for name in ("inputs", "targets", "split", "classes", "image_size", "normalize"):
        if getattr(a, name) is not None:
            words += [f"--{name.replace('_', '-')}", getattr(a, name)]
    if loss is not None:
        words += ["--task", "embedding"] if loss.embedding is None else ["--embedding", loss.embedding]
    print("Audit it: " + printable(shlex.join([*words, "--out", f"{folder}-report"])))
    if fitted.validation_samples or loss is not None:
        print(
            "(on data that it was not trained on, if you have some: DATA here includes the training samples)"
        )
