"""What a client sends after looking at its own pictures: a gradient, or the change of the weights after some local steps.

Fang et al. 2023, arXiv 2308.04699, sections 1.1 and 1.5. A message is made from one's own model and pictures, or read from a saved update of which one has
the pictures; there is nothing here that collects the messages of others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lineament.core.checks import InputError, labels, number, require, show
from lineament.core.models import logits
from lineament.core.results import Readable
from lineament.core.sites.data_flow import last_features
from lineament.load.checkpoints import read_checkpoint
from lineament.load.weight_names import weights_for
from lineament.privacy.defences import Context, Defence

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Local:
    """Steps of gradient descent on the whole batch before the change of the weights is sent (federated averaging).

    >>> Local().steps
    1
    """

    steps: int = 1
    rate: float = 1e-4

    def __post_init__(self) -> None:
        number("steps", self.steps, low=1, integer=True)
        number("rate", self.rate, low=0, open_low=True)


@dataclass(frozen=True)
class Message(Readable):
    """One client's message.

    Attributes:
        tensors: one for each trainable parameter, in the order of ``model.parameters()``: the gradient of the mean loss, or before - after.
        count: how many pictures it was made from.
        defence: what was done to it before it was sent. local: the steps behind a change of weights, None for a gradient.
        statistics: the batch's means and variances of each batch norm that was sent along, computed back from the buffers; empty where none was.

    >>> Message.of(nn.Linear(1, 2), torch.ones(1, 1), torch.tensor([0])).count
    1
    """

    tensors: tuple[Tensor, ...]
    count: int
    defence: Defence = field(default_factory=Defence)
    local: Local | None = None
    statistics: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        *,
        defence: Defence | None = None,
        local: Local | None = None,
        loss: Loss = F.cross_entropy,
        seed: int = 0,
    ) -> Message:
        """The message of a batch; the model, its gradients and its buffers stay as they were.

        Args:
            images: normalised, as the model takes them. targets: what ``loss(logits, targets)`` takes, class numbers by default.
            seed: of the defence's noise.

        Raises:
            InputError: no pictures, labels outside the classes, a gradient that is not finite.

        >>> net = nn.Linear(2, 2)
        >>> [tuple(t.shape) for t in Message.of(net, torch.ones(3, 2), torch.tensor([0, 1, 1])).tensors]
        [(2, 2), (2,)]
        """
        defence = Defence() if defence is None else defence
        require(len(images) > 0, "images: got none, expected at least one picture")
        if loss is F.cross_entropy:
            still, parameters = fixed(model)
            with torch.no_grad():
                classes = logits(functional_call(still, parameters, (images,))).shape[-1]
            targets = labels("targets", targets, count=len(images), classes=classes)
        gradient = dummy_gradient(model, targets[None], local=local, loss=loss)
        found = [g[0] for g in gradient(images[None])]
        require(
            all(bool(g.isfinite().all()) for g in found),
            "images: their gradient is not finite; nothing can be learned from such a message",
        )
        context = Context(
            len(images),
            lambda: [dummy_gradient(model, targets[:, None], local=local, loss=loss)(images[:, None])],
            lambda: _features(model, images),
            torch.Generator(images.device).manual_seed(seed),
            _head_place(model, images),
        )
        sent = defence.apply(found, context)
        return cls(
            tuple(t.detach() for t in sent), len(images), defence, local, _batch_statistics(model, images)
        )

    @classmethod
    def read(
        cls,
        model: nn.Module,
        after: str | Path,
        before: str | Path | None = None,
        *,
        count: int,
        local: Local | None = None,
    ) -> Message:
        """A saved update: safetensors, what ``torch.load(weights_only=True)`` reads, or an ``.npz`` of arrays in the order of the state dict.

        Args:
            after: the weights that the client sent back. before: those that it was given; by default the model's own.
            count: how many pictures stand behind it. local: the client's steps, one by default.

        Raises:
            InputError: files that do not fit the model; an update that changes nothing.

        >>> import tempfile; from safetensors.torch import save_file
        >>> net, path = nn.Linear(1, 2), f"{tempfile.mkdtemp()}/after.safetensors"
        >>> save_file({k: v - 1 for k, v in net.state_dict().items()}, path)
        >>> Message.read(net, path, count=1).tensors[1].tolist()
        [1.0, 1.0]
        """
        number("count", count, low=1, integer=True)
        own = model.state_dict()
        new = _state(model, after, "after")
        old = own if before is None else _state(model, before, "before")
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        change = tuple((old[name] - new[name]).to(own[name].device) for name in names)
        require(
            any(bool((t != 0).any()) for t in change),
            f"after: {str(after)!r} holds the same weights as before; nothing was learned from any picture",
        )
        require(all(bool(t.isfinite().all()) for t in change), f"after: {str(after)!r} is not finite")
        statistics = {}
        for name, module in _norms(model):
            moved = [new.get(f"{name}.running_{part}") for part in ("mean", "var")]
            if module.training and module.momentum is not None and all(m is not None for m in moved):
                statistics[name] = tuple(
                    (b - (1 - module.momentum) * a) / module.momentum
                    for a, b in zip((old[f"{name}.running_mean"], old[f"{name}.running_var"]), moved)
                    if b is not None
                )
        return cls(change, count, Defence(), Local() if local is None else local, statistics)


def fixed(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy that touches no buffer, and its trainable parameters; batch norms in training mode use the batch's statistics.

    >>> sorted(fixed(nn.Linear(1, 1))[1])
    ['bias', 'weight']
    """
    still = copy.deepcopy(model)
    for name, module in still.named_modules():
        require(
            not (isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0),
            f"model: the dropout {name!r} is on, and a message could not be made twice; call model.eval()",
        )
    for _, norm in _norms(still):
        if norm.training:
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
            norm.track_running_stats = False
    parameters = {name: p.detach() for name, p in still.named_parameters() if p.requires_grad}
    require(len(parameters) > 0, "model: no parameter is trainable, so that no message is sent")
    return still, parameters


