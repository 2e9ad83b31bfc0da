"""Token scores from attention: the last layer's, all layers', rollout, and value zeroing.

Attention weights exist only where the implementation computes them: flash and SDPA kernels return none, and the error says which to choose.
Value zeroing (Mohebbi, Zuidema, Chrupala, Alishahi 2023) needs no weights: it deletes a token's value vectors in one layer and looks how far
every other token's output turns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.sites.activations import capture, patch
from lineament.core.sites.heads import head_view
from lineament.explain.tokens.next_token import NextToken
from lineament.explain.tokens.prompts import Question

# Prompts whose weights, (layers, heads, tokens, tokens) each, are held together.
_PROMPTS = 16


def of_attention(questions: Sequence[Question], *, how: str) -> list[Float[Tensor, "scored"]]:
    """The last position's attention, heads averaged: ``"last"`` layer, mean over ``"all"``, or ``"rollout"``; from forwards that prompts share."""
    face = questions[0].face
    checks.require(
        how != "rollout" or not face.encoder_decoder,
        "method 'rollout': it follows attention within one sequence; for an encoder-decoder choose 'attention_all'",
    )
    found: list[Tensor] = [torch.empty(0)] * len(questions)
    for index, weights in _weights(questions):
        found[index] = from_attention(weights, how)[questions[index].prompt.places.to(weights.device)]
    return found


def from_attention(weights: Float[Tensor, "layers heads queries keys"], how: str) -> Float[Tensor, "keys"]:
    """The last query's row of the last layer, of the mean over layers, or of the rollout Π_l (A_l / 2 + I / 2) (Abnar, Zuidema 2020).

    Heads are averaged; later layers of the rollout multiply from the left.

    >>> from_attention(torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]), "rollout").tolist()
    [0.25, 0.75]
    """
    checks.one_of("how", how, ("last", "all", "rollout"))
    mean = weights.mean(1)
    if how == "last":
        return mean[-1, -1]
    if how == "all":
        return mean[:, -1].mean(0)
    identity = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    row = identity[-1]
    for layer in reversed(mean):
        row = row @ (layer + identity) / 2
    return row


def _weights(
    questions: Sequence[Question],
) -> Iterator[tuple[int, Float[Tensor, "layers heads queries keys"]]]:
    """(which question, its attention weights); of an encoder-decoder the decoder's over the source, then zeros for the target prefix.

    Prompts of several lengths go through one forward, padded where the model takes a mask.

    Raises:
        InputError: the model's attention implementation returns none.
    """
    face = questions[0].face
    face.needs_weights("its attention weights")
    implementation = str(getattr(face.text_config, "_attn_implementation", None))
    checks.require(
        implementation in ("eager", "None"),
        f"model: its attention implementation {implementation!r} returns no weights; load it with "
        "from_pretrained(..., attn_implementation='eager') or call model.set_attn_implementation('eager')",
    )
    for q in questions:
        checks.require(
            not face.encoder_decoder or not bool(q.prompt.scored[q.prompt.source :].any()),
            "scope: attention scores the source of an encoder-decoder only; give scope='source'",
        )
    by_length = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt.ids))
    for first in range(0, len(by_length), _PROMPTS):
        chosen = by_length[first : first + _PROMPTS]
        rows, sources = [questions[i].rows for i in chosen], [questions[i].prompt.source for i in chosen]
        for ids, mask, source, index in face.groups(rows, sources, _PROMPTS):
            layers = _layers(face, ids, mask, source)
            for row, at in enumerate(index.tolist()):
                p = questions[chosen[at]].prompt
                weights = torch.stack([layer[row] for layer in layers]).double()
                if face.encoder_decoder:
                    # The padding of a source lies behind it.
                    weights = torch.nn.functional.pad(weights[..., : p.source], (0, len(p.ids) - p.source))
                else:
                    weights = weights[..., -len(p.ids) :, -len(p.ids) :]
                yield chosen[at], weights


def _layers(face: NextToken, ids: Tensor, mask: Tensor | None, source: int) -> list[Tensor]:
    face.forwards += 1
    with _no_traces(face.model):
        output = face.model(**face.inputs(ids, mask, source), output_attentions=True)
    found: Sequence[Tensor | None] | None = getattr(
        output, "cross_attentions" if face.encoder_decoder else "attentions", None
    )
    layers = [layer for layer in found or () if layer is not None]
    checks.require(
        bool(layers),
        f"model: {type(face.model).__name__} has no attention weights to show; choose a method that needs none, such as 'occlusion'",
    )
    return layers


@contextmanager
def _no_traces(model: nn.Module) -> Iterator[None]:
    """transformers leaves hooks on a model that was asked for its attention, and a mark that they are there: both go again."""
    mark = "_output_capturing_hooks_installed"
    before = [(module, set(module._forward_hooks), mark in vars(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, hooks, marked in before:
            for key in set(module._forward_hooks) - hooks:
                for kind in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
                    getattr(module, kind).pop(key, None)
            if not marked:
                vars(module).pop(mark, None)


def value_zeroing(question: Question) -> Float[Tensor, "scored"]:
    """How far each token's value vectors turn the others, mixed over layers.

    C_l[i, j] is the cosine distance between token i's output of layer l with and without the values of token j, each row scaled to
    sum 1; the score is the last row of Π_l C_l, later layers from the left. One forward a layer, tokens as rows.
    """
    face, ids = question.face, question.rows
    checks.require(
        not face.encoder_decoder, "method 'value_zeroing': it is for causal models; choose 'occlusion'"
    )
    face.needs_weights("its layers")
    blocks = _blocks(question)
    count = ids.shape[1]
    with capture(face.model, [block for block, _ in blocks]) as acts:
        face.logits([ids])
    plain = {block: acts[block][0] for block, _ in blocks}
    row = torch.eye(count, dtype=torch.float64)[-1]
    nobody = torch.eye(count, dtype=torch.bool, device=face.device)[:, :, None, None]
    for block, attention in reversed(blocks):
        change = {f"{attention}:v": lambda v: v.masked_fill(nobody, 0.0)}
        with patch(face.model, change), capture(face.model, block) as turned:
            face.logits([ids.expand(count, -1)])
        # Row j of the batch is the run without token j's values.
        cosine = torch.nn.functional.cosine_similarity(
            turned[block].double(), plain[block].double()[None], dim=-1
        )
        moved = (1 - cosine).clamp_min(0).T.cpu()
        moved = moved / moved.sum(1, keepdim=True).clamp_min(torch.finfo(moved.dtype).tiny)
        row = row @ moved
    return row[question.prompt.places]


def _blocks(question: Question) -> list[tuple[str, str]]:
    """(block, attention) module names by depth, where the attention shows its values."""
    found: list[tuple[str, str]] = []
    for name, module in question.face.model.named_modules():
        if head_view(module, "v", question.face.text_config) is not None:
            block = re.match(r".*?\.\d+(?=\.|$)", name)
            checks.require(block is not None, f"model: the attention {name!r} lies in no numbered layer")
            found.append((block[0] if block else name, name))
    checks.require(
        bool(found),
        f"method 'value_zeroing': the value vectors of {type(question.face.model).__name__} are not known to core.heads; "
        "choose 'occlusion' or 'attention_all' with attn_implementation='eager'",
    )
    return found
