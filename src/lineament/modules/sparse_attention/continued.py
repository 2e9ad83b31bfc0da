"""Continue the training of a language model on a text, with full and sparse attention aligned, so that it runs with either.

Shen et al. 2026, arXiv 2511.20102, section 2 ("continual"): AdamW (0.9, 0.95), weight decay 0.1, gradients clipped to 1, a cosine to zero after a short warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import number, require, show
from lineament.core.models import frozen
from lineament.core.results import Readable
from lineament.modules.sparse_attention.hf import attention_modules, sparse_attention
from lineament.modules.sparse_attention.training import aligned
from lineament.train.callbacks import ClipGradients, Cosine, Rows
from lineament.train.loop import Run, fit
from lineament.train.processes import Processes

# A training is stored after each so many steps.
STORED = 100


@dataclass(frozen=True)
class AlignedHistory(Readable):
    """By stretch of at most 100 steps: ``steps`` done, the mean ``loss`` (cross-entropy and weighted alignment) and ``alignment`` (of the layers, unweighted)."""

    steps: tuple[int, ...]
    loss: tuple[float, ...]
    alignment: tuple[float, ...]


class AlignedTraining(nn.Module):
    """Called with tokens it gives the loss of a step, so that one ``forward`` holds all that is trained; ``step`` decides the coin.

    Dropout inside of attention is off, for sparse attention has none.
    """

    def __init__(self, model: nn.Module, options: Mapping[str, Any], step: int = 0):
        super().__init__()
        self.model, self.options, self.step = model, options, step
        self.alignments: list[Tensor] = []

    def forward(self, tokens: Tensor) -> Tensor:
        with aligned(self.model, **self.options, step=self.step) as branch:
            found = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss = found + branch.loss.to(found.device)
        if branch.losses:
            self.alignments.append(torch.stack([x.detach() for x in branch.losses.values()]).mean())
        return loss

    def train(self, mode: bool = True) -> AlignedTraining:
        """As always, but for the dropout of attention."""
        super().train(mode)
        for module in attention_modules(self.model):
            module.training = False
        return self


class _Steps:
    def on_batch(self, run: Run, batch: Any) -> None:
        training: Any = run.model
        training.step = run.step

    def on_epoch_end(self, run: Run) -> dict[str, float]:
        training: Any = run.model
        own = [float(x) for x in training.alignments]
        training.alignments.clear()
        total, count = run.processes.summed([sum(own), len(own)])
        return {"alignment": total / count if count else 0.0, "steps": run.step}


def train_aligned(
    model: nn.Module,
    tokens: Tensor,
    *,
    block_size: int = 16,
    blocks: int = 16,
    p_full: float = 0.5,
    alpha: float = 10.0,
    epochs: int = 1,
    batch_size: int = 8,
    lr: float = 1e-5,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    processes: Processes | None = None,
) -> AlignedHistory:
    """Train a decoder of transformers on [sequences, tokens]; it ends as the same ordinary model with other weights.

    Args:
        block_size, blocks, p_full, alpha: see :func:`aligned`.
        batch_size: sequences a step, of all processes together.
        checkpoint: store the training every 100 steps, and go on after the last that is stored, with the bits of an uninterrupted run.
        processes: where to train; by default in this process, on the model's device.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=10)
    >>> model = LlamaForCausalLM(LlamaConfig(**shape))
    >>> train_aligned(model, torch.arange(90).view(5, 18) % 10, block_size=4, blocks=2, batch_size=2).steps
    (3,)
    """
    number("epochs", epochs, low=1, integer=True)
    number("batch_size", batch_size, low=1, integer=True)
    number("lr", lr, low=0, open_low=True)
    number("alpha", alpha, low=0)
    number("p_full", p_full, low=0, high=1)
    require(
        tokens.ndim == 2 and tokens.shape[1] > 1 and not tokens.is_floating_point(),
        f"tokens: got {show(tokens)}, expected token numbers [sequences, tokens]",
    )
    options = {"block_size": block_size, "blocks": blocks, "p_full": p_full, "alpha": alpha, "seed": seed}
    training = AlignedTraining(model, options)
    # Stretches of an epoch, in the order that the seed and the epoch decide.
    size = min(STORED, math.ceil(len(tokens) / batch_size)) * batch_size
    parts = math.ceil(len(tokens) / size)

    def rows(stretch: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed + stretch // parts)
        return torch.randperm(len(tokens), generator=generator).split(size)[stretch % parts]

    found = fit(
        training,
        ({"tokens": tokens}, tokens),
        optimizer=lambda net: torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1),
        epochs=epochs * parts,
        batch_size=batch_size,
        loss=_itself,
        callbacks=[Rows(rows, shuffle=False), Cosine(warmup=0.01), ClipGradients(1.0), _Steps()],
        seed=seed,
        checkpoint=checkpoint,
        name="training",
        processes=processes,
    )
    model.train(training.training)
    return AlignedHistory(
        tuple(int(x) for x in found.curve("steps")),
        tuple(found.curve("loss")),
        tuple(found.curve("alignment")),
    )


def _itself(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return outputs


def perplexities(
    model: nn.Module, tokens: Tensor, *, block_size: int, blocks: int, batch_size: int = 8
) -> dict[str, float]:
    """Perplexity of [sequences, tokens] with full and with sparse attention.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=10)
    >>> sorted(perplexities(LlamaForCausalLM(LlamaConfig(**shape)), torch.arange(18)[None] % 10, block_size=4, blocks=2))
    ['full', 'sparse']
    """
    called: Any = model
    device, found = next(model.parameters()).device, {}
    with frozen(model, requires_grad=None), torch.no_grad():
        for mode in ("full", "sparse"):
            with sparse_attention(model, block_size=block_size, blocks=blocks, mode=mode):
                losses = [
                    float(called(input_ids=part, labels=part, use_cache=False).loss) * len(part)
                    for part in (x.to(device) for x in tokens.split(batch_size))
                ]
            found[mode] = math.exp(sum(losses) / len(tokens))
    return found
