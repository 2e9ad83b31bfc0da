"""What a client sends after looking at its own pictures: a gradient, or the change of the weights after some local steps.

Fang et al. 2023, arXiv 2308.04699, sections 1.1 and 1.5. A message is made from one's own model and pictures, or read from a saved update of which one has
the pictures; there is nothing here that collects the messages of others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lineament.core.checks import InputError, labels, number, require, tensor
from lineament.core.models import answered, logits
from lineament.core.results import Readable
from lineament.core.sites.data_flow import last_features
from lineament.load.checkpoints import read_checkpoint
from lineament.load.weight_names import weights_for
from lineament.privacy.defences import Context, Defence
from lineament.privacy.local import Local
from lineament.privacy.statistics import batch_statistics, norms, undone

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Message(Readable):
    """One client's message.

    Attributes:
        tensors: one for each trainable parameter, in the order of ``model.parameters()``: the gradient of the mean loss, or before - after.
        count: how many pictures it was made from.
        defence: what was done to it before it was sent. local: the steps behind a change of weights, None for a gradient.
        statistics: the batch's mean and variance at each batch norm in training mode, which the buffers give away that are sent along; empty where no norm is in
            training mode, or more than one step was taken.

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
        others: tuple[Tensor, Tensor] | None = None,
        seed: int = 0,
    ) -> Message:
        """The message of a batch; the model, its gradients and its buffers stay as they were.

        Args:
            images: normalised, as the model takes them. targets: what ``loss(logits, targets)`` takes, class numbers by default.
            others: pictures and targets of other clients, of which a defence that adds clients up makes their messages, each of as many pictures as this one.
            seed: of the defence's noise, and of which pictures other clients have.

        Raises:
            InputError: no pictures, labels outside the classes, a gradient that is not finite.

        >>> net = nn.Linear(2, 2)
        >>> [tuple(t.shape) for t in Message.of(net, torch.ones(3, 2), torch.tensor([0, 1, 1])).tensors]
        [(2, 2), (2,)]
        """
        defence = Defence() if defence is None else defence
        require(len(images) > 0, "images: got none, expected at least one picture")
        tensor("images", images, finite=False)
        answers = same_twice(model, images)
        if loss is F.cross_entropy:
            targets = labels("targets", targets, count=len(images), classes=answers.shape[-1])
        gradient = dummy_gradient(model, targets[None], local=local, loss=loss)
        with _enough_for_norms(images):
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
            images,
            targets,
            lambda x: [g[0] for g in gradient(x[None])],
            None
            if others is None
            else lambda m: _of_others(model, others, m, len(images), local=local, loss=loss, seed=seed),
        )
        sent = defence.apply(found, context)
        told = batch_statistics(model, images) if local is None or local.steps(len(images)) == 1 else {}
        return cls(tuple(t.detach() for t in sent), len(images), defence, local, told)

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
        new = saved_state(model, after, "after")
        old = own if before is None else saved_state(model, before, "before")
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        change = tuple((old[name].to(own[name]) - new[name].to(own[name])) for name in names)
        require(
            any(bool((t != 0).any()) for t in change),
            f"after: {str(after)!r} holds the same weights as before; nothing was learned from any picture",
        )
        odd = [n for n, t in zip(names, change) if not bool(t.isfinite().all())]
        require(
            not odd,
            f"after: the change of {odd[0] if odd else ''!r} from before to {str(after)!r} is not finite; expected finite numbers",
        )
        still = [n for n in moved_norms(model, old, new) if not model.get_submodule(n).training]
        require(
            not still,
            f"after: the buffers of the batch norm {still[0] if still else ''!r} moved, so that it was in training mode, and here it is not; call .train() on the batch norms",
        )
        local = Local() if local is None else local
        return cls(change, count, Defence(), local, undone(model, old, new, local.steps(count)))

    def gradient(self, model: nn.Module) -> tuple[Tensor, ...]:
        """The message as a gradient of the mean loss: a change of weights without the learning rate, the number of steps, and the decay."""
        if self.local is None:
            return self.tensors
        weights = [p.detach() for p in model.parameters() if p.requires_grad]
        return tuple(self.local.gradient_of(t, w, self.count) for t, w in zip(self.tensors, weights))


