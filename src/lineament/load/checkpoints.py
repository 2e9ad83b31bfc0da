"""Checkpoints as they lie on disk: what a file holds (:mod:`lineament.load.weight_names` finds a network's weights in it).

Read are safetensors, whole or in shards with their index, and what ``torch.save`` wrote, under whatever name. The latter are pickles, and are read only as
``torch.load(weights_only=True)`` reads them: tensors, numbers, strings and containers of these. What that refuses is refused here, with the lines that
export the tensors where the user trusts the file.
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineament.core.checks import InputError, require
from lineament.core.files import like_files

ENDINGS = (".safetensors", ".pt", ".pth", ".th", ".ckpt", ".bin", ".pkl", ".pickle", ".tar", ".index.json")
_EXPECTED = (
    "a .safetensors file (or the index of its shards), or a file of torch.save (.pt, .pth, .th, .ckpt, .bin)"
)
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}(?P<ending>\.\w+)")


def read_checkpoint(path: str | Path, argument: str = "weights") -> Any:
    """What a file holds: tensors by name, or containers of them, on the CPU.

    Args:
        path: a file, or a folder with the weights that ``save_pretrained`` wrote.
        argument: how an error calls it.

    Raises:
        InputError: a missing or corrupt file; one that only an unrestricted pickle could read (with the reason, and the export to run).

    >>> import tempfile
    >>> path = f"{tempfile.mkdtemp()}/last.pth"
    >>> torch.save({"epoch": 3, "state_dict": {"bias": torch.ones(1)}}, path)
    >>> read_checkpoint(path)
    {'epoch': 3, 'state_dict': {'bias': tensor([1.])}}
    """
    path = _whole(Path(path), argument)
    match kind_of(path):
        case "index":
            return _shards(path, argument)
        case "safetensors":
            return _safetensors(path, argument)
        case "script":
            raise InputError(
                f"{argument}: {str(path)!r} is a TorchScript archive, which is a program and not only weights; where you trust it, export the weights and pass "
                f"them:\n    import torch\n    state = torch.jit.load({str(path)!r}, map_location='cpu').state_dict()\n    torch.save(state, {_exported(path)!r})"
            )
        case "zip" | "pickle" as kind:
            return _torch_save(path, argument, mapped=kind == "zip")
    with path.open("rb") as file:
        start = file.read(8)
    raise InputError(
        f"{argument}: {str(path)!r} is no safetensors file or is corrupt, and no file of torch.save (it starts with {start!r}); expected {_EXPECTED}"
    )


def kind_of(path: Path) -> str:
    """What a file is by its content: ``index``, ``safetensors``, ``zip`` or ``pickle`` of torch.save, ``script`` (TorchScript), or nothing known."""
    if path.name.endswith(".index.json"):
        return "index"
    with path.open("rb") as file:
        start = file.read(9)
    if start[:2] == b"PK":
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
            return "zip"
        return "script" if any(n.endswith("/constants.pkl") for n in names) else "zip"
    if start[:1] == b"\x80" and start[8:] != b"{":
        return "pickle"
    return "safetensors" if start[8:] == b"{" or path.suffix == ".safetensors" else ""


def tensors_in(found: Any) -> Any:
    """The tensors of an unpickled checkpoint, in plain dictionaries that ``torch.load(weights_only=True)`` reads; modules by their weights.

    For the export of a file that the user trusts; an error message of :func:`read_checkpoint` names it.

    >>> tensors_in({"net": torch.nn.Linear(1, 1, bias=False), "args": object(), "best": 0.5}).keys()
    dict_keys(['net'])
    """
    if isinstance(found, Tensor):
        return found.detach().clone()
    if not isinstance(found, (Mapping, list, tuple)):
        state = getattr(found, "state_dict", None)
        found = state() if callable(state) else getattr(found, "tensors", ())
    members = found.items() if isinstance(found, Mapping) else enumerate(found)
    kept = {str(key): tensors_in(value) for key, value in members}
    return {key: value for key, value in kept.items() if isinstance(value, Tensor) or value}


def tensors_by_path(content: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested containers, by its keys with dots between them.

    >>> [name for name, _ in tensors_by_path({"net": {"fc.bias": torch.ones(1)}, "epoch": 3})]
    ['net.fc.bias']
    """
    if isinstance(content, Tensor):
        yield path, content
    elif isinstance(content, (Mapping, list, tuple)):
        members = content.items() if isinstance(content, Mapping) else enumerate(content)
        for key, value in members:
            yield from tensors_by_path(value, f"{path}.{key}" if path else str(key))


