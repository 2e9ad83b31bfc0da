"""The main job: one model, some data, all lenses, one report.

Everything is checked before any lens looks. Each lens's section is a stage of a checkpoint in the output folder, so that a killed
run goes on where it stopped and gives the same report. A lens that fails says so in its section, and the rest goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lineament.audit import default
from lineament.audit.catalogue import Lens, all_lenses
from lineament.audit.catalogue import chosen as chosen_lenses
from lineament.audit.data_options import DataOptions
from lineament.audit.empty_answers import weighed
from lineament.audit.language_run import audit_language
from lineament.audit.phrases import places, sentence
from lineament.audit.stages import (
    STAGES,
    Report,
    in_processes,
    opened,
    said_again,
    sections,
    threads,
    verdict,
    written,
)
from lineament.audit.subject import Subject
from lineament.core import checks, shards
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError, require, show, suggest
from lineament.core.models import device_of
from lineament.core.sites.depth import default_sites
from lineament.core.sites.naming import sites as site_names
from lineament.data.samples import Samples
from lineament.data.shortcut_digits import MARK
from lineament.explain.saliency.methods import METHODS as SALIENCY
from lineament.load.arrays import arrays_for
from lineament.load.data import Data, load_data
from lineament.load.hub import architectures, text_task
from lineament.load.language_models import is_language_model, load_language_model
from lineament.load.loaded import Loaded
from lineament.load.model_and_data import bring_together
from lineament.load.models import load_model
from lineament.load.prompts import TASKS, holds_objects, is_prompts
from lineament.load.texts import between
from lineament.load.weights import digest
from lineament.report.outcome import versions
from lineament.report.section import Finding, Section


@dataclass(frozen=True)
class AuditOptions(DataOptions):
    """What an audit rarely needs to be told, beside how the data are read: :class:`~lineament.audit.data_options.DataOptions`.

    Attributes:
        weights: a checkpoint for a network that a factory makes, see :func:`lineament.load.checkpoints.read_checkpoint`.
        sites: sites or globs; by default the blocks of the network, up to eight, and the input of its head.
        output: which of a model's outputs is looked at, by name or number, where it gives a tuple, a dictionary or a dataclass; ``logits`` by default.
        filler: a masked language model (a Hugging Face directory or name), whose words stand in for those that are taken from a text.
        embedding: the site where the embedding passes; without another task the network is then taken for an embedding.
        method, gaze_site: of the saliency maps, see :func:`lineament.explain.saliency.maps.saliency`.
        faithfulness: how the maps are judged: ``"scores"``, or ``"diffroar"``, which also trains the architecture anew on what they keep.
        text: of a language model, a file with a long text, see :func:`lineament.audit.language_run.audit_language`.
        layout: of a language model of no known family, see :func:`lineament.audit.language_run.audit_language`.
    """

    weights: str | Path | None = None
    sites: Sequence[str] = ()
    method: str = "norm_grad"
    gaze_site: str | None = None
    faithfulness: str = "scores"
    output: str | int | None = None
    filler: str | None = None
    layout: Mapping[str, str] | None = None
    text: str | Path | None = None
    embedding: str | None = None


def audit(
    model: Any = None,
    data: Data | None = None,
    *,
    out: str | Path,
    lenses: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    groups: Any = None,
    samples: int = 2000,
    device: str | torch.device | None = None,
    seed: int = 0,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda line: None,
    options: AuditOptions = AuditOptions(),
) -> Report:
    """What does this network rely on, and how does it hold it?

    Args:
        model: an ``nn.Module``, for texts a pair (module, tokenizer), or what :func:`lineament.load.models.load_model` takes; ``None``, without data, trains a small network on digits
            with a planted mark and audits that.
        data: what :func:`lineament.load.data.load_data` takes. Prompts
            (:func:`lineament.load.prompts.load_prompts`) go with a language model: see :func:`lineament.audit.language_run.audit_language`.
        out: the folder for `report.html` and `report.json`.
        lenses: names of the files in :mod:`lineament.audit.lenses`; all by default.
        classes: names of the classes in the order of the model's outputs; where the data name their classes, labels follow the names.
        groups: the array that names each sample's group, by name; for a pair, the array itself.
        samples: read at most so many, chosen at random from ``seed``.
        device: where to look at the model; where it is, by default.
        seed: of every random choice.
        overwrite: replace a finished report in ``out``.
        note: a progress callback, called with a line for each step.
        options: what is rarely needed.

    Returns:
        A :class:`Report`; the model is left as it was.

    Raises:
        InputError: whatever cannot be used, before any lens looks.

    >>> import tempfile
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    >>> found = audit(net, "digits", out=tempfile.mkdtemp(), lenses=["accuracy"], samples=50)
    >>> found["accuracy"].numbers["overall"]["count"]
    50
    """
    if _is_language(model, data):
        return audit_language(
            str(model),
            str(data),
            out=out,
            lenses=lenses,
            samples=samples,
            device=None if device is None else str(device),
            seed=seed,
            overwrite=overwrite,
            note=note,
            layout=options.layout,
            text=options.text,
        )
    require(
        not options.layout, "layout: it says where the components of a language model are, and this is none"
    )
    require(options.text is None, "text: it is read by a lens of language models, and this is none")
    chosen = chosen_lenses(lenses, language=False)
    checks.one_of("method", options.method, list(SALIENCY))
    checks.one_of("faithfulness", options.faithfulness, ("scores", "diffroar"))
    checks.number("samples", samples, low=2, integer=True)
    checks.number("batch_size", options.batch_size, low=1, integer=True)
    checks.seed("seed", seed)
    asked = (model, data, chosen, lenses is None, classes, groups, samples, device, seed, note, options)
    return in_processes(out, overwrite, lambda folder: _audited(folder, *asked))


def _audited(
    folder: Path,
    model: Any,
    data: Data | None,
    chosen: Sequence[Lens],
    every: bool,
    classes: Sequence[str] | None,
    groups: Any,
    samples: int,
    device: str | torch.device | None,
    seed: int,
    note: Callable[[str], None],
    options: AuditOptions,
) -> Report:
    note = shards.noted(note)
    device = shards.own_device(device)
    note("reading the model and the data")
    if model is None:
        require(
            data is None and options.weights is None,
            "model: got none, but data or weights; pass the model first",
        )
        loaded = _embedded(folder, seed)
        held = load_data("shortcut-digits", samples=samples, seed=seed, classes=classes)
    else:
        if data is None:
            raise InputError(
                "data: got none, expected an .npz file, a folder of images by class, a Hugging Face data set or 'digits'"
            )
        loaded = load_model(model, weights=options.weights)
        held = load_data(
            data,
            samples=samples,
            seed=seed,
            inputs=options.inputs or arrays_for(loaded.model, data),
            targets=options.targets,
            groups=groups,
            classes=classes,
            split=options.split,
            image_size=loaded.size if options.image_size is None else options.image_size,
            tokenizer=loaded.tokenizer,
            text_task="tokens"
            if options.task == "dense" and loaded.text_task == "classes"
            else loaded.text_task,
        )
        if classes is not None:
            loaded = replace(loaded, classes=())  # those given come before the model's own
    shards.alike("model", digest(loaded.model) if shards.count() > 1 else "")
    shards.alike("data", _content(held) if shards.count() > 1 else "")
    named = _site_names(loaded.model, options.sites, options.gaze_site, options.embedding)
    fitting = bring_together(
        loaded,
        held,
        task="embedding" if options.embedding is not None and options.task == "auto" else options.task,
        normalize=options.normalize,
        device=device,
        batch_size=options.batch_size,
        seed=seed,
        output=options.output,
    )
    filler = None
    if options.filler is not None:
        require(loaded.tokenizer is not None, "filler: it fills in words, and this network takes no texts")
        filler = load_language_model(options.filler, masked=True, argument="filler")
    with fitting as fitted:
        example = fitted.inputs(fitted.example)
        subject = Subject(
            **vars(fitted),
            sites=named or default_sites(loaded.model, example),
            method=options.method,
            gaze_site=options.gaze_site,
            faithfulness=options.faithfulness,
            fresh=_drawn_anew(loaded),
            tokenizer=loaded.tokenizer,
            filler=filler,
            folder=str(folder),
            embedding=options.embedding,
            command=_command(model, data, classes, seed, options),
        )
        if every:
            if subject.task == "embedding":
                chosen = [lens for lens in all_lenses(language=False).values() if lens.embedding]
            chosen = [
                lens
                for lens in chosen
                if not lens.optional
                or not (lens.module().applies(subject) or (subject.task == "dense" and not lens.dense))
            ]
        for line in subject.notes:
            note(line)
        with threads(subject.flops * options.batch_size):
            found, checkpoint = sections(folder, _key(subject, loaded), chosen, subject, note)
        found = weighed(found, subject)

    def report() -> Report:
        told, linked = verdict(chosen, found), _linked(found)
        return written(
            folder,
            checkpoint,
            chosen,
            _title(loaded),
            _facts(subject, loaded),
            [*_planted(found), *told] if model is None else told,
            linked,
            {
                "notes": [*map(sentence, subject.notes), *places(subject.sites)],
                "sites": list(subject.sites),
                "task": subject.task,
                "classes": list(subject.classes),
            },
        )

    return shards.agreed("the report", report)


def _command(
    model: Any, data: Any, classes: Sequence[str] | None, seed: int, options: AuditOptions
) -> tuple[str, ...]:
    """How other commands name this network and these data; empty where a command cannot."""
    if model is None:
        return () if seed else ("lineament.audit.default:trained", "shortcut-digits")
    if not isinstance(model, str | Path) or not isinstance(data, str | Path):
        return ()
    weights = [] if options.weights is None else ["--weights", str(options.weights)]
    said = said_again(
        classes, options.inputs, options.targets, options.split, options.image_size, options.normalize
    )
    return (str(model), str(data), *weights, *said)


def _linked(sections: Sequence[Section]) -> list[Section]:
    """Simple attributes are asked for by one lens, simple features by another: the first leads to the second where both have an answer."""
    if not any(s.name == "complexity" and s.status not in ("skipped", "failed") for s in sections):
        return list(sections)
    link = ("The features that are simple, and whether they decide", "#complexity")
    return [replace(s, links=[*s.links, link]) if s.name == "shortcuts" else s for s in sections]


def _embedded(folder: Path, seed: int) -> Loaded:
    """The built-in example, trained now, or by an earlier run that was cut off."""
    key = {"default": seed, "torch": torch.__version__, "epoch": 1}

    def trained() -> dict[str, torch.Tensor]:
        with threads(0.0):
            stages = Checkpoint(opened(folder) / STAGES / "training", key)
            return stages.stage("train", lambda: default.train(seed))

    state = shards.agreed("the training", trained)
    network = default.small_cnn(seed).eval()
    network.load_state_dict(state)
    return Loaded(network, "a small network trained just now on digits with a planted mark", "default")


def _is_language(model: Any, data: Any) -> bool:
    """Whether this is a language model and prompts; one without the other is refused."""
    if is_language_model(model):
        require(
            is_prompts(data),
            f"data: got {'none' if data is None else show(data)} for a language model, expected a .txt file of prompts, a .jsonl file of prompts or prompt pairs, "
            f"or a task{suggest(str(data), TASKS)}",
        )
        return True
    if not is_prompts(data) or (text_task(architectures(model)) and str(data) not in TASKS):
        return False
    pair = isinstance(model, (tuple, list)) and len(model) == 2 and text_task([type(model[0]).__name__])
    if pair or (holds_objects(data) and ":" in str(model)):
        return False
    # What is not on this disk may be a name of the hub.
    require(
        isinstance(model, str) and ":" not in model and not Path(model).exists(),
        f"model: {show(model)} is no language model, and {str(data)!r} holds prompts; expected a Hugging Face directory or name of one",
    )
    return True


def _planted(sections: Sequence[Section]) -> list[Finding]:
    """The built-in example's answer is known: whether the patch that the gaze lens found is the planted mark."""
    gaze = next((s for s in sections if s.name == "gaze" and "place" in s.numbers), None)
    if gaze is None:
        return []
    found = gaze.numbers["place"]
    window = found["window"]
    covered = 1.0
    for edge, side, mark in (("top", "height", MARK[0]), ("left", "width", MARK[1])):
        shared = min(window[edge] + window[side], mark.stop) - max(window[edge], mark.start)
        covered *= max(shared, 0) / (mark.stop - mark.start)
    if found["decides"] and covered >= 0.5:
        return [
            Finding(
                "warning",
                "The network relies on the mark: the patch that decides its answers is where this example planted one, the small pattern that went with "
                "the class while it learned.",
                "gaze",
                advice="Nothing here, where it was planted on purpose. Audit a network of yours: lineament audit file.py:factory data.npz --weights model.safetensors.",
            )
        ]
    return [Finding("note", "The planted mark was not found to decide the network's answers.", "gaze")]


