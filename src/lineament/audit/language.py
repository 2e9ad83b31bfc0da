"""Language models in the audit: what their lenses look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lineament.load.prompts import Prompts


@dataclass(frozen=True)
class LanguageSubject:
    """What a language lens is given."""

    model: nn.Module
    tokenizer: Any
    prompts: Prompts
    source: str
    seed: int = 0
    task: str = "language"

    @property
    def decoder_only(self) -> bool:
        return not getattr(self.model.config, "is_encoder_decoder", False)
