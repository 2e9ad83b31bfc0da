"""From a dictionary, a model and data to what a dashboard shows of each feature: examples, what it writes, its neighbours, what is lost without it."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError
from lineament.core.models import unwrapped, weight_of
from lineament.core.sites.families import blocks_of
from lineament.dictionaries.effects import ablation_effects
from lineament.dictionaries.examples import Examples, Window, windows
from lineament.dictionaries.sequences import Sequences
from lineament.measure.complexity.features import first_batch, reads_tokens
from lineament.measure.complexity.layers import complexity as complexity_of
from lineament.report.dashboard import FeatureCard, Snippet

_AT_ONCE = 2**24  # numbers in one product of atoms
_FEATURES = 4096  # whose examples are read in one pass over their sequences
_CROP, _PIXELS = 8, 40
_RIDGE = 0.1  # relative to standardised activations
_READ = 4096  # features whose complexity is measured: every feature is a column of each place's read-outs


def feature_cards(
    model: nn.Module,
    dictionary: Any,
    data: Any,
    examples: Examples,
    *,
    name: Callable[[int], str],
    outputs: Sequence[str] | Callable[[int], str] = (),
    complexity: Tensor | None = None,
    ablated: int = 256,
    note: Callable[[str], None] = lambda line: None,
) -> Iterator[FeatureCard]:
    """The cards of all features that were ever on.

    Args:
        examples: from :func:`lineament.dictionaries.examples.max_examples`.
        name: the text of a token id. outputs: what an output of the model is called, where the atoms have the width that its last layer reads.
        complexity: (width), where it was measured.
        ablated: of how many features, the most important first, the KL without them is measured, over two of their sequences each.
    """
    alive = (examples.maxima != 0).nonzero()[:, 0]
    order = examples.density if examples.importance is None else examples.importance
    chosen = alive[order[alive].argsort(descending=True)][:ablated].tolist()
    effects: dict[int, float] = {}
    if chosen and Sequences(model, data).indexed:
        note(f"turning off {len(chosen):,} features")
        effects = ablation_effects(
            model, dictionary, data, {f: [p[0] for p in examples.places(f)[:2]] for f in chosen}
        )
    writes = _written(model, dictionary)
    for part in alive.split(_FEATURES):
        found = windows(model, dictionary, data, examples, features=part.tolist())
        near = _nearest(dictionary.atoms, part)
        by = {} if writes is None else _extremes(dictionary.atoms[part.to(dictionary.atoms.device)], writes)
        for row, feature in enumerate(part.tolist()):
            raises, lowers = (
                [
                    (outputs(i) if callable(outputs) else outputs[i] if i < len(outputs) else str(i), v)
                    for i, v in by[which][row]
                ]
                if by
                else []
                for which in ("raises", "lowers")
            )
            groups = [
                ("Strongest examples", _snippets(found[feature]["top"], name, model, data)),
                (
                    "Drawn at random from all its values",
                    _snippets(found[feature]["sample"], name, model, data),
                ),
            ]
            yield FeatureCard(
                feature, float(examples.density[feature]), float(examples.maxima[feature]), float(examples.means[feature]),
                importance=None if examples.importance is None else float(examples.importance[feature]),
                complexity=None if complexity is None or bool(complexity[feature].isnan()) else float(complexity[feature]),
                effect=effects.get(feature), histogram=examples.histogram[feature].tolist(), edges=examples.edges.tolist(),
                raises=raises, lowers=lowers, nearest=near[row], groups=groups,
            )  # fmt: skip


def complexities(
    model: nn.Module, dictionary: Any, data: Any, note: Callable[[str], None] = lambda line: None
) -> Tensor | None:
    """(width): how hard each feature is to read through the depth of the network; ``None`` where that cannot be measured, and why is noted."""
    if len(dictionary.atoms) > _READ:
        note(f"complexity is measured for up to {_READ:,} features, these are {len(dictionary.atoms):,}")
        return None
    note("reading features from each depth")
    # Of tokens each is a row; of an image the feature's maximum over its positions.
    rows, pool = ("positions", 1) if reads_tokens(first_batch(data)[0]) else ("max", 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of features that never vary, which have none
            return complexity_of(model, data, dictionary, rows=rows, pool=pool, ridge=_RIDGE).complexity.cpu()
    except InputError as error:
        note(f"complexity could not be measured: {error}")
        return None


def _written(model: nn.Module, dictionary: Any) -> Tensor | None:
    """(outputs, d): what the last layer makes of a direction at the site, through the last norm's weight; ``None`` where it reads another width."""
    d = dictionary.atoms.shape[1]
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None:
        linear = [m for m in unwrapped(model).modules() if isinstance(m, nn.Linear)]
        head = linear[-1] if linear else None
    if not isinstance(head, nn.Module) or weight_of(head).shape[-1] != d:
        return None
    weight = weight_of(head).detach()
    known = blocks_of(model)
    if known is not None:
        root, names, _, _ = known
        norm = unwrapped(model).get_submodule(f"{root}.{names['final_in'].removesuffix(':in')}".lstrip("."))
        scale = getattr(norm, "weight", None)
        if isinstance(scale, Tensor) and scale.shape == (d,):
            weight = weight * scale.detach()
    return weight - weight.mean(0)


