"""Token scores from gradients at the word embeddings, and forwards with those embeddings changed on their way.

f = log p(target) (or log p(target) - log p(contrast)), and e_t is the word embedding of token t, before positions are added. These are baselines of
ReAGent's paper (arXiv 2402.00794): the gradient's norm, input x gradient, integrated gradients (Sundararajan et al. 2017), gradient SHAP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.sites.activations import capture, patch
from lineament.explain.tokens.next_token import NextToken
from lineament.explain.tokens.prompts import Question
from lineament.explain.tokens.samplers import uniform

# Prompts that go through one forward and backward together.
_PROMPTS = 16
Change = Callable[[Tensor, slice], Tensor]


def grad_norm(questions: Sequence[Question]) -> list[Float[Tensor, "scored"]]:
    """‖∂f/∂e_t‖."""
    return _of_gradients(questions, lambda e, slopes: slopes.norm(dim=-1))


def input_x_grad(questions: Sequence[Question], *, positions: bool = False) -> list[Float[Tensor, "scored"]]:
    """Σ_j e_tj ∂f/∂e_tj, signed.

    Args:
        positions: add the position embedding to e_t, as the official code does where a model has one (GPT-2, OPT).
    """
    return _of_gradients(questions, lambda e, slopes: (e * slopes).sum(-1), positions=positions)


def _of_gradients(
    questions: Sequence[Question], score: Callable[[Tensor, Tensor], Tensor], *, positions: bool = False
) -> list[Float[Tensor, "scored"]]:
    """A score of each prompt's embeddings and their gradients; prompts of one length go through one forward."""
    forms: dict[tuple[int, int], list[int]] = {}
    for i, q in enumerate(questions):
        forms.setdefault((len(q.prompt.ids), q.prompt.source), []).append(i)
    found: list[Tensor] = [torch.empty(0)] * len(questions)
    for chosen in (same[k : k + _PROMPTS] for same in forms.values() for k in range(0, len(same), _PROMPTS)):
        asked = [questions[i] for i in chosen]
        face, source = asked[0].face, asked[0].prompt.source

        def total(s: Tensor, asked: Sequence[Question] = asked) -> Tensor:
            return torch.cat([q.value(s[k : k + 1]) for k, q in enumerate(asked)]).sum()

        e, slopes = _slopes(face, torch.cat([q.rows for q in asked]), source, total)
        e = e + position_embeddings(face, asked[0].rows) if positions else e
        for i, scores in zip(chosen, score(e, slopes)):
            found[i] = scores[questions[i].prompt.places.to(scores.device)]
    return found


def integrated_gradients(
    question: Question, *, steps: int = 100, rule: str = "grid", batch_size: int = 32
) -> Float[Tensor, "scored"]:
    """Σ_j e_tj times the mean gradient on the straight path from zero embeddings: the scores sum to f(input) - f(zero input).

    Args:
        steps: ``"grid"`` takes the plain mean over 0, 1/steps, ..., 1, as the official code does (100), and misses the sum by O(1/steps);
            ``"gauss"`` takes so many Gauss-Legendre points, and 32 are exact for smooth models.
        batch_size: points a forward.
    """
    checks.number("steps", steps, low=1, integer=True)
    if checks.one_of("rule", rule, ("grid", "gauss")) == "grid":
        alphas, weights = np.linspace(0, 1, steps + 1), np.full(steps + 1, 1 / (steps + 1))
    else:
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        alphas, weights = (nodes + 1) / 2, weights / 2
    e, _ = _gradients(question)
    scored = question.prompt.scored.to(e.device)[None, :, None]
    total = torch.zeros_like(e[0])
    for alpha, share in zip(*(torch.from_numpy(each).split(batch_size) for each in (alphas, weights))):
        # Protected tokens stay as they are along the path.
        scale = torch.where(scored, alpha.to(e)[:, None, None], 1.0)
        _, slopes = _gradients(question, len(alpha), lambda x, columns, scale=scale: x * scale[:, columns])
        total += torch.einsum("a,atd->td", share.to(e), slopes)
    return (e[0] * total).sum(-1)[question.prompt.places]


