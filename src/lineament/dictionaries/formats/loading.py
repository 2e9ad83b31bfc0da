"""One call for every dictionary: our own folders, and those of SAELens, dictionary_learning, sparsify and Gemma Scope, told by their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lineament.core.checks import InputError, number, require, show
from lineament.dictionaries import saving
from lineament.dictionaries.formats import dictionary_learning, gemma_scope, saelens, sparsify
from lineament.dictionaries.formats.parts import Request
from lineament.load.hub import findable, first_line

_FORMATS: dict[str, Any] = {
    "SAELens": saelens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "Gemma Scope": gemma_scope,
}
_FILES = "config.json and dictionary.safetensors (lineament), cfg.json and sae_weights.safetensors (SAELens), cfg.json and sae.safetensors (sparsify), "
_FILES += "ae.pt (dictionary_learning), params.npz (Gemma Scope)"


def load_dictionary(
    folder: str | Path,
    *,
    site: str | None = None,
    model: Any = None,
    scale: float | None = None,
    centred: bool | None = None,
) -> Any:
    """A dictionary from a folder, or from the Hugging Face hub, of whichever library.

    What a library subtracts, scales by and compares with is folded into the weights, so that ``encode`` gives that library's own features; what cannot be
    folded is kept (:class:`~lineament.dictionaries.normalised.Normalised`). ``dictionary.info`` says what was done. Nothing is unpickled but tensors.

    Args:
        folder: a folder, or a name of the hub with the folder inside it: ``"owner/repository/layers.5"``.
        site: where it sits in the model; by default what the folder says, as a module's name.
        model: the model, whose own names then make the site; otherwise those of its family are taken.
        scale: what activations were multiplied by in training, where the folder does not say it (SAELens' expected_average_only_in).
        centred: whether the mean of each token's numbers was removed (TransformerLens' center_writing_weights); by default what the folder says.

    Raises:
        InputError: no such folder, files that are missing, damaged or of a kind without a counterpart here.

    >>> import tempfile
    >>> from lineament.dictionaries import TopK
    >>> place = tempfile.mkdtemp()
    >>> TopK(2, 4, k=1, site="0").save_pretrained(place)
    >>> type(load_dictionary(place)).__name__, load_dictionary(place).site
    ('TopK', '0')
    """
    require(
        isinstance(folder, (str, Path)) and str(folder) != "",
        f"folder: got {show(folder)}, expected a folder or a name of the Hugging Face hub",
    )
    if scale is not None:
        number("scale", scale, low=0, open_low=True)
    path = Path(folder)
    if path.is_file():
        path = path.parent
    if not path.is_dir():
        path = _fetched(str(folder))
    request = Request(site, model, scale, centred)
    if (path / saving.WEIGHTS).is_file():
        made = saving.read(path)
        if site is not None:
            made.site = site
        return made
    found = [each for each in _FORMATS.values() if each.matches(path)]
    if not found:
        raise InputError(
            f"folder: {str(path)!r} holds no dictionary{_inside(path)}; expected the files {_FILES}"
        )
    read: Callable[[Path, Request], Any] = found[0].read
    return read(path, request)


def holds_dictionary(folder: str | Path) -> bool:
    """Whether a folder of this machine holds a dictionary of whichever library, told by its files' names.

    >>> holds_dictionary("no/such/folder")
    False
    """
    path = Path(folder)
    return path.is_dir() and (
        (path / saving.WEIGHTS).is_file() or any(each.matches(path) for each in _FORMATS.values())
    )


def _inside(path: Path) -> str:
    """What lies in a folder without a dictionary: those of its subfolders that hold one, or its files."""
    names = [saving.WEIGHTS, *(each.WEIGHTS for each in _FORMATS.values())]
    below = sorted({str(file.parent.relative_to(path)) for name in names for file in path.rglob(name)})
    if below:
        more = f" and {len(below) - 5} more" if len(below) > 5 else ""
        return f" itself, but its folders {', '.join(map(repr, below[:5]))}{more} do; name one of them"
    files = sorted(entry.name for entry in path.iterdir())
    return f" (it has {', '.join(files[:6]) or 'nothing'})"


def _fetched(name: str) -> Path:
    """A folder of a repository of the hub, from its cache or fetched."""
    parts = name.split("/")
    local = name.startswith((".", "/", "~")) or len(parts) < 2 or ".." in parts
    require(
        not local,
        f"folder: {name!r} does not exist; expected a folder, or owner/repository/folder of the Hugging Face hub",
    )
    repository, inside = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError(
            "folder: dictionaries of the hub need the package 'huggingface_hub'; install lineament[hub]"
        ) from error
    files = [f"{inside}/*" if inside else "*"]
    try:
        place = snapshot_download(repository, allow_patterns=files, local_files_only=True)
        require((Path(place) / inside).is_dir(), "")
    except (OSError, ValueError):
        # Not in the cache; InputError is a ValueError.
        place = None
    try:
        if place is None:
            findable("folder", repository, "dictionary")
            place = snapshot_download(repository, allow_patterns=files)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(
            f"folder: {name!r} cannot be fetched from the Hugging Face hub ({first_line(error)})"
        ) from error
    path = Path(place) / inside
    require(path.is_dir(), f"folder: the repository {repository!r} has no folder {inside!r}")
    return path