def _site_names(
    model: nn.Module, sites: Sequence[str], gaze_site: str | None, embedding: str | None
) -> tuple[str, ...]:
    """The sites that the patterns name, each once."""
    for what, site in (("gaze_site", gaze_site), ("embedding", embedding)):
        if site is not None:
            named = site_names(model, site)
            require(len(named) == 1, f"{what}: {site!r} names {len(named)} sites, expected one")
    return tuple(dict.fromkeys(name for pattern in sites for name in site_names(model, pattern)))


def _key(subject: Subject, loaded: Loaded) -> dict[str, Any]:
    """Everything that decides a section: the network, the samples, the options."""
    return {
        "model": digest(loaded.model),
        "data": _content(subject.samples, subject.outputs),
        "names": [subject.classes, subject.samples.group_names],
        "layout": str(subject.layout),
        "options": [
            subject.task,
            subject.sites,
            subject.method,
            subject.gaze_site,
            subject.batch_size,
            subject.seed,
            subject.faithfulness,
            None if subject.filler is None else digest(subject.filler[0]),
            subject.embedding,
        ],
        "device": str(device_of(subject.model)),
        "versions": versions(),
    }


def _content(held: Samples, *more: torch.Tensor) -> str:
    data = hashlib.sha256()
    for value in (held.inputs, held.targets, held.groups, held.lengths, *held.others.values(), *more):
        if value is not None:
            data.update(f"{value.dtype}{tuple(value.shape)}".encode())
            data.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return data.hexdigest()


