"""ReAGent: does replacing tokens explain a generated token better than gradients and attention do, and is that the scores or their sharpness?

Zhao, Shan 2024, arXiv 2402.00794. ``quick`` and ``small`` train a two-layer GPT-2 on a task whose true explanation is known (:mod:`._reagent_task`);
``paper`` takes a model that the user brings, prompts of the user's or the analogies of :mod:`lineament.data.analogy_prompts` that the model
completes rightly, and, if there is a file for it, texts to go on from, of which every second generated token is judged. Soft sufficiency and comprehensiveness reward peaked scores, so every method is measured
three times: as it is, at ReAGent's entropy, and at one mean retention.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineament.core.batching import progress
from lineament.core.checks import InputError
from lineament.explain.tokens.controls import match_entropy, match_retention, random_importance
from lineament.explain.tokens.faithfulness import hard_faithfulness, soft_faithfulness
from lineament.explain.tokens.methods import attribute_tokens
from lineament.explain.tokens.next_token import NextToken
from lineament.explain.tokens.options import ReagentOptions
from lineament.explain.tokens.recursion import reagent
from lineament.explain.tokens.results import entropy
from lineament.load.language_models import load_language_model
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.recipes.reagent.claims import BASELINES, VARIANTS, Attributed, Budgets, claims, tables
from lineament.recipes.reagent.figures import figures
from lineament.recipes.reagent.task import (
    as_directory,
    examples,
    other_symbol,
    trained,
)
from lineament.recipes.reagent.users import (
    distractor_table,
    sequence_claims,
    sequence_starts,
    sequence_table,
    sequences,
    user_prompts,
)
from lineament.report.outcome import Outcome

SLUG = "reagent"
TITLE = "ReAGent: A Model-agnostic Feature Attribution Method for Generative Language Models"
EXTRA = ("occlusion", "lime", "kernel_shap", "value_zeroing")
BUDGETS = (1, 2, 5, 10, 20, 50, 100, 200)


@dataclass(frozen=True)
class Config:
    """One run. The first group is for every model, the second for the task with a known answer, the others for a user's model."""

    preset: str = presets(
        quick={"prompts": 16, "draws": 32},
        small={},
        paper={"prompts": 200, "model_folder": "gpt2-medium", "sampler": "pos", "keep": 0.3},
    )
    prompts: int = 60
    draws: int = 64
    retention: float = 0.2
    seed: int = 0

    keep: float | int = 3
    train_steps: int = 2000

    model_folder: str | None = None
    prompts_file: str | None = None
    sampler: str = "uniform"

    sequence_file: str | None = None
    sequence_prompts: int = 25
    new_tokens: int = 10
    stride: int = 2


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished stage."""
    if config.keep >= 1 and float(config.keep).is_integer():
        # The command line gives every number of such a field as a float.
        config = replace(config, keep=int(config.keep))
    stages = Stages(out, config)
    known = config.model_folder is None
    if known:
        weights = stages("train", lambda: trained(config.seed, config.train_steps), dict[str, Tensor])
        model, tokenizer = as_directory(weights, out / "model")
        ids, answers, places = examples(config.prompts, torch.Generator().manual_seed(config.seed + 1))
        prompts: list[Any] = list(ids)
        with torch.no_grad():
            correct = float((model(ids).logits[:, -1].argmax(1) == answers).double().mean())
        sampler: Any = other_symbol
        distractors, starts = None, []
    else:
        # Eager attention has weights to show.
        model, tokenizer = load_language_model(
            str(config.model_folder), attention="eager", argument="model_folder"
        )
        if getattr(model.config, "is_encoder_decoder", False):
            raise InputError(
                f"model_folder: {config.model_folder!r} is an encoder-decoder; the recipe compares methods on causal language models"
            )
        starts = sequence_starts(config)
        prompts, distractors = user_prompts(
            model, tokenizer, config.prompts_file, config.prompts, config.seed
        )
        places, sampler, correct = None, config.sampler, None
    scores = stages(
        "attributions",
        lambda: attributions(model, tokenizer, prompts, sampler, config),
        dict[str, Attributed],
    )
    judged = stages(
        "faithfulness", lambda: faithfulness(model, tokenizer, prompts, scores, config), dict[str, dict[str, list[float]]]
    )  # fmt: skip
    table = summary(scores, judged, places)
    curve = None
    if places is not None:
        curve = stages("budgets", lambda: budgets(model, prompts, places, scores, config), Budgets)
    made = tables(table, scores, correct, len(prompts))
    judgements = claims(table, known)
    if distractors is not None:
        made.append(distractor_table(scores, distractors))
    if starts:
        whole = stages(
            "sequences",
            lambda: sequences(model, tokenizer, starts, config),
            dict[str, dict[str, float | None]],
        )
        made.append(sequence_table(whole))
        judgements += sequence_claims(whole)
    return Outcome(
        SLUG, TITLE, config.preset, asdict(config), judgements, made, figures(table, curve, out)
    )  # fmt: skip


def attributions(
    model: Any, tokenizer: Any, prompts: list[Any], sampler: Any, config: Config
) -> dict[str, Attributed]:
    """Importances by method, all through a softmax but ReAGent's."""
    found: dict[str, Attributed] = {}
    ids = _ids(tokenizer, prompts)
    for name, options in progress(list(VARIANTS.items()), "reagent"):
        own = dict(options)
        rare = ReagentOptions(keep=config.keep, ratio=own.pop("ratio", 0.3))
        with warnings.catch_warnings():
            # How many did not converge is in the table.
            warnings.simplefilter("ignore")
            made = reagent(model, ids, sampler=sampler, seed=1000 * config.seed, options=rare, **own)
        found[name] = Attributed(
            [a.scores.double() for a in made], [a.n_steps for a in made], [a.converged for a in made], [a.sequences for a in made]
        )  # fmt: skip
    for method in progress(list(BASELINES + EXTRA), "baselines"):
        options = {"absent": sampler} if method in ("occlusion", "lime", "kernel_shap") else {}
        made = attribute_tokens(model, ids, method=method, normalize="softmax", **options)
        found[method] = Attributed([a.scores.double() for a in made])
    return found


