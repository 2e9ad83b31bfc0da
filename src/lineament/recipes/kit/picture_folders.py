"""Photographs in a user's folder, ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``, opened when they are needed, and the ResNet that is trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checks import InputError, number, require, suggest
from lineament.core.models import device_of, frozen
from lineament.load.folders import files_by_class, readable
from lineament.recipes.kit.face_pictures import Pictures
from lineament.recipes.kit.threads import usable_device
from lineament.train.callbacks import Autocast
from lineament.train.loop import Run

_HELD_OUT = ("val", "valid", "validation", "test")
_NONE = "{0}: expected a folder with train/CLASS/*.jpg and val/CLASS/*.jpg"


@dataclass(frozen=True)
class PictureFolders:
    """Fields of a recipe that can be run on the user's photographs.

    Attributes:
        image_size: sides of what the network sees; pictures are held 8/7 of it wide, as is usual.
        depths, widths: blocks and channels of the stages of the ResNet, a ResNet-50's by default.
        device: ``"auto"`` is a GPU where there is one. bfloat16: mixed precision.
    """

    image_size: int = 224
    depths: tuple[int, ...] = (3, 4, 6, 3)
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    device: str = "auto"
    bfloat16: bool = False

    def checked(self) -> torch.device:
        """The device, once everything here can be used.

        Raises:
            InputError: what cannot.
        """
        number("image_size", self.image_size, low=2, integer=True)
        for name in ("depths", "widths"):
            require(len(getattr(self, name)) > 0, f"{name}: got none, expected a number for each stage")
            for value in getattr(self, name):
                number(name, value, low=1, integer=True)
        require(
            len(self.depths) == len(self.widths),
            f"depths: got {len(self.depths)} beside {len(self.widths)} widths, expected as many",
        )
        odd = [width for width in self.widths if width % 4]
        require(not odd, f"widths: got {odd[:1]}, expected multiples of 4, as blocks have bottlenecks")
        return usable_device(self.device)

    def callbacks(self) -> list[Autocast]:
        """What every training takes."""
        return [Autocast()] if self.bfloat16 else []


class Photographs(Pictures):
    """Files as RGB bytes [3, size, size]: the shorter side brought to ``size``, the middle cut out. ``parts``: the sub-folder of each, where classes have any."""

    def __init__(
        self, files: Sequence[Path], labels: Sequence[int], classes: Sequence[str], root: Path, size: int
    ):
        super().__init__(files, labels, size)
        self.classes = tuple(classes)
        inside = (file.relative_to(root).parts[:-1][:2] for file in files)
        self.parts = ["/".join(names) for names in inside]

    def some(self, rows: Tensor) -> Photographs:
        """These pictures alone."""
        found, chosen = copy(self), rows.tolist()
        found.files, found.parts = [self.files[k] for k in chosen], [self.parts[k] for k in chosen]
        found.labels = self.labels[rows]
        return found

    def _read(self, file: Path) -> Tensor:
        try:
            picture = readable([(str(file), file)], None, 1)[0][0]
        except InputError as error:
            said = str(error).partition("; ")[2] or str(error)
            raise InputError(
                f"data_folder: {said}; put a whole picture in its place, and the same command goes on"
            ) from None
        picture = picture.movedim(-1, 0) if picture.ndim == 3 else picture.expand(3, -1, -1)
        height, width = picture.shape[1:]
        sides = [max(self.size, round(side * self.size / min(height, width))) for side in (height, width)]
        whole = F.interpolate(picture[None], size=sides, mode="bilinear", antialias=True)[0]
        top, left = ((side - self.size) // 2 for side in sides)
        return whole[:, top : top + self.size, left : left + self.size]


def folders_of(data_folder: str | None, image_size: int) -> tuple[Photographs, Photographs]:
    """Pictures to train on and held-out ones, with the classes of the first; every file's beginning is looked at.

    Raises:
        InputError: no such folder, one class, a class without pictures in either part, a held-out one that is not trained on, or files that are no pictures.
    """
    require(bool(data_folder), _NONE.format("data_folder: got none"))
    root = Path(data_folder or "").expanduser()
    require(root.is_dir(), _NONE.format(f"data_folder: {str(root)!r} is no folder"))
    held_out = next((root / name for name in _HELD_OUT if (root / name).is_dir()), None)
    if held_out is None or not (root / "train").is_dir():
        there = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())[:5]) or "no folders"
        raise InputError(_NONE.format(f"data_folder: {str(root)!r} holds {there}"))
    found = [_listed(folder) for folder in (root / "train", held_out)]
    names = [folder.name for folder in found[0][0]]
    require(len(names) > 1, f"data_folder: {str(root / 'train')!r} holds one class, expected two or more")
    size = round(image_size * 8 / 7)
    made = []
    for folder, (folders, files) in zip((root / "train", held_out), found):
        for name in (each.name for each in folders):
            if name not in names:
                raise InputError(f"data_folder: {str(folder)!r} holds the class {name!r}, which is not in {str(root / 'train')!r}{suggest(name, names, most=1)}")  # fmt: skip
        number_of = [names.index(each.name) for each in folders]
        empty = [name for k, name in enumerate(names) if k not in {number_of[k] for _, k in files}]
        require(
            not empty,
            f"data_folder: {str(folder)!r} has no picture of {', '.join(map(repr, empty[:3]))}, expected some of each class",
        )
        made.append(
            Photographs([file for file, _ in files], [number_of[k] for _, k in files], names, folder, size)
        )
    return made[0], made[1]


def _listed(folder: Path) -> tuple[list[Path], list[tuple[Path, int]]]:
    try:
        folders, files = files_by_class(folder)
    except InputError as error:
        raise InputError(f"data_folder: {str(error).removeprefix('data: ')}") from None
    with ThreadPoolExecutor(16) as pool:
        bad = [file for file, said in zip(files, pool.map(_damaged, (f for f, _ in files))) if said]
    require(
        not bad,
        f"data_folder: {len(bad)} of {len(files)} files are no pictures, say {str(bad[0][0]) if bad else ''!r}; move them away",
    )
    return folders, files


def _damaged(file: Path) -> bool:
    try:
        with Image.open(file):
            return False
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return True


class ResNet(nn.Module):
    """transformers' ResNet of bottlenecks, drawn from ``seed`` alone: pictures [n, 3, h, w], bytes or in [0, 1], to features [n, width].

    Args:
        weights: a folder as ``save_pretrained`` writes it, to start from with its own depths and widths; nothing is ever downloaded.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: PictureFolders, seed: int, weights: str | None = None):
        super().__init__()
        try:
            from transformers import ResNetConfig, ResNetModel
        except ImportError as error:
            raise ImportError("the ResNet is transformers' own: pip install 'lineament[hub]'") from error
        if weights is not None:
            try:
                self.network = ResNetModel.from_pretrained(Path(weights).expanduser(), local_files_only=True)
            except (OSError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"weights: {weights!r} is no folder with a ResNet as transformers saves it ({str(error).splitlines()[0]})"
                ) from None
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.network = ResNetModel(
                    ResNetConfig(
                        embedding_size=config.widths[0] // 4,
                        hidden_sizes=list(config.widths),
                        depths=list(config.depths),
                    )
                )
        self.width = list(self.network.config.hidden_sizes or ())[-1]
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        return self.network((x - self.mean) / self.deviation).pooler_output.flatten(1)


def middle(x: Tensor, size: int) -> Tensor:
    """The middle of pictures, which is what they are judged by."""
    top, left = ((side - size) // 2 for side in x.shape[-2:])
    return x[..., top : top + size, left : left + size]


@torch.no_grad()
def features(net: nn.Module, pictures: Pictures, config: PictureFolders, batch_size: int) -> Tensor:
    """What a frozen network makes of the middle of every picture, [n, width], on the CPU."""
    device = device_of(net)
    with frozen(net), torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16):
        made = [
            net(middle(x, config.image_size).to(device)).float().cpu() for x in pictures.batches(batch_size)
        ]
    return torch.cat(made)


class WholeBatches:
    """Leaves out what does not fill a batch, other samples in each epoch; all are taken where they are fewer than a batch.

    >>> callbacks = [WholeBatches()]
    """

    def on_epoch(self, run: Run) -> None:
        count = len(run.data) // run.batch_size * run.batch_size or len(run.data)
        run.rows = torch.randperm(len(run.data), generator=run.generator)[:count]