def _drawn_anew(loaded: Loaded) -> Callable[[int], nn.Module] | None:
    """What makes the audited architecture with fresh weights, under the random state of the caller; ``None`` if nothing can."""
    from lineament.train.stacked import refreshed

    if loaded.kind in ("export", "script", "onnx"):
        return None
    if loaded.kind == "default":
        return default.small_cnn
    config = getattr(loaded.model, "config", None)
    if loaded.kind == "hugging face" and config is not None:
        return lambda seed: type(loaded.model)(config)
    # A factory may load trained weights: what it makes is drawn anew by its modules' own initialisation.
    return lambda seed: refreshed(loaded.model, seed)


def _title(loaded: Loaded) -> str:
    return "A small network on digits with a planted mark" if loaded.kind == "default" else loaded.source


def _input(subject: Subject) -> str:
    """The form of one sample; of several inputs, of each."""
    x = subject.inputs(torch.tensor([0]))
    forms = x if isinstance(x, dict) else dict(enumerate(x, 1)) if isinstance(x, tuple) else {"": x}
    found = []
    for name, value in forms.items():
        form = " × ".join(map(str, value.shape[1:])) or "one number"
        if subject.samples.lengths is not None and value.ndim > 1:
            form = form.replace(str(value.shape[1]), between(subject.samples.lengths), 1)
        found.append(f"{name}: {form}" if len(forms) > 1 else form)
    return ", ".join(found)


