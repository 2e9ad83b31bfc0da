"""The subcommand ``lineament dictionary``: train a dictionary at a site of a model, evaluate it, and look at its features; imports no torch before it runs."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

_KINDS = ("topk", "batchtopk", "relu", "gated", "jumprelu")
_EPILOG = """examples:
  lineament dictionary train ./gpt2-saved text.txt --site transformer.h.7:in --out sae --tokens 2000000
  lineament dictionary evaluate sae ./gpt2-saved text.txt --steering
  lineament dictionary dashboard sae ./gpt2-saved text.txt --out site

DIR may also be a folder of SAELens, dictionary_learning, sparsify or Gemma Scope, or one of the Hugging Face hub. A training that was cut off goes on
where it stopped when the same command is given again."""


def add_parser(subparsers: Any) -> Any:
    """Add ``dictionary`` to the commands of :mod:`lineament.cli`."""
    parser = subparsers.add_parser(
        "dictionary",
        help="train a dictionary of features at a site of a model, evaluate it, and look at its features",
        description="Which directions of a network's activations are features?",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for add, run in ((_train_parser, train), (_evaluate_parser, evaluate), (_dashboard_parser, dashboard)):
        one = add(actions)
        one.add_argument("--debug", action="store_true", help="show the traceback of an error")
        one.set_defaults(run=run)
        parser.names.update(one.names)
    return parser


def _shared(parser: Any) -> None:
    add = parser.add_argument
    add("--weights", metavar="FILE", help="a checkpoint for a factory's network")
    add(
        "--length",
        metavar="N",
        type=int,
        default=128,
        help="positions of a sequence of a text (default: 128)",
    )
    add("--samples", metavar="N", type=int, help="read at most so many sequences or samples")
    add("--device", metavar="NAME", help="cpu, cuda, mps (default: cpu)")
    add("--seed", metavar="N", type=int, default=0, help="of every random choice (default: 0)")


_MODEL = "a Hugging Face directory or name of a language model, or of a classifier; package.module:factory or file.py:factory"
_DATA = (
    "a text file or an .npy file of token ids for a language model; otherwise what `lineament audit` takes"
)


def _train_parser(actions: Any) -> Any:
    parser = actions.add_parser("train", help="train a dictionary on what passes at a site of a model")
    add = parser.add_argument
    add("model", metavar="MODEL", help=_MODEL)
    add("data", metavar="DATA", help=_DATA)
    add("--site", metavar="SITE", help="where, such as transformer.h.7:in or layer3")
    add("--out", metavar="DIR", required=True, help="the folder for the dictionary")
    add(
        "--config",
        metavar="FILE",
        help="the config.json of a dictionary, whose training is repeated; options given here come first",
    )
    add("--kind", metavar="KIND", help=f"{', '.join(_KINDS)} (default: topk)")
    add(
        "--width", metavar="M", type=int, help="how many features (default: 8 for each dimension of the site)"
    )
    add("--k", metavar="K", type=int, help="how many are on at once, of topk and batchtopk (default: 32)")
    add("--tokens", metavar="N", type=int, help="how many activations to see (default: 1000000)")
    add("--batch-size", metavar="N", type=int, help="activations in a step (default: 4096)")
    add("--learning-rate", metavar="R", type=float, help="of Adam (default: 2e-4 sqrt(2^14 / M))")
    add(
        "--gradient",
        metavar="HOW",
        help="rank by the loss's gradient too: labels, sampled or max_logit (default: none)",
    )
    add("--overwrite", action="store_true", help="replace a finished dictionary in that folder")
    _shared(parser)
    return parser


def _evaluate_parser(actions: Any) -> Any:
    parser = actions.add_parser(
        "evaluate", help="what a dictionary keeps of the activations and of the model"
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="a dictionary")
    add("model", metavar="MODEL", help=_MODEL)
    add("data", metavar="DATA", help=_DATA)
    add("--against", metavar="DIR2", help="another dictionary to compare with")
    add("--steering", action="store_true", help="also steer with its features, beside random directions")
    add("--out", metavar="DIR", help="the folder for evaluate.html and evaluate.json (default: DIR)")
    add("--site", metavar="SITE", help="where it sits, if DIR does not say it")
    _shared(parser)
    return parser


def _dashboard_parser(actions: Any) -> Any:
    parser = actions.add_parser("dashboard", help="its features as static pages that open from disk")
    add = parser.add_argument
    add("folder", metavar="DIR", help="a dictionary")
    add("model", metavar="MODEL", help=_MODEL)
    add("data", metavar="DATA", help=_DATA)
    add("--out", metavar="SITE", required=True, help="the folder for the pages")
    add("--site", metavar="SITE", help="where it sits, if DIR does not say it")
    add("--top", metavar="N", type=int, default=20, help="examples a feature (default: 20)")
    add(
        "--ablated",
        metavar="N",
        type=int,
        default=256,
        help="measure the KL without so many features (default: 256)",
    )
    _shared(parser)
    return parser


def train(a: argparse.Namespace) -> int:
    """Train, write the dictionary, and say how it went."""
    import json

    from lineament.cli.console import note
    from lineament.core import checks
    from lineament.core.files import possible_folder
    from lineament.dictionaries import saving
    from lineament.dictionaries.training import train_dictionary

    told: dict[str, Any] = {}
    if a.config is not None:
        path = Path(a.config)
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise checks.InputError(f"--config: {a.config!r} cannot be read ({error})") from error
        checks.require(
            isinstance(told, dict) and told.get("format") == saving.FORMAT,
            f"--config: {a.config!r} is no config.json of a trained dictionary",
        )
    info = (told.get("info") or {}).get("training") or {}
    out = possible_folder(a.out)
    checks.require(
        a.overwrite or not (out / saving.CONFIG).exists(),
        f"--out: {a.out!r} holds a finished dictionary; give --overwrite to replace it, or another folder",
    )
    site = str(a.site or told.get("site") or "")
    checks.require(site != "", "--site: got none, expected where to train, such as --site transformer.h.7:in")
    options: dict[str, Any] = {}
    for name, default in (
        ("tokens", 1_000_000),
        ("batch_size", 4096),
        ("learning_rate", "auto"),
        ("gradient", None),
        ("seed", 0),
    ):
        value = getattr(a, name)
        given = value is not None and (name != "seed" or value != 0 or not info)
        options[name] = value if given else info.get(name, default)
    made, model, data = _made(a, told, site)
    note(f"training a {type(made).__name__} of {made.width:,} features at {site}")
    rare = _rare(info)
    found = train_dictionary(
        model, data.data, site=site, dictionary=made, checkpoint=out / "training", **options, **({"options": rare} if rare else {})
    )  # fmt: skip
    found.dictionary.save_pretrained(out)
    last = found.history[-1]
    print(
        f"{found.tokens:,} activations: {last.fvu:.3g} of the variance is left, {last.l0:.3g} features are on, "
        f"{100 * found.dead:.3g} % are dead"
    )
    for line in found.notes:
        print(f"lineament: {line}", file=sys.stderr)
    print(f"Dictionary: {out.resolve()}")
    return 0


def _made(a: argparse.Namespace, told: dict[str, Any], site: str) -> tuple[Any, Any, Any]:
    """The dictionary as it begins, the model and the data."""
    from lineament.core import checks
    from lineament.dictionaries import autoencoders, saving
    from lineament.dictionaries.harvest import Harvest

    if a.kind is not None:
        checks.one_of("--kind", a.kind, _KINDS)
    given = _given(a)
    width = Harvest(given.model, given.data, site=site).width
    settings = dict(told.get("settings") or {})
    names = {
        "topk": "TopK",
        "batchtopk": "BatchTopK",
        "relu": "ReLU",
        "gated": "Gated",
        "jumprelu": "JumpReLU",
    }
    kind = names[a.kind] if a.kind is not None else str(told.get("kind") or "TopK")
    checks.require(
        hasattr(autoencoders, kind) and kind in saving.KINDS and kind != "Neurons",
        f"--config: a {kind} is not trained by steps; expected one of {', '.join(_KINDS)}",
    )
    if kind != told.get("kind"):
        settings = {}
    settings["d"] = width
    settings["width"] = a.width or settings.get("width") or 8 * width
    if kind in ("TopK", "BatchTopK"):
        settings["k"] = a.k or settings.get("k") or min(32, settings["width"])
    else:
        checks.require(a.k is None, f"--k: {kind} has none; its sparsity is that of its penalty")
    return saving.made_by_kind(kind, settings), given.model, given


def _rare(info: dict[str, Any]) -> Any:
    """The rare options of a training that is repeated."""
    from dataclasses import fields

    from lineament.dictionaries.trainer import TrainingOptions

    held = info.get("options")
    if not isinstance(held, dict):
        return None
    known = {each.name for each in fields(TrainingOptions)}
    kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in held.items() if k in known}
    return TrainingOptions(**kept)


class _Given:
    """A model and its data as the dictionaries take them."""

    def __init__(self, model: Any, data: Any, name: Any, outputs: Any, facts: list[tuple[str, Any]]):
        self.model, self.data, self.name, self.outputs, self.facts = model, data, name, outputs, facts


def _given(a: argparse.Namespace) -> _Given:
    from lineament.core.checks import number
    from lineament.load.language_models import is_language_model, load_language_model

    if a.samples is not None:
        number("samples", a.samples, low=1, integer=True)
    if is_language_model(a.model) or Path(a.data).suffix in (".txt", ".npy"):
        from lineament.load.token_sequences import token_sequences

        model, tokenizer = load_language_model(a.model, device=a.device)
        ids = token_sequences(tokenizer, a.data, length=a.length, most=a.samples)
        top = model.get_input_embeddings().num_embeddings
        number(f"data: token ids of {a.data}", int(ids.max()), low=0, high=top - 1, integer=True)

        def name(token: int) -> str:
            return tokenizer.decode([token])

        facts = [
            ("Model", a.model),
            ("Text", a.data),
            ("Sequences", f"{len(ids):,} of {ids.shape[1]} tokens"),
        ]
        return _Given(model, ids, name, name, facts)
    import torch

    from lineament.load.data import load_data
    from lineament.load.model_and_data import bring_together
    from lineament.load.models import load_model

    loaded = load_model(a.model, weights=a.weights)
    samples = load_data(a.data, samples=a.samples or 2000, seed=a.seed)
    with bring_together(loaded, samples, device=a.device, seed=a.seed) as found:
        inputs = torch.cat([found.inputs(part).cpu() for part in torch.arange(len(found)).split(256)])
        targets, classes, model = found.targets, found.classes, found.model
    facts = [("Model", a.model), ("Data", a.data), ("Samples", f"{len(inputs):,}")]
    return _Given(model, (inputs, targets), str, list(classes), facts)


def _in_order(a: argparse.Namespace) -> None:
    """Refuse a dictionary in the place of the model, where loading would only say that it is no model."""
    from lineament.core.checks import InputError
    from lineament.dictionaries.formats.loading import holds_dictionary

    if holds_dictionary(a.model):
        swapped = not holds_dictionary(a.folder)
        raise InputError(
            f"MODEL: {a.model!r} is a dictionary, expected the model that it belongs to"
            + (
                f"; DIR comes first: lineament dictionary {a.action} {shlex.join([a.model, a.folder, a.data])}"
                if swapped
                else ""
            )
        )


def _loaded(folder: str, a: argparse.Namespace, model: Any) -> Any:
    from lineament.dictionaries.formats.loading import load_dictionary

    made = load_dictionary(folder, site=a.site, model=model)
    return made.to(next(model.parameters()).device)


def dashboard(a: argparse.Namespace) -> int:
    """Write the pages, and say where they are."""
    from lineament.audit.feature_cards import complexities, feature_cards
    from lineament.cli.console import note
    from lineament.core.checks import number
    from lineament.core.files import possible_folder
    from lineament.dictionaries.examples import max_examples
    from lineament.report import dashboard as pages
    from lineament.report.outcome import versions

    number("--top", a.top, low=1, integer=True)
    number("--ablated", a.ablated, low=0, integer=True)
    possible_folder(a.out)
    _in_order(a)
    given = _given(a)
    dictionary = _loaded(a.folder, a, given.model)
    note("looking for examples")
    examples = max_examples(given.model, dictionary, given.data, top=a.top, gradient="sampled", seed=a.seed)
    cards = feature_cards(
        given.model, dictionary, given.data, examples, name=given.name, outputs=given.outputs, ablated=a.ablated, note=note,
        complexity=complexities(given.model, dictionary, given.data, note),
    )  # fmt: skip
    alive = int((examples.maxima != 0).sum())
    facts = [
        ("Dictionary", a.folder),
        *given.facts,
        ("Site", dictionary.site),
        ("Features", f"{examples.width:,}, {alive:,} ever on"),
        ("Activations", f"{examples.rows:,}"),
    ]
    notes = [
        f"Importance is the mean over {examples.rows:,} activations of |f w·g|, g being the gradient of the loss with labels drawn from the model: a first-order estimate. "
        "Complexity K is 1 less the mean over places of the R² with which a linear read-out finds the feature, on a fifth of the samples that it was not fitted to. "
        "What a feature writes is the direct path from its atom to the output, without the layers between.",
        *(getattr(dictionary, "info", {}).get("notes") or []),
    ]
    command = ["lineament", "dictionary", "dashboard", a.folder, a.model, a.data, "--out", a.out]
    index = pages.write(
        a.out, cards, title=f"{a.folder} at {dictionary.site}", facts=facts, notes=notes, command=shlex.join(command), versions=versions(),
    )  # fmt: skip
    print(f"Dashboard: {index.resolve()}")
    return 0


def evaluate(a: argparse.Namespace) -> int:
    """Evaluate, write evaluate.html and evaluate.json, and say the main numbers."""
    from lineament.cli import dictionary_evaluation
    from lineament.core.checks import require

    _in_order(a)
    given = _given(a)
    members = {a.folder: _loaded(a.folder, a, given.model)}
    if a.against is not None:
        require(a.against != a.folder, f"--against: {a.against!r} is the dictionary itself; name another")
        members[a.against] = other = _loaded(a.against, a, given.model)
        site = members[a.folder].site
        require(
            other.site == site or a.site is not None,
            f"--against: it sits at {other.site!r} and the dictionary at {site!r}; expected two of one site, or give --site",
        )
    return dictionary_evaluation.run(a, given, members)
