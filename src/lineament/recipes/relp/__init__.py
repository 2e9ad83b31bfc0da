"""RelP: do LRP coefficients approximate activation patching better than gradients do, and where?

Rezaei Jafari, Eberle, Khakzar, Nanda 2025, arXiv 2508.21258. ``quick`` and ``small`` train small GPT-2s on synthetic indirect objects; ``paper`` takes a language
model that the user brings and text prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lineament.core.checks import InputError, require
from lineament.core.text_parts import one_token
from lineament.data.patching_tasks import (
    TokenPairs,
    ioi_pairs,
    save_language_model,
    synthetic_greater_than,
    synthetic_induction,
    synthetic_ioi,
)
from lineament.explain.patching.activation import activation_patching
from lineament.explain.patching.integrated import integrated_patching
from lineament.explain.patching.metrics import logit_difference, probability_difference, single_tokens
from lineament.explain.patching.relevance import relevance_patching
from lineament.explain.patching.result import fidelity
from lineament.explain.relevance.rules import relevance_rules
from lineament.load.language_models import load_language_model
from lineament.recipes.kit.networks import gpt2
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.recipes.relp import claims, figures
from lineament.recipes.relp.circuits import Circuits, circuits
from lineament.recipes.relp.claims import ATP, IG, KINDS, RELP, RULE_SETS, Comparison
from lineament.report.outcome import Outcome, Table
from lineament.train.callbacks import ClipGradients, Rate
from lineament.train.loop import fit

SLUG = "relp"
TITLE = "RelP: Faithful and Efficient Circuit Discovery in Language Models via Relevance Patching"
TASKS: dict[str, Callable[..., TokenPairs]] = {
    "ioi": synthetic_ioi,
    "greater-than": synthetic_greater_than,
    "induction": synthetic_induction,
}


@dataclass(frozen=True)
class Config:
    """One run. The first group is for all presets, the second trains small models, the third takes one that is there."""

    pairs: int = 64
    ig_steps: int = 10
    seeds: tuple[int, ...] = (0, 1, 2)

    layers: int = 4
    width: int = 64
    heads: int = 4
    steps: int = 500
    circuit_seeds: tuple[int, ...] = ()
    latents: int = 256
    dictionary_steps: int = 1500
    other_tasks: tuple[str, ...] = ()
    save_models: bool = False

    model_folder: str | None = None
    preset: str = presets(
        quick={"seeds": (0,), "pairs": 32},
        small={"circuit_seeds": (0, 1), "other_tasks": ("greater-than", "induction")},
        paper={"pairs": 100, "model_folder": "gpt2"},
    )


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished stage."""
    require(
        config.width % config.heads == 0,
        f"width: got {config.width}, which {config.heads} heads cannot share evenly",
    )
    make = _on_models_trained_here if config.model_folder is None else _on_a_model
    return make(config, Stages(out, config), out)


def trained(config: Config, task: str, *, steps: int, seed: int, batch: int = 128) -> dict[str, Tensor]:
    """The weights after AdamW (100 steps of warm-up, then a cosine) on the answer at the last position, fresh prompts at every step."""
    data = TASKS[task](batch * steps, seed=1000 + seed)
    answers = data.correct
    if data.right is not None:
        # Any year above is right: one of them, at random.
        answers = torch.multinomial(data.right.float(), 1, generator=torch.Generator().manual_seed(seed))[
            :, 0
        ]
    model = network(config, data, seed)
    fit(
        model,
        [({"input_ids": a}, b) for a, b in zip(data.clean.split(batch), answers.split(batch))],
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01),
        loss=lambda logits, y: F.cross_entropy(logits[:, -1], y),
        callbacks=[
            Rate(lambda done: min(1.0, (done * steps + 1) / 100) * (1 + math.cos(math.pi * done)) / 2),
            ClipGradients(1.0),
        ],
        name=f"training ({task})",
    )
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def network(config: Config, pairs: TokenPairs, seed: int, weights: dict[str, Tensor] | None = None) -> Any:
    """A small GPT-2. GPT-2's own scale of 0.02 is for large widths: at 64 dimensions the heads then need many more steps to tell tokens apart."""
    model = gpt2(
        len(pairs.vocabulary),
        pairs.clean.shape[1],
        seed=seed,
        layers=config.layers,
        heads=config.heads,
        width=config.width,
        std=(0.3, 0.07),
    )
    if weights is not None:
        model.load_state_dict(weights)
    return model