def faithfulness(
    model: Any, tokenizer: Any, prompts: list[Any], scores: dict[str, Attributed], config: Config
) -> dict[str, dict[str, list[float]]]:
    """Soft-NS and Soft-NC of each method as it is, at ReAGent's entropy and at one mean retention; hard ones; one entry a prompt."""
    names = [*scores, "random"]
    forms = ("plain", "entropy", "retention")
    found: dict[str, dict[str, list[float]]] = {
        n: {f"{form} {m}": [] for form in forms for m in ("NS", "NC")} for n in names
    }
    for n in names:
        found[n] |= {"hard NS": [], "hard NC": []}
    special = NextToken(model).special
    for k, ids in enumerate(progress(_ids(tokenizer, prompts), "faithfulness")):
        # Special tokens are never masked and take no part in what is matched.
        scored = ~torch.isin(ids, torch.tensor(sorted(special), dtype=torch.long))
        chance = random_importance(scored, seed=config.seed + k)[0]
        plain = [*(each.scores[k] for each in scores.values()), chance]
        level = float(entropy(scores["reagent"].scores[k]))
        variants = {
            "plain": plain,
            "entropy": [_among(scored, a, lambda x, level=level: match_entropy(x, level)) for a in plain],
            "retention": [_among(scored, a, lambda x: match_retention(x, config.retention)) for a in plain],
        }
        stacked = torch.stack([a for form in forms for a in variants[form]]).clamp(0, 1)
        soft = soft_faithfulness(
            model, ids, stacked, n_samples=config.draws, seed=config.seed + k, batch_size=512
        )
        hard = hard_faithfulness(model, ids, torch.stack(plain))
        both = zip(soft.sufficiency.split(len(names)), soft.comprehensiveness.split(len(names)))
        for form, (ns, nc) in zip(forms, both):
            for n, a, b in zip(names, ns.tolist(), nc.tolist()):
                found[n][f"{form} NS"].append(a)
                found[n][f"{form} NC"].append(b)
        for n, a, b in zip(names, hard["aopc_sufficiency"].tolist(), hard["aopc_comprehensiveness"].tolist()):
            found[n]["hard NS"].append(a)
            found[n]["hard NC"].append(b)
    return found


def precision(scores: list[Tensor], places: Tensor) -> float:
    """P@2: the share of {marker, value} among the two best tokens."""
    hits = [len({int(p), int(p) + 1} & set(a.topk(2).indices.tolist())) for a, p in zip(scores, places)]
    return sum(hits) / (2 * len(hits))


def budgets(
    model: Any, prompts: list[Any], places: Tensor, scores: dict[str, Attributed], config: Config
) -> Budgets:
    """P@2 by rows asked of the model: fixed numbers of steps, and early stopping with 5 and 16 probes."""
    fixed = []
    for steps in BUDGETS:
        made = reagent(
            model, prompts, sampler=other_symbol, steps=steps, seed=1000 * config.seed, options=ReagentOptions(keep=config.keep)
        )  # fmt: skip
        rows = sum(a.sequences for a in made) / len(made)
        fixed.append((steps, rows, precision([a.scores for a in made], places)))
    early = [
        (name, sum(scores[name].sequences) / len(prompts), precision(scores[name].scores, places))
        for name in ("reagent", "reagent, 16 probes")
    ]
    return Budgets(fixed, early)


def summary(
    scores: dict[str, Attributed], judged: dict[str, dict[str, list[float]]], places: Tensor | None
) -> dict[str, dict[str, float | None]]:
    """Means over prompts, log ratios to random importances (means before the logarithm), and P@2."""
    table: dict[str, dict[str, float | None]] = {}
    for name, each in judged.items():
        row: dict[str, float | None] = {key: sum(values) / len(values) for key, values in each.items()}
        for form in ("plain", "entropy", "retention"):
            for m in ("NS", "NC"):
                own, chance = (torch.tensor(judged[n][f"{form} {m}"]).mean() for n in (name, "random"))
                row[f"log {form} {m}"] = float((own / chance).log()) if own > 0 and chance > 0 else None
        if name != "random":
            row["sharpness"] = float(torch.stack([entropy(a) for a in scores[name].scores]).mean())
        if places is not None and name != "random":
            row["P@2"] = precision(scores[name].scores, places)
        table[name] = row
    return table


def _among(scored: Tensor, a: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    wide = torch.zeros_like(a)
    wide[scored] = change(a[scored])
    return wide


def _ids(tokenizer: Any, prompts: list[Any]) -> list[Tensor]:
    return [p if isinstance(p, Tensor) else torch.tensor(tokenizer(p)["input_ids"]) for p in prompts]