def _facts(subject: Subject, loaded: Loaded) -> list[tuple[str, Any]]:
    samples = subject.samples
    used = f"{len(samples):,}" + (f" of {samples.total:,}" if samples.total > len(samples) else "")
    weights = sum(p.numel() for p in subject.model.parameters())
    facts: list[tuple[str, Any]] = [
        ("Network", type(subject.model).__name__),
        ("Weights", f"{weights:,}"),
        ("Data", samples.source),
        ("Samples", used),
        ("Input", _input(subject)),
    ]
    if subject.task == "classification":
        facts.append(("Classes", subject.outputs.shape[1]))
    elif subject.task == "embedding":
        facts += [
            ("Coordinates of the output", subject.outputs.shape[1]),
            ("Labels in the data", len(subject.targets.unique())),
        ]
    elif subject.task == "dense":
        facts.append((f"Classes of a {subject.unit}", subject.width))
    elif subject.task == "multi-label":
        facts.append(("Labels", subject.outputs.shape[1]))
    else:
        facts.append(("Task", "real-valued targets"))
    if samples.groups is not None:
        facts.append(("Groups", len(samples.group_names)))
    if shards.count() > 1:
        facts.append(("Processes", shards.count()))
    return [*facts, ("Device", str(device_of(subject.model)))]
