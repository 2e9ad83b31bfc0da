"""Gradients as data: one per sample, as flat vectors, and how far two lists of them are apart.

Everything is differentiable twice where its inputs are: a distance between gradients can itself be minimised, as
dataset condensation and gradient inversion do. Nothing calls ``.backward()``; no ``.grad`` is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F

from lineament.core import checks
from lineament.core.curvature.risk import chosen_parameters
from lineament.core.models import frozen, holding, logits, unwrapped

Loss = Callable[[Any, Any], Tensor]


def flatten(tensors: Sequence[Tensor]) -> Float[Tensor, "total"]:
    """One vector of a list of tensors, in order.

    Raises:
        InputError: an empty list.

    >>> flatten([torch.ones(2, 2), torch.zeros(1)]).tolist()
    [1.0, 1.0, 1.0, 1.0, 0.0]
    """
    checks.require(len(tensors) > 0, "tensors: got an empty list, expected at least one tensor")
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a flat vector (or of the rows of a matrix) in the shapes of ``like``; the inverse of :func:`flatten`.

    Args:
        vector: (total,), or (k, total), which gives tensors of shape (k, *shape).
        like: tensors of the wanted shapes; their values do not matter.

    Raises:
        InputError: not as many numbers as the shapes hold.

    >>> [t.shape for t in unflatten(torch.arange(5.0), [torch.ones(2, 2), torch.zeros(1)])]
    [torch.Size([2, 2]), torch.Size([1])]
    """
    sizes = [tensor.numel() for tensor in like]
    if vector.shape[-1] != sum(sizes):
        raise checks.InputError(
            f"vector: got {checks.show(vector)}, expected {sum(sizes)} entries in the last dimension"
        )
    parts = vector.split(sizes, dim=-1)
    front = vector.shape[:-1]
    return [part.reshape(front + tensor.shape) for part, tensor in zip(parts, like)]


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, ""]:
    """The inner product of two lists of tensors, Σ_l ⟨a_l, b_l⟩.

    >>> inner([torch.ones(2)], [torch.full((2,), 3.0)]).item()
    6.0
    """
    _same_shapes(a, b)
    return torch.stack([(x * y).sum() for x, y in zip(a, b)]).sum()


def norm(a: Sequence[Tensor]) -> Float[Tensor, ""]:
    """The Euclidean norm of a list of tensors taken as one vector.

    >>> norm([torch.tensor([3.0]), torch.tensor([4.0])]).item()
    5.0
    """
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(x) for x in a]))


KINDS = ("l2", "l1", "max", "cosine", "layer", "layer_cosine")