@torch.no_grad()
def accuracy(model: Any, pairs: TokenPairs) -> float:
    """The share of clean prompts whose most probable next token is right."""
    top = model(input_ids=pairs.clean, use_cache=False).logits[:, -1].argmax(-1)
    right = top == pairs.correct if pairs.right is None else pairs.right[torch.arange(len(pairs)), top]
    return float(right.double().mean())


def compared(model: Any, pairs: TokenPairs, ig_steps: int) -> Comparison:
    """Maps of every rule set and of activation patching, their agreement, and the proof that the rules were active."""
    metric = logit_difference(pairs.correct, pairs.wrong)
    if pairs.right is not None:
        metric = probability_difference(pairs.right)
    prompts = (model, pairs.clean, pairs.corrupt, metric)
    truth = activation_patching(*prompts, sites=KINDS)

    def logits() -> Tensor:
        return model(input_ids=pairs.corrupt, use_cache=False).logits.detach()

    reference = logits()
    gate: tuple[str, ...] = ("half",)
    try:
        with relevance_rules(model, "half"):
            pass
    except InputError:
        gate = ()
    maps: dict[str, dict[str, Tensor]] = {}
    active: dict[str, dict[str, int]] = {}
    same = True
    for name, rules in RULE_SETS.items():
        wanted = (*rules, *gate) if {"ln", "identity"} <= set(rules) else rules
        result = relevance_patching(*prompts, sites=KINDS, rules=wanted)
        maps[name], active[name] = dict(result.scores), dict(result.coverage)
        with torch.enable_grad(), relevance_rules(model, wanted):
            same &= torch.equal(logits(), reference)
    if ig_steps:
        maps[IG] = dict(integrated_patching(*prompts, sites=KINDS, steps=ig_steps).scores)
    agreement = {name: fidelity(scores, truth) for name, scores in maps.items()}
    return Comparison(dict(truth.scores), maps, agreement, active, same)


def _on_models_trained_here(config: Config, stages: Stages, out: Path) -> Outcome:
    pairs = {seed: TASKS["ioi"](config.pairs, seed=100 + seed) for seed in config.seeds}
    weights = stages.each(
        "train {}",
        config.seeds,
        lambda seed: trained(config, "ioi", steps=config.steps, seed=seed),
        dict[str, Tensor],
    )
    models = {seed: network(config, pairs[seed], seed, weights[seed]).double() for seed in config.seeds}
    solved = [accuracy(models[seed], TASKS["ioi"](512, seed=500 + seed)) for seed in config.seeds]
    if config.save_models:
        for seed, model in models.items():
            save_language_model(model, pairs[seed].vocabulary, out / f"model-{seed}")
    after = stages.each(
        "patch {}",
        config.seeds,
        lambda seed: compared(models[seed], pairs[seed], config.ig_steps),
        Comparison,
    )
    before = stages.each(
        "untrained {}",
        config.seeds,
        lambda seed: compared(network(config, pairs[seed], seed).double(), pairs[seed], 0),
        Comparison,
    )
    options = {"latents": config.latents, "steps": config.dictionary_steps, "pairs": config.pairs}
    found = stages.each(
        "circuits {}",
        [seed for seed in config.seeds if seed in config.circuit_seeds],
        lambda seed: circuits(models[seed], seed=seed, **options),
        Circuits,
    )
    runs, blank, made = list(after.values()), list(before.values()), list(found.values())
    rows = []
    for task in config.other_tasks:
        others = TASKS[task](config.pairs, seed=100)
        weight = stages(
            f"train {task}",
            lambda task=task: trained(config, task, steps=2 * config.steps, seed=0),
            dict[str, Tensor],
        )
        model = network(config, others, 0, weight).double()
        result = stages(f"patch {task}", lambda m=model, p=others: compared(m, p, 0), Comparison)
        right = accuracy(model, TASKS[task](512, seed=500))
        rows.append([task, right, *(result.agreement[m][k].pearson for m in (ATP, RELP) for k in KINDS)])
    tables = [
        claims.agreement_table(
            runs, "Pearson (RMSE) with activation patching, trained models, mean over seeds"
        ),
        claims.agreement_table(blank, "The same on untrained models (control)"),
        Table(
            "Is the task solved?", ["seed", "accuracy"], [[str(s), a] for s, a in zip(config.seeds, solved)]
        ),
    ]
    if rows:
        columns = ["task", "accuracy", *(f"{m}, {k}" for m in ("AtP", "RelP") for k in KINDS)]
        tables.append(Table("Other tasks, Pearson with activation patching", columns, rows))
    return Outcome(
        SLUG,
        TITLE,
        config.preset,
        asdict(config),
        [
            *claims.claims_of(runs, config.ig_steps),
            *claims.controls_of(runs, blank, solved),
            *claims.circuit_claims(made),
        ],
        [*tables, *claims.circuit_tables(made)],
        [
            figures.scatter(runs[0], (ATP, RELP), out),
            figures.heat(runs[0], (ATP, RELP), out),
            figures.rule_sets(runs, out),
            *([figures.curves(made, out)] if made else []),
        ],
    )


