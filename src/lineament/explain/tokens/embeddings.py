"""A forward with the word embeddings changed on their way, and gradients at them: what gradient scores and soft metrics are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.sites.activations import capture, patch
from lineament.explain.tokens.next_token import NextToken


def through_embeddings(
    face: NextToken,
    ids: Int[Tensor, "rows tokens"],
    source: int,
    change: Callable[[Tensor, slice], Tensor] | None = None,
    *,
    score: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Float[Tensor, "rows vocabulary"], Tensor | None, Tensor | None]:
    """Logits with the word embeddings changed on their way, before positions are added, and gradients at them.

    Args:
        change: ``change(e, columns)`` gives the embeddings that go on; ``columns`` says which of the row they are.
        score: a scalar of the logits; its gradient with respect to the (changed) embeddings is taken.

    Returns:
        Logits, the embeddings (rows, tokens, width) and the gradients, the last two ``None`` without ``score``.
    """
    face.needs_weights("the word embeddings")
    parts: list[tuple[Any, slice]] = [(face.model, slice(0, ids.shape[1]))]
    if face.encoder_decoder:
        # One module may embed both sequences: each is embedded in a phase of its own.
        parts = [
            (face.model.get_encoder(), slice(0, source)),
            (face.model.get_decoder(), slice(source, ids.shape[1])),
        ]
    sites = [_name_of(root, root.get_input_embeddings()) for root, _ in parts]
    changes = [
        {site: (lambda e, columns=columns: e if change is None else change(e, columns))}
        for site, (_, columns) in zip(sites, parts)
    ]
    wanted = score is not None
    face.forwards += 1
    with patch(parts[0][0], changes[0]), capture(parts[0][0], sites[0], gradients=wanted) as first:
        if not face.encoder_decoder:
            output = face.model(**face.inputs(ids))
        else:
            encoded = parts[0][0](input_ids=ids[:, :source], attention_mask=torch.ones_like(ids[:, :source]))
    acts = [first[sites[0]]]
    if face.encoder_decoder:
        with patch(parts[1][0], changes[1]), capture(parts[1][0], sites[1], gradients=wanted) as second:
            output = face.model(
                encoder_outputs=encoded,
                attention_mask=torch.ones_like(ids[:, :source]),
                decoder_input_ids=ids[:, source:],
            )
        acts.append(second[sites[1]])
    last = face.last(output, len(ids))
    if score is None:
        return last, None, None
    slopes = torch.autograd.grad(score(last), acts, allow_unused=True, materialize_grads=True)
    return last.detach(), torch.cat([a.detach() for a in acts], 1), torch.cat(slopes, 1)


def position_embeddings(face: NextToken, ids: Int[Tensor, "1 tokens"]) -> Float[Tensor, "1 tokens width"]:
    """What a causal model adds to the word embeddings for their places.

    Raises:
        InputError: the model adds nothing (rotary positions), or keeps it where it is not found.
    """
    names = [
        name
        for name, module in face.model.named_modules()
        if isinstance(module, nn.Embedding)
        and name.rsplit(".", 1)[-1] in ("wpe", "embed_positions", "position_embeddings")
    ]
    checks.require(
        len(names) == 1 and not face.encoder_decoder,
        f"positions: {type(face.model).__name__} has no position embedding that is added to its word embeddings; leave the option out",
    )
    with torch.no_grad(), capture(face.model, names[0]) as seen:
        face.logits([ids])
    found = seen[names[0]].detach()
    width = face.model.get_input_embeddings().embedding_dim
    checks.require(
        found.shape[-1] == width,
        f"positions: the word embeddings of {type(face.model).__name__} are {width} wide and are projected to {found.shape[-1]} before positions are added; "
        "leave the option out",
    )
    return found if found.ndim == 3 else found[None]


def _name_of(root: nn.Module, wanted: nn.Module) -> str:
    for name, module in root.named_modules():
        if module is wanted:
            return name
    raise checks.InputError(f"model: the word embedding of {type(root).__name__} is none of its modules")
