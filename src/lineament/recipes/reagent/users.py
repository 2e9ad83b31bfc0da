"""ReAGent's recipe on a model that the user brings: its prompts or analogies with a distractor, and continuations judged token by token."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from lineament.core import checks
from lineament.core.batching import progress
from lineament.core.text_parts import one_token
from lineament.data.analogy_prompts import analogy_prompts, tokens_inside
from lineament.explain.tokens.continuations import explain_continuation, sequence_faithfulness
from lineament.explain.tokens.next_token import NextToken
from lineament.explain.tokens.options import ReagentOptions
from lineament.recipes.reagent.claims import BASELINES, Attributed
from lineament.report.outcome import Claim, Table

# As many of the analogies are tried for one that is wanted; the paper kept 28 to 197 prompts.
_TRIED = 3


def user_prompts(
    model: Any, tokenizer: Any, path: str | None, limit: int, seed: int
) -> tuple[list[str], list[Tensor] | None]:
    """The first prompts of a text file, one a line; without a file analogies that the model completes rightly, and which of their tokens are the distractor."""
    if path is not None:
        return _lines("prompts_file", path, limit), None
    made = analogy_prompts(min(_TRIED * limit, 360), seed=seed)
    face = NextToken(model, tokenizer)
    rows = [torch.tensor([tokenizer(prompt)["input_ids"]]) for prompt in made.prompts]
    fits = [k for k, r in enumerate(rows) if face.most_tokens is None or r.shape[1] <= face.most_tokens]
    kept: list[int] = []
    if fits:
        with face.ready():
            said = face.logits([rows[k] for k in fits], then=lambda scores, index: scores.argmax(1)).tolist()
        for k, token in zip(fits, said):
            answer = one_token(tokenizer, made.prompts[k], made.answers[k])
            kept += [k] if answer == [token] else []
    checks.require(
        len(kept) >= 2,
        f"prompts_file: without one the prompts are analogies in English, and of {len(made)} the model completes {len(kept)} rightly; give a file of "
        "prompts, one a line",
    )
    kept = kept[:limit]
    masks = [tokens_inside(tokenizer, made.prompts[k], made.distractors[k]) for k in kept]
    return [made.prompts[k] for k in kept], masks


def distractor_table(scores: dict[str, Attributed], distractors: list[Bool[Tensor, "tokens"]]) -> Table:
    """How much of each method's importance lies where nothing can matter, beside the share of tokens there."""
    chance = sum(float(inside.double().mean()) for inside in distractors) / len(distractors)
    rows: list[list[Any]] = []
    for name, each in scores.items():
        shares = [
            float(a[inside].sum() / a.sum().clamp_min(1e-12)) for a, inside in zip(each.scores, distractors)
        ]
        rows.append([name, round(sum(shares) / len(shares), 3)])
    rows.append(["share of the tokens", round(chance, 3)])
    return Table(
        f"Importance inside the distractor of {len(distractors)} analogies that the model completes rightly (less is better)",
        ["method", "share"],
        rows,
    )


def sequence_starts(config: Any) -> list[str]:
    """The texts to go on from, if a file of them is given."""
    if config.sequence_file is None:
        return []
    return _lines("sequence_file", config.sequence_file, config.sequence_prompts)


def sequences(
    model: Any, tokenizer: Any, starts: list[str], config: Any
) -> dict[str, dict[str, float | None]]:
    """Log ratios to random importances of ReAGent and its seven rivals on the same greedy continuations."""
    said: list[tuple[str, list[int]]] = []
    reason = ""
    for text in progress(starts, "generating"):
        try:
            made = explain_continuation(
                model, text, tokenizer=tokenizer, max_new_tokens=config.new_tokens, method="random"
            )
        except checks.InputError as error:
            # A text that the model ends at once, or has no room for, tells nothing.
            reason = str(error)
            continue
        said.append((text, list(made.continuation)))
    checks.require(bool(said), f"sequence_file: no text could be continued; the last: {reason}")
    found: dict[str, dict[str, float | None]] = {}
    for method in progress(["reagent", *BASELINES], "sequences"):
        options: dict[str, Any] = {"method": method, "normalize": "softmax"}
        if method == "reagent":
            options = {
                "method": method,
                "sampler": config.sampler,
                "options": ReagentOptions(keep=config.keep),
                "seed": 1000 * config.seed,
            }
        with warnings.catch_warnings():
            # That no probe stopped is in the score.
            warnings.simplefilter("ignore")
            made = [
                explain_continuation(
                    model, text, list(ids), tokenizer=tokenizer, stride=config.stride, **options
                )
                for text, ids in said
            ]
        judged = sequence_faithfulness(
            model, made, tokenizer=tokenizer, n_samples=config.draws, seed=config.seed
        )
        ratios = {"log NS": judged.log_sufficiency, "log NC": judged.log_comprehensiveness}
        found[method] = {k: None if math.isnan(v) else v for k, v in ratios.items()}
        found[method] |= {
            "NS": float(judged.sufficiency.mean()),
            "NC": float(judged.comprehensiveness.mean()),
        }
    return found


def sequence_table(found: dict[str, dict[str, float | None]]) -> Table:
    columns = ["NS", "NC", "log NS", "log NC"]
    rows = [
        [name, *(None if row[c] is None else round(float(row[c] or 0.0), 3) for c in columns)]
        for name, row in found.items()
    ]
    return Table(
        "Sequence level: means over the targets of a continuation, then over texts",
        ["method", *columns],
        rows,
    )


def sequence_claims(found: dict[str, dict[str, float | None]]) -> list[Claim]:
    """The paper's claim for whole continuations, by predicates written before any run."""
    claims = []
    for column, name, paper in (
        ("log NC", "comprehensiveness", "TellMeWhy: ReAGent 1.09 to 3.29; best in three of six models, integrated gradients 2.45 to 3.05 where ahead"),
        ("log NS", "sufficiency", "TellMeWhy: ReAGent 0.14 to 1.97; integrated gradients ahead on all three GPT models"),
    ):  # fmt: skip
        values = {
            n: -math.inf if row[column] is None else float(row[column] or 0.0) for n, row in found.items()
        }
        rival = max(BASELINES, key=lambda n: values[n])
        holds = values["reagent"] > values[rival]
        claims.append(
            Claim(
                f"Sequence level: soft {name} of ReAGent is above all seven baselines' (log ratio to random importances)",
                paper,
                f"ReAGent {values['reagent']:.3g}, best other {values[rival]:.3g} ({rival})",
                holds,
                "" if holds else "in the authors' own files it is not so for all models either",
            )
        )
    return claims


def _lines(name: str, path: str, limit: int) -> list[str]:
    file = Path(path)
    checks.require(file.is_file(), f"{name}: {str(file)!r} does not exist")
    found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()][:limit]
    checks.require(bool(found), f"{name}: {str(file)!r} holds no line of text")
    return found
