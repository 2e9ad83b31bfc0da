"""Weights: a safetensors file into a network, whether they are finite, and a network's fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, NotFiniteError, require

CONVERT = (
    "convert it once, where you trust the file: "
    "safetensors.torch.save_file(torch.load({name!r}, weights_only=True), 'model.safetensors'), and of a "
    "checkpoint that holds more only its weights, such as torch.load(...)['state_dict']"
)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a safetensors file into a module; every key must match.

    Raises:
        InputError: a missing file, a pickle (with the conversion to make), a corrupt file, keys or shapes that do not match.

    >>> import tempfile; from safetensors.torch import save_file
    >>> path = f"{tempfile.mkdtemp()}/net.safetensors"
    >>> save_file({"weight": torch.full((1, 2), 3.0), "bias": torch.zeros(1)}, path)
    >>> net = nn.Linear(2, 1)
    >>> load_weights(net, path)
    >>> net.weight.tolist()
    [[3.0, 3.0]]
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    require(
        path.is_file(),
        f"weights: {str(path)!r} {'is a folder' if path.is_dir() else 'does not exist'}, expected a .safetensors file",
    )
    with path.open("rb") as file:
        start = file.read(8)
    if start[:1] == b"\x80" or start[:2] == b"PK":
        raise InputError(
            f"weights: {str(path)!r} is a pickle (torch.save), which can run code when loaded, expected safetensors; "
            + CONVERT.format(name=str(path))
        )
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"weights: {str(path)!r} is no safetensors file or is corrupt ({error})") from error
    own = model.state_dict()
    # safetensors holds a shared tensor once; the module's other names for it are not missing.
    shared = {tensor.data_ptr() for name, tensor in own.items() if name in state and tensor.numel()}
    problems = mismatches(
        missing=[name for name in own if name not in state and own[name].data_ptr() not in shared],
        unexpected=[name for name in state if name not in own],
        shapes=[
            f"{name} is {tuple(state[name].shape)} in the file and {tuple(own[name].shape)} in the model"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    )
    require(not problems, f"weights: {str(path)!r} does not fit {type(model).__name__}: {problems}")
    model.load_state_dict(state, strict=False)


def mismatches(missing: Sequence[str], unexpected: Sequence[str], shapes: Sequence[str]) -> str:
    """What of a file's weights does not fit a network; empty where everything does."""
    found = {"missing in the file": missing, "unexpected in the file": unexpected, "of another shape": shapes}
    return "; ".join(f"{what}: {listed(names)}" for what, names in found.items() if names)


def listed(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def require_finite(state: Mapping[str, Tensor], argument: str = "model") -> None:
    """Refuse weights that hold NaN or infinity."""
    bad = [
        name
        for name, value in state.items()
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if bad:
        raise NotFiniteError(
            f"{argument}: NaN or infinite values in weights: {listed(bad)}; was the training stable and the file whole?"
        )


def require_savable(model: nn.Module) -> None:
    """Refuse a network whose weights safetensors cannot hold: several that share memory without being one tensor.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    >>> whole = torch.zeros(3, 2)
    >>> net[0].weight, net[1].weight = nn.Parameter(whole[:2]), nn.Parameter(whole[1:])
    >>> require_savable(net)
    Traceback (most recent call last):
    ...
    lineament.core.checks.InputError: model: its weights 0.weight, 1.weight share memory and could not be saved (slices of one tensor, or one transposed); give \
each layer its own tensor, or compute one from the other in the forward
    """
    from safetensors.torch import save_model

    # Tried, because only the format itself knows what it takes.
    with TemporaryDirectory() as folder:
        try:
            save_model(model, f"{folder}/weights.safetensors")
            return
        except (RuntimeError, ValueError) as error:
            said = str(error).splitlines()[0]
    sharing: dict[int, list[str]] = {}
    for name, value in model.state_dict().items():
        sharing.setdefault(value.untyped_storage().data_ptr(), []).append(name)
    names = [name for group in sharing.values() if len(group) > 1 for name in group]
    raise InputError(
        f"model: its weights {listed(names)} share memory and could not be saved (slices of one tensor, or one transposed); give each layer its own "
        "tensor, or compute one from the other in the forward"
        if names
        else f"model: its weights could not be saved ({said})"
    )


def digest(model: nn.Module) -> str:
    """A fingerprint of a network: its architecture as it prints, and every parameter and buffer."""
    found = hashlib.sha256(repr(model).encode())
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            found.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