def gradient_shap(
    question: Question, *, n_samples: int = 50, baseline: str = "tokens", noise: float = 0.0, batch_size: int = 32, seed: int = 0
) -> Float[Tensor, "scored"]:  # fmt: skip
    """Expected gradients: the mean over random baselines b and α ~ U[0, 1] of Σ_j (e - b)_tj ∂f/∂e_tj at b + α(e - b).

    Args:
        n_samples: pairs of a baseline and a point on its path.
        baseline: ``"tokens"`` draws other tokens of the vocabulary, ``"zero"`` takes zero embeddings.
        noise: standard deviation of Gaussian noise added to the embeddings.
    """
    checks.number("n_samples", n_samples, low=1, integer=True)
    checks.number("noise", noise, low=0)
    checks.one_of("baseline", baseline, ("tokens", "zero"))
    generator = torch.Generator().manual_seed(seed)
    p = question.prompt
    e, _ = _gradients(question)
    scored, total = p.scored.to(e.device)[None, :, None], torch.zeros_like(e[0])
    for count in (len(part) for part in torch.arange(n_samples).split(batch_size)):
        start = torch.zeros_like(e).expand(count, -1, -1)
        if baseline == "tokens":
            rows = p.ids.repeat(count, 1)
            rows[:, p.places] = uniform(question.face, question.vocabulary)(
                rows[:, p.places], None, generator
            )
            start = _embedded(question, rows.to(e.device))
        jitter = noise * torch.randn(count, *e.shape[1:], generator=generator).to(e)
        alpha = torch.rand(count, generator=generator).to(e)
        points = torch.where(scored, start + alpha[:, None, None] * (e + jitter - start), e)
        _, slopes = _gradients(question, count, lambda x, columns, points=points: points[:, columns].clone())
        total += ((e + jitter - start) * slopes).sum(0)
    return (total / n_samples).sum(-1)[p.places]


def _gradients(question: Question, count: int = 1, change: Change | None = None) -> tuple[Tensor, Tensor]:
    """(count, tokens, width) embeddings and the gradients of f at them."""
    rows = question.rows.expand(count, -1)
    return _slopes(question.face, rows, question.prompt.source, lambda s: question.value(s).sum(), change)


def _slopes(
    face: NextToken, rows: Tensor, source: int, score: Callable[[Tensor], Tensor], change: Change | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with torch.enable_grad():
        _, e, slopes = through_embeddings(face, rows, source, change, score=score)
    assert e is not None and slopes is not None
    return e, slopes


def _embedded(question: Question, rows: Tensor) -> Tensor:
    parts: list[Tensor] = []
    through_embeddings(
        question.face, rows, question.prompt.source, lambda e, columns: (parts.append(e), e)[1]
    )
    return torch.cat(parts, 1).clone()


def through_embeddings(
    face: NextToken,
    ids: Int[Tensor, "rows tokens"],
    source: int,
    change: Change | None = None,
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
    face.forwards += 1
    acts: list[Tensor] = []

    def run(embeds: Any, columns: slice, call: Any, **inputs: Any) -> Any:
        """Call a model whose part ``embeds`` turns these columns into embeddings."""
        site = _name_of(embeds, embeds.get_input_embeddings())
        changed = {site: lambda e: e if change is None else change(e, columns)}
        with patch(embeds, changed), capture(embeds, site, gradients=score is not None) as seen:
            output = call(**inputs)
        acts.append(seen[site])
        return output

    if face.encoder_decoder:
        # One module may embed both sequences: each is embedded in a phase of its own.
        encoder, mask = face.model.get_encoder(), torch.ones_like(ids[:, :source])
        encoded = run(encoder, slice(0, source), encoder, input_ids=ids[:, :source], attention_mask=mask)
        output = run(
            face.model.get_decoder(), slice(source, ids.shape[1]), face.model, encoder_outputs=encoded, attention_mask=mask,
            decoder_input_ids=ids[:, source:],
        )  # fmt: skip
    else:
        output = run(face.model, slice(0, ids.shape[1]), face.model, **face.inputs(ids))
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
    kind = type(face.model).__name__
    checks.require(
        len(names) == 1 and not face.encoder_decoder,
        f"positions: {kind} has no position embedding that is added to its word embeddings; leave the option out",
    )
    with torch.no_grad(), capture(face.model, names[0]) as seen:
        face.logits([ids])
    found = seen[names[0]].detach()
    width = face.model.get_input_embeddings().embedding_dim
    checks.require(
        found.shape[-1] == width,
        f"positions: the word embeddings of {kind} are {width} wide and are projected to {found.shape[-1]} before positions are added; "
        "leave the option out",
    )
    return found if found.ndim == 3 else found[None]


def _name_of(root: nn.Module, wanted: nn.Module) -> str:
    for name, module in root.named_modules():
        if module is wanted:
            return name
    raise checks.InputError(f"model: the word embedding of {type(root).__name__} is none of its modules")