def dummy_gradient(
    model: nn.Module, targets: Tensor, *, local: Local | None = None, loss: Loss = F.cross_entropy
) -> Callable[[Tensor], list[Tensor]]:
    """A function from pictures [rows, batch, ...] to one message a row, [rows, ...] for each parameter; it can be differentiated.

    Args:
        targets: [rows, batch], or class probabilities [rows, batch, classes].

    >>> net = nn.Linear(2, 2)
    >>> [tuple(g.shape) for g in dummy_gradient(net, torch.zeros(5, 1, dtype=torch.long))(torch.ones(5, 1, 2))]
    [(5, 2, 2), (5, 2)]
    """

    def risk(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(logits(functional_call(still, parameters, (x,))), y)

    def change(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        if local is None:
            return grad(risk)(parameters, x, y)
        now = parameters
        for _ in range(local.steps):
            slope = grad(risk)(now, x, y)
            now = {name: value - local.rate * slope[name] for name, value in now.items()}
        return {name: parameters[name] - now[name] for name in parameters}

    still, parameters = fixed(model)
    many = vmap(change, in_dims=(None, 0, 0))

    def gradient(x: Tensor) -> list[Tensor]:
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            if len(x) == 1:  # also what vmap cannot run
                return [g[None] for g in change(parameters, x[0], targets[0]).values()]
            return list(many(parameters, x, targets).values())

    return gradient


def head_of(model: nn.Module, example: Tensor) -> tuple[str, nn.Module]:
    """The last linear layer, found by running the model: the one whose output is the answer.

    Raises:
        InputError: the network does not end in a linear layer.
    """
    found = last_features(model, example)
    modules = dict(model.named_modules())
    name = found[1][-1] if found and found[1] else ""
    if not isinstance(modules.get(name), nn.Linear):
        raise InputError("model: it does not end in a linear layer, from whose gradient labels could be read")
    return name, modules[name]


def _head_place(model: nn.Module, images: Tensor) -> int | None:
    """The place of the last layer's weights among the trainable parameters."""
    try:
        name, _ = head_of(model, images[:1])
    except InputError:
        return None
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    return names.index(f"{name}.weight") if f"{name}.weight" in names else None


def _features(model: nn.Module, images: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The network up to its last layer's input, as a function, and the pictures."""
    _, head = head_of(model, images[:1])
    kept: list[Tensor] = []

    def features(x: Tensor) -> Tensor:
        kept.clear()
        handle = head.register_forward_pre_hook(lambda _m, given: kept.append(given[0]))
        try:
            model(x)
        finally:
            handle.remove()
        return kept[0]

    return features, images


def _norms(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            yield name, module


def _batch_statistics(model: nn.Module, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Means and variances that the buffers of batch norms in training mode would give away; the variance as the buffers hold it, over n - 1."""
    norms = [(name, module) for name, module in _norms(model) if module.training]
    if not norms:
        return {}
    still = copy.deepcopy(model)
    for _, module in _norms(still):
        module.momentum = 1.0
    with torch.no_grad():
        still(images)
    told = dict(_norms(still))
    return {name: (told[name].running_mean.clone(), told[name].running_var.clone()) for name, _ in norms}


def _state(model: nn.Module, path: str | Path, argument: str) -> dict[str, Tensor]:
    own = model.state_dict()
    if str(path).endswith(".npz"):
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = [torch.from_numpy(file[name]) for name in file.files]
        except (OSError, ValueError) as error:
            raise InputError(
                f"{argument}: {str(path)!r} cannot be read as an .npz of arrays: {error}"
            ) from None
        require(
            [a.shape for a in arrays] == [t.shape for t in own.values()],
            f"{argument}: {str(path)!r} has {len(arrays)} arrays, expected {len(own)} in the order and of the shapes of the state dict",
        )
        return dict(zip(own, arrays))
    state, _ = weights_for(own, read_checkpoint(path, argument), Path(path).name, type(model).__name__)
    return {name: own[name] if state.get(name) is None else state[name] for name in own}


def checked(message: Message, parameters: Sequence[Tensor]) -> None:
    """Whether a message can be one of this model's."""
    require(
        [t.shape for t in message.tensors] == [p.shape for p in parameters],
        f"message: got {len(message.tensors)} tensors, the first {show(message.tensors[0])}; expected {len(parameters)}, shaped as the trainable parameters",
    )
    require(
        all(bool(t.isfinite().all()) for t in message.tensors),
        "message: it is not finite; expected finite numbers",
    )
