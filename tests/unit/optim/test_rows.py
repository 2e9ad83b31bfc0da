"""Optimizers of rows: PyTorch's where every row has a gradient, and rows without one stand still."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from lineament.core.checks import InputError
from lineament.core.gradients import summed_rows
from lineament.losses import ClassHead, CosFace
from lineament.optim import RowAdagrad, RowAdam, RowSGD

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")

MAKERS = {
    "sgd": lambda p: RowSGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "adagrad": lambda p: RowAdagrad(p, 0.1, weight_decay=0.01),
    "adam": lambda p: RowAdam(p, 0.1, weight_decay=0.01),
}
TORCH = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.01),
}


def table() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double())


def gradients(steps: int = 5) -> torch.Tensor:
    return torch.randn(steps, 6, 3, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("name", TORCH)
def test_with_a_gradient_for_every_row_it_is_pytorchs(name):
    for sparse in (False, True):
        ours, theirs = table(), table()
        one, two = MAKERS[name]([ours]), TORCH[name]([theirs])
        for gradient in gradients():
            ours.grad, theirs.grad = gradient.to_sparse(1) if sparse else gradient.clone(), gradient.clone()
            one.step()
            two.step()
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", MAKERS)
def test_rows_without_a_gradient_stand_still_and_others_do_not_know_them(name):
    weight, alone = table(), torch.nn.Parameter(table().detach()[[1, 4]].clone())
    start = weight.detach().clone()
    optimizer, other = MAKERS[name]([weight]), MAKERS[name]([alone])
    for k, gradient in enumerate(gradients()):
        rows = torch.tensor([1, 4, 1]) if k % 2 else torch.tensor([1])
        optimizer.zero_grad()
        (F.embedding(rows, weight, sparse=True) * gradient[: len(rows)]).sum().backward()
        alone.grad = torch.sparse_coo_tensor(
            (weight.grad.coalesce().indices() == 4).long(), weight.grad.coalesce().values(), (2, 3)
        )
        optimizer.step()
        other.step()
    untouched = [0, 2, 3, 5]
    assert torch.equal(weight[untouched], start[untouched])
    torch.testing.assert_close(weight[[1, 4]], alone)


@pytest.mark.parametrize("name", MAKERS)
def test_its_state_goes_on(name):
    weight = table()
    optimizer = MAKERS[name]([weight])
    for gradient in gradients(2):
        weight.grad = gradient.to_sparse(1)
        optimizer.step()
    other = torch.nn.Parameter(weight.detach().clone())
    again = MAKERS[name]([other])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    weight.grad, other.grad = gradients()[4].to_sparse(1), gradients()[4].to_sparse(1)
    optimizer.step()
    again.step()
    assert torch.equal(weight, other)


@pytest.mark.parametrize("name", MAKERS)
def test_unsampled_classes_do_not_move(name):
    head = ClassHead(40, 4, CosFace(), sample=0.1, sparse=True)
    start, optimizer = head.weight.detach().clone(), MAKERS[name](head.parameters())
    seen = set()
    for _ in range(3):
        optimizer.zero_grad()
        head(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3).backward()
        seen |= set(head.weight.grad.coalesce().indices()[0].tolist())
        optimizer.step()
    still = [k for k in range(40) if k not in seen]
    assert len(still) > 20 and torch.equal(head.weight[still], start[still])
    assert not torch.equal(head.weight[:3], start[:3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: RowSGD(p, -1.0), "lr: got -1"),
        (lambda p: RowSGD(p, momentum=1.0), "momentum"),
        (lambda p: RowAdam(p, betas=(0.9, 1.5)), "betas"),
        (lambda p: RowAdagrad(p, eps=-1.0), "eps"),
    ],
)
def test_bad_numbers_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make([table()])


@pytest.mark.parametrize("kind", [RowSGD, RowAdagrad, RowAdam])
def test_more_rows_than_are_worked_on_at_once_move_as_with_a_dense_gradient(kind):
    ids = torch.randint(70_000, (150_000,), generator=torch.Generator().manual_seed(0))
    start, moved = torch.ones(70_000, 2), []
    for sparse in (True, False):
        weight = torch.nn.Parameter(start.clone())
        F.embedding(ids, weight, sparse=sparse).square().sum().backward()
        kind([weight], lr=0.1).step()
        moved.append(weight.detach()[ids.unique()])
    torch.testing.assert_close(*moved)


@pytest.mark.parametrize(("dtype", "shape"), [(torch.float32, (3,)), (torch.float64, ()), (torch.float32, (2, 2)), (torch.bfloat16, (3,))])  # fmt: skip
def test_rows_of_a_gradient_are_those_of_coalesce(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    for count in (0, 1, 50):
        ids = torch.randint(20, (1, count), generator=generator)
        values = torch.randint(9, (count, *shape), generator=generator).to(dtype)
        found = torch.sparse_coo_tensor(ids, values, (20, *shape), check_invariants=True)
        expected = found.coalesce()
        torch.testing.assert_close(summed_rows(found), (expected.indices()[0], expected.values()))