def distance(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    kind: str = "l2",
    *,
    eps: float = 1e-6,
    weights: Sequence[float] | Tensor | None = None,
    tensors: Sequence[int] | None = None,
) -> Float[Tensor, ""]:
    """How far two lists of gradients are apart, each tensor l with a weight w_l.

    - ``"l2"``: Σ_l w_l ‖a_l - b_l‖², the squared Euclidean distance.
    - ``"l1"``: Σ_l w_l |a_l - b_l|, entry by entry; ``"max"``: Σ_l w_l max |a_l - b_l|.
    - ``"cosine"``: 1 - Σ_l w_l ⟨a_l, b_l⟩ / (√(Σ_l w_l ‖a_l‖²) √(Σ_l w_l ‖b_l‖²) + eps), all layers as one vector (gradient inversion).
    - ``"layer"``: Σ_l w_l (1 - ⟨a_l, b_l⟩ / (‖a_l‖ ‖b_l‖ + eps)), one cosine for each tensor.
    - ``"layer_cosine"``: Σ_l w_l Σ_o (1 - ⟨a_lo, b_lo⟩ / (‖a_lo‖ ‖b_lo‖ + eps)), one cosine for each output unit o of a
      weight (its first dimension, the rest flattened); biases and other vectors do not count (gradient matching, Zhao et al.
      2021, arXiv 2006.05929).

    Args:
        a, b: gradients of the same shapes; both may ask for gradients, twice.
        eps: keeps the cosines finite where there is no gradient, as the reference codes do; with 0, "cosine" is NaN there.
        weights: of all tensors in order, 1 by default. tensors: the numbers of those that count, all by default.

    Raises:
        InputError: an unknown kind, lists that do not have the same shapes, weights of another number, numbers of no tensor.

    >>> a, b = [torch.eye(2)], [2 * torch.eye(2)]
    >>> distance(a, b, "l2").item(), abs(round(distance(a, b, "cosine").item(), 4))
    (2.0, 0.0)
    >>> distance([*a, torch.ones(1)], [*b, torch.zeros(1)], "l2", weights=[1.0, 0.5], tensors=[1], eps=0.0).item()
    0.5
    """
    checks.one_of("kind", kind, KINDS)
    _same_shapes(a, b)
    w = [1.0] * len(a) if weights is None else list(weights)
    checks.require(len(w) == len(a), f"weights: got {len(w)}, expected one for each of {len(a)} tensors")
    at = range(len(a)) if tensors is None else list(tensors)
    odd = [i for i in at if not -len(a) <= i < len(a)]
    checks.require(
        len(at) > 0 and not odd,
        f"tensors: got {odd[0] if odd else 'none'}, expected numbers from 0 to {len(a) - 1}",
    )
    if kind == "layer_cosine":
        at = [i for i in at if a[i].ndim >= 2]
    checks.require(
        len(at) > 0, "layer_cosine: no tensor has two or more dimensions, so there is nothing to compare"
    )
    flat = 1 if kind == "layer_cosine" else 0
    pairs = [(w[i], a[i].flatten(flat), b[i].flatten(flat)) for i in at]
    if kind == "cosine":
        products = [(f, *_Products.apply(x, y), _square(y)) for f, x, y in pairs]
        shared, one, two = (torch.stack([f * own[k] for f, *own in products]).sum() for k in range(3))
        return 1 - shared / (_root(one) * _root(two) + eps)
    if kind == "l2":
        parts = [f * _square(x - y) for f, x, y in pairs]
    elif kind == "l1":
        parts = [f * (x - y).abs().sum() for f, x, y in pairs]
    elif kind == "max":
        parts = [f * (x - y).abs().max() for f, x, y in pairs]
    else:
        parts = [
            f * (1 - torch.linalg.vecdot(x, y) / (_row_norm(x) * _row_norm(y) + eps)).sum()
            for f, x, y in pairs
        ]
    return torch.stack(parts).sum()