def _extremes(atoms: Tensor, weight: Tensor, most: int = 8) -> dict[str, list[list[tuple[int, float]]]]:
    """The outputs that each atom raises and lowers most, against the mean output."""
    found: dict[str, list[list[tuple[int, float]]]] = {"raises": [], "lowers": []}
    size = max(1, _AT_ONCE // len(weight))
    most = min(most, len(weight) // 2 or 1)
    for part in atoms.split(size):
        scores = part.to(weight) @ weight.T
        for which, sign in (("raises", 1), ("lowers", -1)):
            best = (sign * scores).topk(most, 1)
            pairs = zip(best.indices.tolist(), (sign * best.values).tolist())
            found[which] += [[(i, v) for i, v in zip(*pair) if sign * v > 0] for pair in pairs]
    return found


def _nearest(atoms: Tensor, part: Tensor, most: int = 5) -> list[list[tuple[int, float]]]:
    """Other atoms by cosine."""
    unit = torch.nn.functional.normalize(atoms.float(), dim=1)
    most = min(most, len(unit) - 1)
    found: list[list[tuple[int, float]]] = []
    if most < 1:
        return [[] for _ in part]
    for some in part.to(unit.device).split(max(1, _AT_ONCE // len(unit))):
        cosines = unit[some] @ unit.T
        cosines[torch.arange(len(some)), some] = -2
        best = cosines.topk(most, 1)
        found += [list(zip(*pair)) for pair in zip(best.indices.tolist(), best.values.tolist())]
    return found


def _snippets(
    many: Sequence[Window], name: Callable[[int], str], model: nn.Module, data: Any
) -> list[Snippet]:
    if many and many[0].tokens:
        return [Snippet(w.value, [name(t) for t in w.tokens], w.values, w.centre) for w in many]
    if many and many[0].shape:
        return [Snippet(w.value, picture=crop) for w in many[:_CROP] if (crop := _crop(w, model, data))]
    return [Snippet(w.value, [f"sample {w.sequence}"], [w.value], 0) for w in many]


def _crop(window: Window, model: nn.Module, data: Any) -> str:
    """The part of the image around the position, as a small picture; "" where the input is none."""
    from PIL import Image

    if len(window.shape) != 2:
        return ""
    inputs = Sequences(model, data).take(torch.tensor([window.sequence])).inputs
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or inputs.shape[1] not in (1, 3):
        return ""
    image = inputs[0].float().cpu()
    low, high = image.min(), image.max()
    image = ((image - low) / (high - low).clamp_min(1e-12) * 255).to(torch.uint8).movedim(0, -1)
    height, width = image.shape[:2]
    rows, columns = window.shape
    row, column = divmod(window.position, columns)
    y, x = int((row + 0.5) * height / rows), int((column + 0.5) * width / columns)
    half = max(height // 6, height // rows, 4)
    top, left = max(0, min(y - half, height - 2 * half)), max(0, min(x - half, width - 2 * half))
    part = image[top : top + 2 * half, left : left + 2 * half].contiguous()
    array = part[..., 0].numpy() if part.shape[-1] == 1 else part.numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).resize((_PIXELS, _PIXELS), Image.Resampling.NEAREST).save(
        buffer, "JPEG", quality=80
    )
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