def _of_others(
    model: nn.Module, others: tuple[Tensor, Tensor], clients: int, count: int, *, local: Local | None, loss: Loss, seed: int
) -> list[list[Tensor]]:  # fmt: skip
    """Plain messages of other clients, of ``count`` pictures each; none has another's as long as there are enough."""
    x, y = others
    require(len(x) >= count, f"others: got {len(x)} pictures, expected at least {count}, as many as stand behind one message")  # fmt: skip
    rows = torch.cat([torch.randperm(len(x), generator=torch.Generator().manual_seed(seed + k)) for k in range(-(-clients * count // len(x)))])  # fmt: skip
    found = []
    for some in rows[: clients * count].split(count):
        with _enough_for_norms(x[some]):
            found.append(
                [g[0] for g in dummy_gradient(model, y[some][None], local=local, loss=loss)(x[some][None])]
            )
    return found


@contextmanager
def _enough_for_norms(images: Tensor) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            f"images: got {len(images)}, of which a batch norm in training mode sees one value a channel; expected more pictures, or the norm in evaluation mode"
        ) from None


def moved_norms(model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Batch norms whose running means are not what they were."""
    keys = {name: f"{name}.running_mean" for name, _ in norms(model)}
    return [n for n, k in keys.items() if k in before and not torch.equal(before[k].cpu(), after[k].cpu())]


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
    for _, norm in norms(still):
        if norm.training:
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
            norm.track_running_stats = False
    parameters = {name: p.detach() for name, p in still.named_parameters() if p.requires_grad}
    require(len(parameters) > 0, "model: no parameter is trainable, so that no message is sent")
    return still, parameters


def same_twice(model: nn.Module, images: Tensor) -> Tensor:
    """The model's answers, which must not be drawn at random.

    Raises:
        InputError: pictures that the model does not take, or that it answers differently the second time.

    >>> same_twice(nn.Linear(2, 3), torch.ones(4, 2)).shape
    torch.Size([4, 3])
    """
    still, _ = fixed(model)
    devices = [images.device] if images.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices), _enough_for_norms(images):
        first = answered(still, images)
        again = logits(still(images)) if still.training else first
    require(
        torch.allclose(first, again, rtol=1e-3, atol=1e-5, equal_nan=True),
        "model: it answers the same pictures differently each time (dropout of attention, or as a function), and a message could not be made twice; call model.eval()",
    )
    return first


def dummy_gradient(
    model: nn.Module, targets: Tensor, *, local: Local | None = None, loss: Loss = F.cross_entropy
) -> Callable[..., list[Tensor]]:
    """A function from pictures [rows, batch, ...] to one message a row, [rows, ...] for each parameter; it can be differentiated.

    Args:
        targets: [rows, batch], or class probabilities [rows, batch, classes]; a call may give others, which can be differentiated, too.

    >>> net = nn.Linear(2, 2)
    >>> [tuple(g.shape) for g in dummy_gradient(net, torch.zeros(5, 1, dtype=torch.long))(torch.ones(5, 1, 2))]
    [(5, 2, 2), (5, 2)]
    """

    def risk(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(logits(functional_call(still, parameters, (x,))), y)

    def change(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        if local is None:
            return grad(risk)(parameters, x, y)
        return local.change(parameters, x, y, grad(risk))

    still, parameters = fixed(model)
    many = vmap(change, in_dims=(None, 0, 0))

    def gradient(x: Tensor, others: Tensor | None = None) -> list[Tensor]:
        y = targets if others is None else others
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            if len(x) == 1:  # also what vmap cannot run
                return [g[None] for g in change(parameters, x[0], y[0]).values()]
            return list(many(parameters, x, y).values())

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
        raise InputError(
            "model: it does not end in a linear layer, from whose gradient labels could be read; pass known_labels=True"
        )
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


def saved_state(model: nn.Module, path: str | Path, argument: str) -> dict[str, Tensor]:
    """A model's state dict from a file; what the file lacks is the model's own."""
    own = model.state_dict()
    if str(path).endswith(".npz"):
        arrays = _arrays(path, argument)
        if set(arrays) == set(own):
            arrays = {name: arrays[name] for name in own}
        given, odd = list(arrays.values()), None
        if len(given) == len(own):
            odd = next(((k, n, t) for k, (n, t) in enumerate(own.items()) if given[k].shape != t.shape), None)
        require(
            len(given) == len(own),
            f"{argument}: {str(path)!r} has {len(given)} arrays, expected {len(own)} in the order and of the shapes of the state dict",
        )
        if odd is not None:
            place, name, want = odd
            raise InputError(
                f"{argument}: {str(path)!r}: array {place} has the shape {tuple(given[place].shape)}, expected {tuple(want.shape)} of {name!r}; arrays go in the order of the state dict, or by its names"
            )
        state = dict(zip(own, given))
    else:
        state, _ = weights_for(own, read_checkpoint(path, argument), Path(path).name, type(model).__name__)
        state = {name: own[name] if state.get(name) is None else state[name] for name in own}
    for name, want in own.items():
        require(
            state[name].is_floating_point() or not want.is_floating_point(),
            f"{argument}: {str(path)!r} holds {name!r} in {str(state[name].dtype).removeprefix('torch.')}, expected floating-point numbers as the model has",
        )
    return state


def _arrays(path: str | Path, argument: str) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
        return {name: torch.from_numpy(a.astype(a.dtype.newbyteorder("="))) for name, a in held.items()}
    except (OSError, ValueError, TypeError, EOFError, BadZipFile) as error:
        raise InputError(f"{argument}: {str(path)!r} cannot be read as an .npz of arrays: {error}") from None


def checked(message: Message, parameters: Sequence[Tensor]) -> None:
    """Whether a message can be one of this model's."""
    require(
        len(message.tensors) == len(parameters),
        f"message: got {len(message.tensors)} tensors, expected {len(parameters)}, one for each trainable parameter in the order of model.parameters()",
    )
    for k, (t, p) in enumerate(zip(message.tensors, parameters)):
        require(
            t.shape == p.shape,
            f"message: tensor {k} has the shape {tuple(t.shape)}, expected {tuple(p.shape)}, that of trainable parameter {k}; they go in the order of model.parameters()",
        )
    odd = [(t.dtype, p.dtype) for t, p in zip(message.tensors, parameters) if t.dtype != p.dtype]
    require(
        not odd,
        f"message: its tensors are {odd[0][0] if odd else ''}, the model's {odd[0][1] if odd else ''}; expected the same, see Tensor.to",
    )
    require(
        all(bool(t.isfinite().all()) for t in message.tensors),
        "message: it is not finite; expected finite numbers",
    )
