"""What a training leaves in its folder: the log while it runs, then the weights, the curves and `train.json`, which comes last."""

from __future__ import annotations

import argparse
import csv
import io
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lineament.cli.train_result import Fitted
from lineament.core.files import atomic_write, write_json, write_text
from lineament.load.loaded import Loaded
from lineament.report import figures
from lineament.report.outcome import versions
from lineament.report.text import duration, printable

BOARD = "tensorboard"
FILES = ("model.safetensors", "train.json", "history.csv", "learning-curve.svg", "learning-curve-dark.svg")


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


def write(folder: Path, fitted: Fitted, loaded: Loaded, asked: dict[str, Any]) -> None:
    from safetensors.torch import save_model

    (folder / "train.json").unlink(missing_ok=True)
    with atomic_write(folder / "model.safetensors") as temporary:
        save_model(loaded.model, str(temporary))
    figures.save(_curves(fitted), folder, "learning-curve")
    value = {"model": asked["model"], "data": asked["data"], **fitted.to_dict(), "asked": asked}
    write_json(folder / "train.json", {**value, "versions": _versions()})


def _versions() -> dict[str, str]:
    import accelerate

    return {**versions(), "accelerate": str(accelerate.__version__)}


def _curves(fitted: Fitted) -> Any:
    def draw(axes: Any) -> None:
        for ax, what in zip(axes[0], ("loss", "accuracy")):
            fitted.plot(ax, what)

    end = "" if fitted.last is None else f"; validation accuracy {fitted.last:.1%} after the last epoch"
    return figures.picture(
        draw,
        alt=f"Loss and accuracy over {len(fitted.history)} epochs{end}.",
        caption=f"{fitted.options.optimizer}, {fitted.words()}{end}.",
        size=(8.0, 3.4),
        panels=(1, 2),
    )


def say(a: argparse.Namespace, folder: Path, fitted: Fitted, log: Log) -> None:
    if fitted.last is not None:
        print(
            f"Validation accuracy {fitted.last:.2%} after the last epoch (best {fitted.best:.2%}), {duration(fitted.seconds)}."
        )
    else:
        print(
            f"Training accuracy {fitted.history[-1]['train_accuracy']:.2%} in the last epoch, {duration(fitted.seconds)}; nothing was held out."
        )
    print(
        f"Written: {printable(folder.resolve())} (model.safetensors, train.json, learning-curve.svg, {log.place})"
    )
    words = ["lineament", "audit", a.model, a.data, "--weights", str(folder / "model.safetensors")]
    for name in ("inputs", "targets", "split", "classes", "image_size", "normalize"):
        if getattr(a, name) is not None:
            words += [f"--{name.replace('_', '-')}", getattr(a, name)]
    print("Audit it: " + printable(shlex.join([*words, "--out", f"{folder}-report"])))
    if fitted.validation_samples:
        print(
            "(on data that it was not trained on, if you have some: DATA here includes the training samples)"
        )
