"""What a pruning is told beyond its target, and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from lineament.core import results
from lineament.core.checkpoint import Checkpoint
from lineament.core.results import Readable
from lineament.edit.saved import save


@dataclass(frozen=True)
class PruneOptions:
    """What a pruning rarely needs to be told.

    Attributes:
        sites: names or globs of the groups of channels to prune, as :func:`lineament.core.surgery.channel_groups` names them; all that can be scored by default.
        allot: of an exact budget: ``"group"``: every group keeps the same share; ``"global"``: all channels are ranked together, each score as a share of
            its output's energy.
        center: take means out of the contributions when scoring; by default where a batch norm follows.
        bias: put the mean of what went into the bias of layers that have one and no batch norm after them (not in the paper).
        lam: added to the diagonal in the compensation, relative to its mean.
        widths: ``"one"``: groups of one size stay of one size, as a Hugging Face configuration wants it, and the default for language models; ``"free"``:
            as they come, ranked together (``allot="global"``), and such a folder opens with :func:`lineament.edit.load`.
        multiple: group sizes are brought to a multiple of this; by default 64 for language models with layers of at least 512 and one
            width, else 1.
        batch_size, seed: of the calibration and of ``criterion="random"``.
        checkpoint: store each group's step there, and go on after those that are stored.

    >>> PruneOptions().allot
    'group'
    """

    sites: str | Sequence[str] | None = None
    allot: str = "group"
    center: bool | None = None
    bias: bool = True
    lam: float = 1e-4
    widths: str | None = None
    multiple: int | None = None
    batch_size: int = 64
    seed: int = 0
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True, repr=False)
class Pruned(Readable):
    """A network with fewer channels.

    Attributes:
        model: a plain module of the same class, called as the original was.
        kept: {group: the channels that are left}; sizes: {group: (before, after)}.
        parameters, flops: (before, after); the operations of one forward on two samples.
        errors: {layer: (E |Y - Y'|² / E |Y|² when channels go, and after compensation)}, each beside the inputs that it had then.
        whole: {group or parameter axis: why it was left as it was}.
        criterion, compensate, recalibrated: how it was made.
    """

    model: nn.Module
    kept: dict[str, Int[Tensor, " kept"]]
    sizes: dict[str, tuple[int, int]]
    parameters: tuple[int, int]
    flops: tuple[int, int]
    errors: dict[str, tuple[float, float]]
    whole: dict[str, str]
    criterion: str
    compensate: str | None
    recalibrated: bool

    @property
    def share(self) -> float:
        """The share of the parameters that is left."""
        return self.parameters[1] / self.parameters[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, without the network."""
        return {
            name: results.plain(getattr(self, name)) for name in self.__dataclass_fields__ if name != "model"
        }

    def plot(self, ax: Any = None) -> Any:
        """Channels before and after, by group."""
        ax = results.axes(ax)
        names = list(self.sizes)
        for at, label in enumerate(("before", "after")):
            ax.bar(
                [i + 0.4 * at for i in range(len(names))],
                [s[at] for s in self.sizes.values()],
                0.4,
                label=label,
            )
        ax.set_xticks([i + 0.2 for i in range(len(names))], names, rotation=45, ha="right", parse_math=False)
        ax.set_ylabel("channels")
        ax.legend()
        return ax

    def save(self, folder: str | Path) -> Path:
        """Write the network, see :func:`lineament.edit.save`."""
        return save(self.model, folder)
