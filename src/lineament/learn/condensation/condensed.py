"""A condensed set: an ordinary data set in the user's own scale, with what it was made with.

Sets of others hold normalised tensors, and whoever trains on them as they are finds 10 % accuracy. Here the file holds pictures as the data had them, in [0, 1] or
[0, 255], and the normalisation beside them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lineament import __version__
from lineament.core.checks import InputError, require, show
from lineament.core.files import atomic_write, output_folder, write_json
from lineament.core.results import Readable, axes, plain

_ARRAYS, _FACTS, _PICTURES, _HUB = "condensed.npz", "condensed.json", "pictures", "dataset"


@dataclass(frozen=True)
class Condensed(Readable):
    """Pictures that stand for a data set.

    Attributes:
        pictures: float32 [pictures, channels, height, width] in the scale of the data, 0 to ``top``; learned ones may leave it unless they were kept inside.
        labels: [pictures], every class as often.
        mean, std: of each channel of the training pictures, in the same scale: a network trained on the set must see (x - mean) / std.
        top: the value of white, 1 or 255.
        start: the pictures that the learning began with; empty where pictures were chosen, not learned.
        trace: of every step: outer and inner number, whether summed over classes, the loss before it, the share of gradient rows that have vanished.
        method, settings, classes, notes: how it was made, the classes' names, and what should be known. source: a digest of the training data.

    >>> Condensed(torch.rand(4, 1, 4, 4), torch.tensor([0, 0, 1, 1]), torch.zeros(1), torch.ones(1)).per_class
    2
    """

    pictures: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor
    top: float = 1.0
    start: Tensor = field(default_factory=lambda: torch.empty(0))
    trace: Tensor = field(default_factory=lambda: torch.empty(0, 5))
    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    source: str = ""

    @property
    def per_class(self) -> int:
        """Pictures of each class."""
        return len(self.labels) // (int(self.labels.max()) + 1)

    def normalised(self, images: Tensor | None = None) -> Tensor:
        """Pictures of this scale (its own by default) as a network must see them."""
        x = self.pictures if images is None else images
        return (x - self._wide(self.mean, x)) / self._wide(self.std, x)

    def clamped(self) -> Tensor:
        """The pictures with values outside the scale moved to its ends."""
        return self.pictures.clamp(0, self.top)

    def as_bytes(self) -> Tensor:
        """The pictures in 8 bits a channel."""
        return (self.clamped() * (255 / self.top)).round().to(torch.uint8)

    def with_pictures(self, pictures: Tensor) -> Condensed:
        """The same record around other pictures."""
        return Condensed(**{**vars(self), "pictures": pictures})

    def save(self, folder: str | Path) -> Path:
        """Write ``condensed.npz`` (float32), ``pictures/CLASS/*.png`` (8 bits), ``condensed.json``, and where the package `datasets` is there, ``dataset``.

        The arrays, the pictures and the data set are each opened by ``lineament train`` and ``lineament audit``. The arrays come last, so that a folder that holds them
        is whole.

        >>> import tempfile
        >>> made = Condensed(torch.rand(2, 1, 4, 4), torch.arange(2), torch.zeros(1), torch.ones(1), classes=("cat", "dog"))
        >>> folder = made.save(tempfile.mkdtemp())
        >>> sorted(p.name for p in (folder / "pictures").iterdir()), bool((Condensed.load(folder).pictures == made.pictures).all())
        (['cat', 'dog'], True)
        """
        folder = output_folder(folder)
        for name in (_FACTS, _ARRAYS):
            (folder / name).unlink(missing_ok=True)
        self._pngs(folder)
        self._hub(folder)
        arrays: dict[str, Any] = {
            "x": self.pictures.cpu().numpy(),
            "y": self.labels.cpu().numpy(),
            "classes": np.array(self.names()),
            "mean": self.mean.cpu().numpy(),
            "std": self.std.cpu().numpy(),
            "start": self.start.cpu().numpy(),
            "trace": self.trace.cpu().numpy(),
        }
        with atomic_write(folder / _ARRAYS) as temporary:
            with temporary.open("wb") as file:
                np.savez(file, **arrays)
            digest = _digest(temporary)
            facts = {
                "method": self.method, "per_class": self.per_class, "classes": self.names(), "mean": self.mean.tolist(), "std": self.std.tolist(),
                "top": self.top, "settings": plain(dict(self.settings)), "notes": list(self.notes),
                "sha256": {_ARRAYS: digest, "training data": self.source}, "lineament": __version__,
            }  # fmt: skip
            write_json(folder / _FACTS, facts)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Condensed:
        """A set that :meth:`save` wrote.

        Raises:
            InputError: no such folder, a file that is damaged or was changed since.
        """
        folder = Path(folder)
        for name in (_FACTS, _ARRAYS):
            require(
                (folder / name).is_file(),
                f"folder: {str(folder)!r} holds no {name}, expected a folder that lineament condense wrote",
            )
        try:
            facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
            told = facts["sha256"][_ARRAYS]
            require(
                told == _digest(folder / _ARRAYS),
                f"folder: {_ARRAYS} in {str(folder)!r} is not the one that {_FACTS} describes; condense again, or copy both",
            )
            with np.load(folder / _ARRAYS, allow_pickle=False) as file:
                held = {
                    name: torch.from_numpy(file[name]) for name in ("x", "y", "mean", "std", "start", "trace")
                }
            x, y = held["x"], held["y"]
            require(
                x.ndim == 4 and y.shape == x.shape[:1] and bool(x.isfinite().all()),
                f"folder: {_ARRAYS} in {str(folder)!r} holds {show(x)} with {show(y)}, expected finite pictures [n, channels, height, width] with a label each",
            )
            return cls(
                x, y, held["mean"], held["std"], float(facts["top"]), held["start"], held["trace"],
                str(facts["method"]), facts["settings"], tuple(map(str, facts["classes"])), tuple(map(str, facts["notes"])),
                str(facts["sha256"]["training data"]),
            )  # fmt: skip
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise InputError(f"folder: {str(folder)!r} holds a damaged condensed set ({error})") from error

    def names(self) -> list[str]:
        """The classes' names, or their numbers."""
        return list(self.classes) or [str(c) for c in range(int(self.labels.max()) + 1)]

    def to_dict(self) -> dict[str, Any]:
        return plain({name: value for name, value in vars(self).items() if name != "start"})

    def plot(self, ax: Any = None, most: int = 10) -> Any:
        """Pictures as a sheet, one row a class, at most so many of each."""
        ax = axes(ax)
        x = F.pad(self.clamped().cpu() / self.top, (1, 1, 1, 1), value=1.0)  # a line between pictures
        per = min(self.per_class, most)
        rows = [torch.cat(list(x[self.labels == c][:per]), 2) for c in range(int(self.labels.max()) + 1)]
        sheet = torch.cat(rows, 1).movedim(0, -1).numpy()
        ax.imshow(sheet, cmap="gray", vmin=0, vmax=1)
        height = x.shape[2]
        ax.set_yticks([height * (c + 0.5) for c in range(len(rows))], self.names())
        ax.set_xticks([])
        ax.grid(False)
        return ax

    def _wide(self, values: Tensor, x: Tensor) -> Tensor:
        return values.to(x.device, x.dtype)[:, None, None]

    def _folders(self) -> list[str]:
        """Names of folders that sort as the classes do, whatever the classes are called."""
        names = [re.sub(r"[^\w .-]", "_", name).strip(". ")[:80] or "_" for name in self.names()]
        width = len(str(len(names) - 1))
        sorts = sorted(names) == names and len({name.lower() for name in names}) == len(names)
        return names if sorts else [f"{c:0{width}}-{name}" for c, name in enumerate(names)]

    def _images(self) -> list[Image.Image]:
        held = self.as_bytes().cpu().movedim(1, -1).numpy()
        return [Image.fromarray(x[..., 0] if x.shape[2] == 1 else x) for x in held]

    def _pngs(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".pictures-") as made:
            names, seen = self._folders(), [0] * len(self.names())
            for name in names:
                (Path(made) / _PICTURES / name).mkdir(parents=True)
            for image, label in zip(self._images(), self.labels.tolist()):
                image.save(Path(made) / _PICTURES / names[label] / f"{seen[label]:04}.png")
                seen[label] += 1
            shutil.rmtree(folder / _PICTURES, ignore_errors=True)
            (Path(made) / _PICTURES).rename(folder / _PICTURES)

    def _hub(self, folder: Path) -> None:
        """As a data set of Hugging Face, where its package is there."""
        shutil.rmtree(folder / _HUB, ignore_errors=True)
        try:
            from datasets import ClassLabel, Dataset, Features
            from datasets import Image as Pictures
        except ImportError:
            return
        features = Features({"image": Pictures(), "label": ClassLabel(names=self.names())})
        rows = {"image": self._images(), "label": self.labels.tolist()}
        with tempfile.TemporaryDirectory(dir=folder, prefix=".dataset-") as made, _no_bars():
            Dataset.from_dict(rows, features=features).save_to_disk(str(Path(made) / _HUB))
            (Path(made) / _HUB).rename(folder / _HUB)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars of `datasets`, which belong to whoever calls it."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
