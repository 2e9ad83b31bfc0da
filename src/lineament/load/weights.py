"""Weights: a checkpoint into a network, whether they are finite, and a network's fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, NotFiniteError, require
from lineament.core.models import held_weights
from lineament.load.checkpoints import listed, read_checkpoint
from lineament.load.weight_names import weights_for


def load_weights(model: nn.Module, path: str | Path) -> tuple[str, ...]:
    """Load a checkpoint into a module, which it must fit exactly, and say what was unwrapped to get at the weights.

    Args:
        path: what :func:`lineament.load.checkpoints.read_checkpoint` reads.

    Raises:
        InputError: a missing or corrupt file; what only an unrestricted pickle could read; names or shapes that do not match.

    >>> import tempfile; from safetensors.torch import save_file
    >>> path = f"{tempfile.mkdtemp()}/net.safetensors"
    >>> save_file({"weight": torch.full((1, 2), 3.0), "bias": torch.zeros(1)}, path)
    >>> net = nn.Linear(2, 1)
    >>> load_weights(net, path), net.weight.tolist()
    ((), [[3.0, 3.0]])
    """
    content = read_checkpoint(path)
    state, notes = weights_for(model.state_dict(), content, Path(path).name, type(model).__name__)
    model.load_state_dict(state, strict=False)
    return tuple(notes)


def require_finite(weights: Iterable[tuple[str, Any]], argument: str = "model") -> None:
    """Refuse weights that hold NaN or infinity, or nothing."""
    bad = []
    for name, value in weights:
        if isinstance(value, Tensor) and value.is_floating_point():
            require(
                not value.is_meta,
                f"{argument}: its weight {name!r} has no values (it is on the meta device); load them first",
            )
            if not bool(torch.isfinite(value).all()):
                bad.append(name)
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
    for name, value in held_weights(model, by_name=True):
        if isinstance(value, Tensor):
            found.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
