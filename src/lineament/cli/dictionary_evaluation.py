"""``lineament dictionary evaluate``: both modes, another dictionary, PCA and neurons with as many features, as a page and as JSON."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from lineament.cli.console import note
from lineament.core.files import output_folder, write_json, write_text
from lineament.dictionaries.autoencoders import Neurons
from lineament.dictionaries.effects import SteeringEffects, steering_effects
from lineament.dictionaries.evaluation import evaluate
from lineament.dictionaries.factorisations import pca
from lineament.dictionaries.fit import Fit, fit_of
from lineament.dictionaries.harvest import Harvest
from lineament.report import page
from lineament.report.figures import picture
from lineament.report.outcome import Table, versions
from lineament.report.section import Finding, Picture, Section
from lineament.report.text import plain

_LATENTS, _CONTEXTS = 32, 32


def run(a: argparse.Namespace, given: Any, members: dict[str, Any]) -> int:
    """Evaluate the dictionaries (the first is the one in question), write evaluate.html and evaluate.json."""
    first = next(iter(members.values()))
    model, data = given.model, given.data
    note("does it fit?")
    fit = fit_of(first, model, data, seed=a.seed)
    k = max(1, round(fit.l0))
    members = {**members, **_baselines(model, data, first, k)}
    rows: list[tuple[str, Any]] = []
    note("evaluating")
    found = evaluate(model, list(members.values()), data, mode="activation", seed=a.seed)
    rows += list(zip(members, found))
    ranked = {name: each for name, each in members.items() if hasattr(each, "selection")}
    if ranked:
        note("evaluating in gradient mode")
        again = evaluate(model, list(ranked.values()), data, mode="gradient", seed=a.seed)
        rows += list(zip(ranked, again))
    steered = _steered(a, given, first) if a.steering else None
    out = output_folder(a.out or (a.folder if Path(a.folder).is_dir() else "lineament-evaluate"))
    sections = [_fit_section(fit), _section(rows, k), *([_steering_section(steered)] if steered else [])]
    record = {
        "fit": fit.to_dict(),
        "evaluations": [{"dictionary": name, **each.to_dict()} for name, each in rows],
        **({"steering": steered.to_dict()} if steered else {}),
        "versions": versions(),
    }
    command = _command(a)
    html = page.render(
        f"{a.folder} at {first.site}", "What this dictionary keeps of the activations, and of the model.",
        [("Dictionary", a.folder), *given.facts, ("Site", first.site), ("Features", f"{len(first.atoms):,}")],
        [finding for section in sections for finding in section.findings], sections,
        command=command, versions=versions(), kicker="Lineament dictionary",
    )  # fmt: skip
    write_json(out / "evaluate.json", plain(record))
    write_text(out / "evaluate.html", html)
    for name, each in rows:
        print(
            f"{name} ({each.mode} mode): {each.fvu:.3g} of the variance is left, {each.l0:.3g} features are on, KL {each.kl:.3g} nats, "
            f"{100 * each.recovered_mean:.3g} % of the loss recovered (mean ablation), {100 * each.dead:.3g} % dead"
        )
    if steered is not None:
        print(
            f"steering by {steered.strength:g} typical norm{'' if steered.strength == 1 else 's'}: {len(steered.latents)} of its features move the output by "
            f"{float(steered.kl.mean()):.3g} nats on the mean, random directions by {float(steered.random_kl.mean()):.3g}; "
            f"{100 * steered.above:.3g} % of them further than 95 % of those"
        )
    for line in fit.likely:
        print(f"likely wrong: {line}")
    print(f"Page: {(out / 'evaluate.html').resolve()}")
    return 0


def _baselines(model: Any, data: Any, dictionary: Any, k: int) -> dict[str, Any]:
    """PCA with k components and the k strongest neurons a row."""
    rows = next(Harvest(model, data, site=dictionary.site).batches(8192))
    x = rows.x.float()
    neurons = Neurons(x.shape[1], k=min(k, x.shape[1]), site=dictionary.site).to(x.device)
    neurons.mean.copy_(x.mean(0))
    components = pca(x, min(k, *x.shape), site=dictionary.site)
    return {f"PCA, {len(components.atoms)} components": components, f"neurons, {neurons.k} a row": neurons}


def _steered(a: argparse.Namespace, given: Any, dictionary: Any) -> SteeringEffects:
    note("steering")
    ids = given.data if not isinstance(given.data, tuple) else given.data[0]
    contexts = ids[:_CONTEXTS]
    return steering_effects(
        given.model, dictionary, contexts, latents=min(_LATENTS, len(dictionary.atoms)), seed=a.seed
    )


def _fit_section(fit: Fit) -> Section:
    chance = f"{fit.fvu:.3g} of the variance is left ({fit.chance_fvu:.3g} for activations with permuted coordinates)"
    text = (
        f"On {fit.tokens:,} activations {chance}; the output moves by {fit.kl:.3g} nats on the reconstruction, by {fit.kl_ablated:.3g} with every activation "
        f"at the mean, and by {fit.kl_permuted:.3g} on other tokens' reconstructions."
    )
    findings = [Finding("warning", f"Likely wrong: {line}.", key="misfit") for line in fit.likely]
    if not fit.fits and not findings:
        findings = [Finding("warning", f"The dictionary does not fit: {chance}.", key="misfit")]
    return Section(
        "fit", "Does it fit this model?", "warning" if findings else "good", f"{100 * fit.fvu:.3g} %", "of the variance is left", text,
        method="", numbers=plain(fit.to_dict()), findings=findings or [Finding("good", f"It fits: {chance}.", key="fits")],
    )  # fmt: skip


def _section(rows: list[tuple[str, Any]], k: int) -> Section:
    _, first = rows[0]
    ratio = first.kl / first.kl_random if first.kl_random else float("nan")
    error = first.errors.get("kl", float("nan"))
    text = (
        f"Over {first.tokens:,} tokens of {first.sequences:,} sequences, in {first.mode} mode, the model's output moves by {first.kl:.3g} nats (standard error {error:.2g} over "
        f"sequences) on the reconstruction, {ratio:.2g} times as far as under a random error of each token's norm. {100 * first.recovered_mean:.3g} % of the loss is "
        f"recovered against mean ablation, {100 * first.recovered_zero:.3g} % against zero ablation."
    )
    columns = {
        "mode": "mode", "variance left": "fvu", "features on": "l0", "KL (nats)": "kl", "KL, random error": "kl_random", "CE": "ce", "CE on it": "ce_substituted",
        "recovered, mean": "recovered_mean", "recovered, zero": "recovered_zero", "same best output": "agreement", "dead": "dead", "on in over a tenth": "dense",
        "cosine": "cosine", "shrinkage": "shrinkage", "nearest atom": "nearest_atom", "suppressing": "suppressing",
    }  # fmt: skip
    table = Table(
        f"Dictionaries, PCA and neurons with {k} features a token",
        ("dictionary", *columns),
        [[label, *(getattr(each, key) for key in columns.values())] for label, each in rows],
    )
    simple = [
        (label, each)
        for label, each in rows[1:]
        if label.startswith(("PCA", "neurons")) and each.kl <= first.kl
    ]
    findings = [
        Finding(
            "warning",
            f"{label} keep more of the model's output ({each.kl:.3g} nats) than the dictionary ({first.kl:.3g}).",
            key="baseline better",
        )
        for label, each in simple
    ] or [
        Finding(
            "good",
            f"It keeps more of the model's output than PCA and neurons with as many features ({first.kl:.3g} nats).",
            key="better than baselines",
        )
    ]
    return Section(
        "quality", "What does it keep?", findings[0].severity, f"{first.kl:.3g}", "nats of KL on the reconstruction", text, pictures=[_front(rows)], tables=[table],
        method="", numbers=plain({f"{label}, {each.mode}": each.to_dict() for label, each in rows}), findings=findings,
    )  # fmt: skip


def _front(rows: list[tuple[str, Any]]) -> Picture:
    def draw(ax: Any) -> None:
        for k, (label, each) in enumerate(rows):
            mark = "o" if each.mode == "activation" else "^"
            ax.plot(
                [max(each.fvu, 1e-6)],
                [max(each.kl, 1e-9)],
                mark,
                color=f"C{k % 7}",
                label=f"{label}, {each.mode}",
            )
        first = rows[0][1]
        ax.plot(
            [max(first.fvu, 1e-6)],
            [max(first.kl_random, 1e-9)],
            "x",
            color="C7",
            label="random error of equal norm",
        )
        ax.set(xlabel="share of the variance left", ylabel="KL (nats)", xscale="log", yscale="log")
        ax.legend(fontsize="small")

    return picture(
        draw,
        alt="; ".join(
            f"{label} ({each.mode}): {each.fvu:.3g} of the variance left, KL {each.kl:.3g}"
            for label, each in rows
        ),
        caption="Variance left against the KL of the model's output; lower left is better. Circles: activation mode, triangles: gradient mode.",
    )


def _steering_section(found: SteeringEffects) -> Section:
    own, random = float(found.kl.mean()), float(found.random_kl.mean())
    text = (
        f"Adding {found.strength:g} typical norm{'' if found.strength == 1 else 's'} ({found.typical_norm:.3g}) of a feature's direction at the last token moves the output by {own:.3g} nats on the mean of "
        f"{len(found.latents)} features drawn at random and {found.contexts} contexts; random directions of equal norm move it by {random:.3g}. {100 * found.above:.3g} % of the features "
        "move it further than 95 % of the random directions."
    )
    silent, active = (value[value.isfinite()] for value in (found.kl_silent, found.kl_active))
    if len(silent) and len(active):
        text += f" Where the feature is silent it moves by {float(silent.mean()):.3g}, where it is on by {float(active.mean()):.3g}."
    table = Table(
        "Features, most moving first",
        ("feature", "KL (nats)", "KL where silent", "mean |logit change|", "entropy of the change"),
        [
            [
                int(found.latents[i]),
                float(found.kl[i]),
                float(found.kl_silent[i]),
                float(found.logit_change[i]),
                float(found.entropy[i]),
            ]
            for i in found.kl.argsort(descending=True)[:20].tolist()
        ],
    )
    state = "good" if own > random else "note"
    words = "further than" if own > random else "no further than"
    return Section(
        "steering", "Do its features steer?", state, f"{own:.3g}", f"nats on the mean, {random:.3g} for random directions", text, tables=[table], method="",
        numbers=plain(found.to_dict()),
        findings=[Finding(state, f"Its features move the output {words} random directions of equal norm ({own:.3g} against {random:.3g} nats).", key="steering")],
    )  # fmt: skip


def _command(a: argparse.Namespace) -> str:
    words = ["lineament", "dictionary", "evaluate", a.folder, a.model, a.data]
    for name, default in (
        ("against", None),
        ("site", None),
        ("weights", None),
        ("samples", None),
        ("out", None),
        ("length", 128),
        ("seed", 0),
    ):
        value = getattr(a, name)
        words += [] if value == default else [f"--{name}", str(value)]
    return shlex.join(words + (["--steering"] if a.steering else []))