def listed(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _whole(path: Path, argument: str) -> Path:
    """The file to read where a folder was given, or one shard of several."""
    if path.is_dir():
        usual = (
            "model.safetensors.index.json",
            "model.safetensors",
            "pytorch_model.bin.index.json",
            "pytorch_model.bin",
        )
        there = [path / name for name in usual if (path / name).is_file()]
        require(
            len(there) > 0,
            f"{argument}: {str(path)!r} is a folder without {usual[1]} or an index of shards, expected {_EXPECTED}",
        )
        return there[0]
    require(
        path.is_file(), f"{argument}: {str(path)!r} does not exist{like_files(path)}; expected {_EXPECTED}"
    )
    shard = _SHARD.fullmatch(path.name)
    index = path.with_name(f"{shard['stem']}{shard['ending']}.index.json") if shard else path
    return index if index.is_file() else path


def _shards(path: Path, argument: str) -> dict[str, Tensor]:
    """The tensors of all shards that an index names."""
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in named.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{argument}: {str(path)!r} is no index of shards ({type(error).__name__}: {error})"
        ) from error
    found: dict[str, Tensor] = {}
    for file in dict.fromkeys(files.values()):
        require(
            Path(file).name == file and not file.endswith(".index.json"),
            f"{argument}: {str(path)!r} names the shard {file!r}, expected files beside the index",
        )
        require(
            (path.parent / file).is_file(),
            f"{argument}: {str(path)!r} names the shard {file!r}, which is not beside it",
        )
        held = dict(tensors_by_path(read_checkpoint_file(path.parent / file, argument)))
        found |= {name: value for name, value in held.items() if files.get(name) == file}
    missing = [name for name in files if name not in found]
    require(
        not missing, f"{argument}: the shards of {str(path)!r} lack {listed(missing)}; are all files whole?"
    )
    return found


def read_checkpoint_file(path: Path, argument: str) -> Any:
    """One file, also where it is a shard of several."""
    kind = kind_of(path)
    if kind == "safetensors":
        return _safetensors(path, argument)
    require(
        kind in ("zip", "pickle"),
        f"{argument}: {str(path)!r} is no safetensors file and no file of torch.save",
    )
    return _torch_save(path, argument, mapped=kind == "zip")


def _safetensors(path: Path, argument: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{argument}: {str(path)!r} is no safetensors file or is corrupt ({error})"
        ) from error


def _torch_save(path: Path, argument: str, mapped: bool) -> Any:
    if mapped:
        _as_large_as_it_claims(path, argument)
    try:
        with warnings.catch_warnings():
            # Which protocol of pickle a file is in is not the user's concern.
            warnings.simplefilter("ignore")
            if mapped and path.suffix != ".safetensors":
                return torch.load(path, weights_only=True, map_location="cpu", mmap=True)
            # An open file, because torch takes the ending of a name for what is in it.
            with path.open("rb") as file:
                return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:
        text = str(error)
        refused = re.search(
            r"(?:Unsupported global: GLOBAL|Unsupported class|Trying to call reduce for unrecognized function|instantiate) ([\w.<>]+)",
            text,
        )
        unread = "weights_only" in text or "WeightsUnpickler" in text or "Unsupported" in text
        # A name that ends in a dot was cut off with the file.
        if not (refused or unread) or (refused and refused[1].endswith(".")):
            raise InputError(
                f"{argument}: {str(path)!r} is corrupt or no file of torch.save ({_first_line(error)})"
            ) from error
        what = f"{refused[1]!r} beside tensors" if refused else "more than tensors"
        raise InputError(
            f"{argument}: {str(path)!r} holds {what}, which only a pickle without restrictions could restore; that can run code, so it is not read. "
            f"Where you trust the file, export its tensors and pass those:\n    import torch; from lineament.load.checkpoints import tensors_in\n"
            f"    found = torch.load({str(path)!r}, map_location='cpu', weights_only=False)\n    torch.save(tensors_in(found), {_exported(path)!r})"
        ) from error


def _as_large_as_it_claims(path: Path, argument: str) -> None:
    """Refuse an archive that would unpack to more than it is: torch.save stores its parts as they are."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{argument}: {str(path)!r} is corrupt ({error})") from error
    packed = [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]
    claimed, size = sum(part.file_size for part in parts), path.stat().st_size
    require(
        not packed and claimed <= size,
        f"{argument}: {str(path)!r} is no file of torch.save: its parts would unpack to {claimed:,} bytes from {size:,}",
    )


def _exported(path: Path) -> str:
    return f"{path.stem}-weights.pt"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