def _on_a_model(config: Config, stages: Stages, out: Path) -> Outcome:
    folder = Path(str(config.model_folder))
    if not folder.is_dir():
        raise InputError(
            f"model_folder: {str(folder)!r} is no folder; save a causal language model with its tokenizer there (save_pretrained)"
        )
    model, tokenizer = load_language_model(str(folder), argument="model_folder")
    require(
        not getattr(model.config, "is_encoder_decoder", False),
        f"model_folder: {str(folder)!r} is an encoder-decoder; patching takes decoder-only models",
    )
    pairs = _pairs_for(tokenizer, config, folder.name)
    found = [stages("patch", lambda: compared(model, pairs, config.ig_steps), Comparison)]
    count, length = pairs.clean.shape
    title = f"Pearson (RMSE) with activation patching, {folder.name}, {count} pairs of {length} tokens"
    shown = [figures.scatter(found[0], (ATP, RELP), out), figures.rule_sets(found, out)]
    measured = claims.claims_of(found, config.ig_steps)
    return Outcome(
        SLUG, TITLE, config.preset, asdict(config), measured, [claims.agreement_table(found, title)], shown
    )


def _pairs_for(tokenizer: Any, config: Config, name: str) -> TokenPairs:
    """Prompts of one length, so that maps by position mean something, whose answers are one token each."""
    texts = ioi_pairs(config.pairs, seed=config.seeds[0])
    tokens = [tokenizer(list(side))["input_ids"] for side in (texts.clean, texts.corrupt)]
    lengths = [len(row) for row in tokens[0]]
    commonest = max(set(lengths), key=lengths.count)

    def whole(word: str) -> bool:
        ids = one_token(tokenizer, "\n", word)
        return len(ids) == 1 and ids[0] != getattr(tokenizer, "unk_token_id", None)

    keep = [
        k
        for k, (a, b) in enumerate(zip(*tokens))
        if len(a) == len(b) == commonest and whole(texts.correct[k]) and whole(texts.wrong[k])
    ]
    require(
        len(keep) >= 2,
        f"model_folder: of {len(texts)} pairs {len(keep)} have names that are one token of {name!r}, expected at least 2; the prompts are English with "
        f"names such as {texts.correct[0]!r}",
    )
    correct, wrong = (
        single_tokens(tokenizer, [side[k] for k in keep]) for side in (texts.correct, texts.wrong)
    )
    clean, corrupt = (torch.tensor([side[k] for k in keep]) for side in tokens)
    return TokenPairs(clean, corrupt, correct, wrong, [], "indirect object")