class _Products(torch.autograd.Function):
    """⟨a, b⟩ and ⟨a, a⟩. Gradients of large networks do not fit into a cache, so that every further tensor of their size costs about as much as a forward pass of one
    picture: the derivative is made in one."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return torch.linalg.vecdot(a, b), torch.linalg.vecdot(a, a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, shared: Tensor | None, own: Tensor | None) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b = ctx.saved_tensors
        other = a * shared[..., None] if shared is not None and ctx.needs_input_grad[1] else None
        if shared is None:
            return None if own is None else a * (2 * own)[..., None], other
        found = b * shared[..., None]
        return found if own is None else found.addcmul_(a, (2 * own)[..., None]), other

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], a: Tensor, b: Tensor) -> Any:
        rows = [x.movedim(d, 0) if d is not None else x.expand(info.batch_size, *x.shape) for x, d in zip((a, b), in_dims)]  # fmt: skip
        return _Products.apply(*rows), (0, 0)


def _square(x: Tensor) -> Tensor:
    return _Products.apply(x, x.detach())[1]


def per_sample_gradients(
    model: nn.Module,
    loss_fn: Loss,
    inputs: Tensor,
    targets: Tensor,
    *,
    params: str | Sequence[str] | None = None,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """The gradient of each sample's own loss: {parameter: (batch, *shape)}.

    The model runs in eval mode (batch norm in train mode mixes samples, so that no sample has a gradient of its own).

    Args:
        loss_fn: ``loss_fn(logits, targets)``, the mean over a batch.
        inputs, targets: (batch, ...) and (batch, ...).
        params: names or globs of the parameters wanted, all that ask for gradients by default.
        chunk: samples at a time; memory grows with chunk times the number of parameters. All by default.

    Raises:
        InputError: unknown parameter names, inputs and targets of unequal length, or a batch norm that has no
            statistics but the batch's.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> found = per_sample_gradients(net, lambda z, y: z.mean(), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2))
    >>> found["weight"][:, 0].tolist()
    [[1.0, 2.0], [3.0, 4.0]]
    """
    checks.tensor("inputs", inputs, finite=False)
    checks.require(
        len(inputs) == len(targets),
        f"targets: got {checks.show(targets)}, expected {len(inputs)} of them, as many as inputs",
    )
    model = unwrapped(model)
    known = dict(model.named_parameters())
    names = chosen_parameters(model, params)
    for name, module in model.named_modules():
        checks.require(
            not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.running_mean is not None,
            f"model: {name!r} is a batch norm without running statistics, which mixes the samples of a batch even in "
            "eval mode, so that no sample has a gradient of its own",
        )
    wanted = {name: known[name].detach() for name in names}
    rest = {name: p.detach() for name, p in known.items() if name not in wanted}
    buffers = {name: b.detach() for name, b in model.named_buffers()}

    def loss(weights: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        with holding(model, {**weights, **rest, **buffers}):
            return loss_fn(logits(model(x[None])), y[None])

    def one(x: Tensor, y: Tensor) -> list[Tensor]:
        # Copies, because embeddings with a largest norm shorten their rows in place.
        leaves = {name: w.clone().requires_grad_() for name, w in wanted.items()}
        with torch.enable_grad(), holding(model, {n: w.clone() for n, w in {**rest, **buffers}.items()}):
            found = torch.autograd.grad(
                _loss_at(leaves, x, y), list(leaves.values()), allow_unused=True, materialize_grads=True
            )
        return [g.to_dense() if g.is_sparse else g for g in found]

    def _loss_at(leaves: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        # In-place changes of a copy, which a leaf does not allow where gradients are asked for.
        with holding(model, leaves):
            return loss_fn(logits(model(x[None])), y[None]).reshape(())

    with frozen(model, requires_grad=None):
        try:
            return vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=chunk, randomness="different")(
                wanted, inputs, targets
            )
        except torch.OutOfMemoryError:
            raise
        except Exception:
            # Recurrent layers, functions of the user's own, sparse gradients: what vmap does not know runs sample by sample. If it is another
            # error, it comes again.
            rows = [one(x, y) for x, y in zip(inputs, targets)]
            return {name: torch.stack(column) for name, column in zip(wanted, zip(*rows))}


def _row_norm(x: Tensor) -> Tensor:
    # The norm has no second derivative at zero; rows of zeros get a gradient of zero instead of NaN.
    return _root(torch.linalg.vecdot(x, x))


def _root(square: Tensor) -> Tensor:
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def _same_shapes(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    shapes_a, shapes_b = [tuple(x.shape) for x in a], [tuple(y.shape) for y in b]
    checks.require(
        shapes_a == shapes_b,
        f"got lists of shapes {checks.show(shapes_a)} and {checks.show(shapes_b)}, expected the same",
    )


def summed_rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that a sparse gradient names, sorted and each once, and the sum of what it says of each.

    On a CPU by sorting and one pass over the values, a quarter of the time of ``coalesce``.

    >>> g = torch.sparse_coo_tensor([[2, 0, 2]], [[1.0], [5.0], [3.0]], (4, 1), check_invariants=True)
    >>> [part.tolist() for part in summed_rows(g)]
    [[0, 2], [[5.0], [4.0]]]
    """
    if (
        gradient.is_coalesced()
        or gradient.device.type != "cpu"
        or gradient.dtype not in (torch.float32, torch.float64)
    ):
        gradient = gradient.coalesce()
        return gradient.indices()[0], gradient.values()
    rows, order = gradient._indices()[0].sort(stable=True)
    values = gradient._values()
    first = torch.ones_like(rows, dtype=torch.bool)
    first[1:] = rows[1:] != rows[:-1]
    starts = first.nonzero()[:, 0]
    sums = F.embedding_bag(order, values.reshape(len(values), -1), starts, mode="sum")
    return rows[starts], sums.reshape(len(starts), *values.shape[1:])
