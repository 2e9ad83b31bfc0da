"""What lenses look at: a model and data that fit each other, or a language model and prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core import shards
from lineament.core.batching import progress
from lineament.core.models import called, frozen
from lineament.core.sites.activations import capture
from lineament.core.sites.depth import tokens_of
from lineament.load.model_and_data import ModelAndData
from lineament.load.prompts import Prompts
from lineament.measure.collapse.profile import pooled


@dataclass(frozen=True)
class Subject(ModelAndData):
    """What a lens is given.

    ``sites`` are the outputs of blocks, in depth order; the last is what the head reads, which may be flattened (positions are then units).
    ``folder`` is that of the report, for pages beside it.
    ``embedding`` is the site that was named as where the embedding passes.
    ``command``: how a command line names the network and the data, where it can. ``shared``: what one lens has measured and another asks for.
    Of a text classifier ``tokenizer`` makes ids of texts, and ``filler``, a masked language model with its own, proposes other words.
    """

    sites: tuple[str, ...] = ()
    method: str = "norm_grad"
    gaze_site: str | None = None
    faithfulness: str = "scores"
    fresh: Callable[[int], nn.Module] | None = None
    tokenizer: Any = None
    filler: tuple[Any, Any] | None = None
    folder: str = ""
    embedding: str | None = None
    command: tuple[str, ...] = ()
    shared: dict[str, Any] = field(default_factory=dict)

    @property
    def sealed(self) -> str:
        """Why nothing inside the network can be looked at, or ``""``."""
        if self.sites:
            return ""
        return "No module inside this network can be watched (a TorchScript network keeps its own to itself); audit the PyTorch module that it was made from."

    def unlabelled(self, least: int) -> str:
        """Why there are no two labels of ``least`` samples, or ``""``."""
        if self.task not in ("embedding", "classification"):
            return "It is about one label a sample, and this network answers with something else; pass the task 'embedding' where labels say which samples are alike."
        some = int((self.targets.bincount() >= least).sum())
        return (
            "" if some > 1 else f"It needs two labels of {least} samples or more, and the data have {some}."
        )

    def affordable(self, work: float, passes: float, most: int, least: int = 16) -> int:
        """How many samples fit into ``work`` floating-point operations when each is passed forward ``passes`` times."""
        count = int(work / max(self.flops * passes, 1.0))
        return max(least, min(most, count, len(self)))

    def activations(self, rows: Tensor, description: str) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Samples and what passes at each site for them, a batch at a time, with a progress bar of this description.

        Of several processes each gets its share of the batches, and :func:`lineament.core.shards.merged` joins what they gather.
        """
        with frozen(self.model), torch.no_grad():
            for part in progress(list(shards.mine(self.parts(rows))), description):
                with capture(self.model, self.sites, stop_early=True) as acts:
                    called(self.model, self.inputs(part))
                yield part, {site: acts[site] for site in self.sites}

    def passed(self, site: str, rows: Tensor) -> Tensor:
        """What passes at a site for some rows, [rows, width], maps averaged over positions, on the CPU."""
        positions = self._positions(rows)

        def seen(at: Tensor) -> Tensor:
            with capture(self.model, site, stop_early=True) as acts:
                called(self.model, self.inputs(rows[at]))
            return pooled(tokens_of(self.model, site, acts[site]).float()).cpu()

        with frozen(self.model), torch.no_grad():
            found = shards.each(positions, seen, f"what passes at {site}")
        return torch.cat(found)[torch.cat(positions).argsort()]


@dataclass(frozen=True)
class LanguageSubject:
    """What a lens for language models is given.

    ``layout``: where the components of a model of no known family are, see :func:`lineament.explain.patching.layout_check.check_layout`.
    ``text``: a long text, where one was given beside the prompts.
    """

    model: nn.Module
    tokenizer: Any
    prompts: Prompts
    source: str
    seed: int = 0
    task: str = "language"
    layout: Mapping[str, str] = field(default_factory=dict)
    text: str = ""

    @property
    def decoder_only(self) -> bool:
        return not getattr(self.model.config, "is_encoder_decoder", False)
