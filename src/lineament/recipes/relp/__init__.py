"""RelP: do LRP coefficients stand for activation patching better than gradients do, and where?

Rezaei Jafari, Eberle, Khakzar, Nanda 2025, arXiv 2508.21258. ``quick`` and ``small`` train small GPT-2s on synthetic indirect objects; ``paper`` takes a language
model that the user brings and text prompts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError, require
from lineament.data.patching_tasks import TokenPairs, ioi_pairs, save_language_model
from lineament.explain.patching.activation import activation_patching
from lineament.explain.patching.integrated import integrated_patching
from lineament.explain.patching.metrics import logit_difference, probability_difference, single_tokens
from lineament.explain.patching.relevance import relevance_patching
from lineament.explain.patching.result import fidelity
from lineament.explain.relevance.rules import relevance_rules
from lineament.load.language_models import load_language_model
from lineament.recipes.kit.presets import presets
from lineament.recipes.relp.circuits import COUNTS, circuits
from lineament.recipes.relp.claims import (
    ATP,
    IG,
    KINDS,
    RELP,
    RULE_SETS,
    agreement_table,
    circuit_claims,
    claims_of,
    controls_of,
    mean_of,
    over,
)
from lineament.recipes.relp.figures import curves, heat, rule_sets, scatter
from lineament.recipes.relp.training import TASKS, accuracy, network, train
from lineament.report.outcome import Outcome, Table

SLUG = "relp"
TITLE = "RelP: Faithful and Efficient Circuit Discovery in Language Models via Relevance Patching"


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
    stages = Checkpoint(out / ".stages", asdict(config))
    return (
        _on_models_trained_here(config, stages, out)
        if config.model_folder is None
        else _on_a_model(config, stages, out)
    )


def compared(model: Any, pairs: TokenPairs, *, ig_steps: int) -> dict[str, Any]:
    """Maps of every rule set and of activation patching, their agreement, and the proof that the rules were active."""
    metric = logit_difference(pairs.correct, pairs.wrong)
    if pairs.right is not None:
        metric = probability_difference(pairs.right)
    options: dict[str, Any] = {"sites": KINDS}
    truth = activation_patching(model, pairs.clean, pairs.corrupt, metric, **options)
    maps: dict[str, dict[str, Tensor]] = {}
    active: dict[str, dict[str, int]] = {}
    with torch.no_grad():
        reference = model(input_ids=pairs.corrupt, use_cache=False).logits
    same = True
    gated = True
    for name, rules in RULE_SETS.items():
        wanted = [*rules]
        if "ln" in rules and "identity" in rules and gated:
            try:
                with relevance_rules(model, "half"):
                    wanted.append("half")
            except InputError:
                gated = False
        result = relevance_patching(model, pairs.clean, pairs.corrupt, metric, rules=wanted, **options)
        maps[name], active[name] = dict(result.scores), dict(result.coverage)
        with torch.enable_grad(), relevance_rules(model, wanted):
            same &= bool(
                torch.equal(model(input_ids=pairs.corrupt, use_cache=False).logits.detach(), reference)
            )
    if ig_steps:
        maps[IG] = dict(
            integrated_patching(model, pairs.clean, pairs.corrupt, metric, steps=ig_steps, **options).scores
        )
    agreement = {
        name: {k: f.to_dict() for k, f in fidelity(of, truth.scores).items()} for name, of in maps.items()
    }
    return {
        "truth": dict(truth.scores), "maps": maps, "agreement": agreement, "active": active, "same logits": same,
        "metric": [truth.source, truth.base],
    }  # fmt: skip


def _on_models_trained_here(config: Config, stages: Checkpoint, out: Path) -> Outcome:
    shape = {"layers": config.layers, "width": config.width, "heads": config.heads}
    trained, untrained, accuracies, found = [], [], [], []
    for seed in config.seeds:
        pairs = TASKS["ioi"](config.pairs, seed=100 + seed)
        weights = stages.stage(
            f"train {seed}", lambda seed=seed: train("ioi", steps=config.steps, seed=seed, **shape)
        )
        model = _loaded(pairs, weights, seed, shape)
        accuracies.append(accuracy(model, TASKS["ioi"](512, seed=500 + seed)))
        if config.save_models:
            save_language_model(model, pairs.vocabulary, out / f"model-{seed}")
        trained.append(
            stages.stage(f"patch {seed}", lambda m=model, p=pairs: compared(m, p, ig_steps=config.ig_steps))
        )
        blank = _loaded(pairs, None, seed, shape)
        untrained.append(
            stages.stage(f"untrained {seed}", lambda m=blank, p=pairs: compared(m, p, ig_steps=0))
        )
        if seed in config.circuit_seeds:
            options = {
                "latents": config.latents,
                "steps": config.dictionary_steps,
                "pairs": config.pairs,
                "seed": seed,
            }
            found.append(stages.stage(f"circuits {seed}", lambda m=model, o=options: circuits(m, **o)))
    others = []
    for task in config.other_tasks:
        pairs = TASKS[task](config.pairs, seed=100)
        weights = stages.stage(
            f"train {task}", lambda task=task: train(task, steps=2 * config.steps, seed=0, **shape)
        )
        model = _loaded(pairs, weights, 0, shape)
        result = stages.stage(f"patch {task}", lambda m=model, p=pairs: compared(m, p, ig_steps=0))
        others.append((task, accuracy(model, TASKS[task](512, seed=500)), result))
    tables = [
        agreement_table(trained, "Pearson (RMSE) with activation patching, trained models, mean over seeds"),
        agreement_table(untrained, "The same on untrained models (control)"),
        Table(
            "Is the task solved?",
            ["seed", "accuracy"],
            [[str(s), a] for s, a in zip(config.seeds, accuracies)],
        ),
    ]
    if others:
        rows = [
            [task, solved, *(r["agreement"][m][k]["pearson"] for m in (ATP, RELP) for k in KINDS)]
            for task, solved, r in others
        ]
        columns = ["task", "accuracy", *(f"{m}, {k}" for m in ("AtP", "RelP") for k in KINDS)]
        tables.append(Table("Other tasks, Pearson with activation patching", columns, rows))
    figures = [
        scatter(trained[0]["truth"], {m: trained[0]["maps"][m] for m in (ATP, RELP)}, KINDS, out),
        heat(
            {
                "activation patching": trained[0]["truth"]["resid_pre"],
                **{m: trained[0]["maps"][m]["resid_pre"] for m in (ATP, RELP)},
            },
            out,
        ),
        rule_sets({m: {k: mean_of(trained, m, k) for k in KINDS} for m in trained[0]["maps"]}, KINDS, out),
    ]
    if found:
        figures.append(curves(found, COUNTS, out))
        for which in ("faithfulness", "completeness"):
            rows = [[m, *(over(found, m, which, i) for i in range(len(COUNTS)))] for m in found[0]["curves"]]
            tables.append(
                Table(
                    f"Circuits of dictionary features: {which} by nodes (of {found[0]['nodes']})",
                    ["method", *map(str, COUNTS)],
                    rows,
                )
            )
        seconds = [[m, sum(f["seconds"][m] for f in found) / len(found)] for m in found[0]["seconds"]]
        tables.append(Table("Time for all effects", ["method", "seconds"], seconds))
        unexplained = [u for f in found for u in f["unexplained"]]
        tables.append(
            Table(
                "Dictionaries",
                ["measure", "value"],
                [["largest share of variance not explained", max(unexplained)]],
            )
        )
    claims = [
        *claims_of(trained, config.ig_steps),
        *controls_of(trained, untrained, accuracies),
        *circuit_claims(found),
    ]
    return Outcome(SLUG, TITLE, config.preset, asdict(config), claims, tables, figures)


def _on_a_model(config: Config, stages: Checkpoint, out: Path) -> Outcome:
    folder = Path(str(config.model_folder))
    if not folder.is_dir():
        raise InputError(
            f"--model-folder: {str(folder)!r} is no folder; save a causal language model with its tokenizer there (save_pretrained)"
        )
    model, tokenizer = load_language_model(str(folder), argument="model_folder")
    require(
        not getattr(model.config, "is_encoder_decoder", False),
        f"--model-folder: {str(folder)!r} is an encoder-decoder; patching takes decoder-only models",
    )
    texts = ioi_pairs(config.pairs, seed=config.seeds[0])
    tokens = [tokenizer(list(side))["input_ids"] for side in (texts.clean, texts.corrupt)]
    # Prompts of one length, so that maps by position mean something.
    lengths = [len(row) for row in tokens[0]]
    most = max(set(lengths), key=lengths.count)
    keep = [k for k, (a, b) in enumerate(zip(*tokens)) if len(a) == len(b) == most]
    whole = [
        k for k in keep if _is_whole(tokenizer, texts.correct[k]) and _is_whole(tokenizer, texts.wrong[k])
    ]
    require(
        len(whole) >= 2,
        f"--model-folder: of {len(texts)} pairs {len(whole)} have names that are one token of {folder.name!r}, expected at least 2; the prompts are English with "
        f"names such as {texts.correct[0]!r}",
    )
    keep = whole
    correct, wrong = (
        single_tokens(tokenizer, [side[k] for k in keep]) for side in (texts.correct, texts.wrong)
    )
    clean, corrupt = (torch.tensor([side[k] for k in keep]) for side in tokens)
    pairs = TokenPairs(clean, corrupt, correct, wrong, [], "indirect object")
    found = [stages.stage("patch", lambda: compared(model, pairs, ig_steps=config.ig_steps))]
    tables = [
        agreement_table(
            found,
            f"Pearson (RMSE) with activation patching, {folder.name}, {len(keep)} pairs of {most} tokens",
        )
    ]
    figures = [
        scatter(found[0]["truth"], {m: found[0]["maps"][m] for m in (ATP, RELP)}, KINDS, out),
        rule_sets({m: {k: mean_of(found, m, k) for k in KINDS} for m in found[0]["maps"]}, KINDS, out),
    ]
    return Outcome(
        SLUG, TITLE, config.preset, asdict(config), claims_of(found, config.ig_steps), tables, figures
    )


def _is_whole(tokenizer: Any, word: str) -> bool:
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    return len(ids) == 1 and ids[0] != getattr(tokenizer, "unk_token_id", None)


def _loaded(pairs: TokenPairs, weights: dict[str, Tensor] | None, seed: int, shape: dict[str, int]) -> Any:
    model = network(len(pairs.vocabulary), pairs.clean.shape[1], seed=seed, **shape)
    if weights is not None:
        model.load_state_dict(weights)
    return model.double()
