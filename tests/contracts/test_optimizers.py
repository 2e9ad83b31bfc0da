"""What every optimizer keeps: the common checks of ``torch.optim``, and ours on bad input."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lineament.core.checks import InputError
from tests.contracts.optimizers import MAKERS, Maker

SHAPES = ((3, 4), (4,), (2, 3, 2), (1,))


def parameters(dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def loss_of(params: list[nn.Parameter]) -> Tensor:
    """A strictly convex function whose gradient changes from step to step; its minimum is nowhere near the start."""
    total = torch.zeros((), dtype=torch.float64)
    for k, p in enumerate(params):
        x = torch.view_as_real(p) if p.is_complex() else p
        total = total + ((x - k - 1).square() * (1 + torch.arange(x.numel()).view_as(x) % 3)).sum().double()
    return total


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


def advance(
    maker: Maker, optimizer: torch.optim.Optimizer, params: Any, steps: int = 5, sign: float = 1
) -> list[Tensor]:
    """Take steps; the parameters afterwards."""
    for _ in range(steps):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = sign * loss_of(params)
            return loss if maker.differentiates else backward(loss)

        if maker.needs_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return [p.detach().clone() for p in params]


def same(one: Any, other: Any) -> bool:
    alike = lambda a, b: torch.equal(a, b) if isinstance(a, Tensor) else a == b  # noqa: E731
    return all(alike(a, b) for a, b in zip(one, other, strict=True))


def frozen_closure(maker: Maker, params: list[nn.Parameter], grads: list[Tensor | None]) -> Any:
    """A closure that leaves these gradients, or whose loss has them."""

    def linear() -> Tensor:
        return torch.stack([Fixed.apply(p, g).double() for p, g in zip(params, grads) if g is not None]).sum()

    def closure() -> Tensor:
        for p, g in zip(params, grads):
            p.grad = None if g is None else g.clone()
        return torch.zeros(())

    return linear if maker.differentiates else closure


class Fixed(torch.autograd.Function):
    """The inner product of a parameter and a gradient, which comes back as it is."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.g = g
        return (p * (g.to_dense() if g.is_sparse else g)).sum()

    @staticmethod
    def backward(ctx: Any, back: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.g, None


@pytest.mark.parametrize("maker", MAKERS, ids=lambda m: m.name)
class TestContract:
    def test_it_descends_in_every_dtype(self, maker):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            if maker.needs_closure and dtype is torch.bfloat16:
                continue
            params = parameters(dtype)
            before = loss_of(params).item()
            after = advance(maker, maker(params, **{maker.rate: 0.1}), params, 30)
            assert loss_of(params).item() < 0.5 * before and all(p.dtype == dtype for p in after)

    def test_groups_have_options_of_their_own(self, maker):
        if not maker.own_options:
            params, other = parameters(), parameters()
            advance(maker, maker([{"params": params[:2]}, {"params": params[2:]}]), params)
            advance(maker, maker(other), other)
            assert same(params, other)
            with pytest.raises(
                InputError, match=r"for one group and .* for the first, expected one: the step is joint"
            ):
                maker([{"params": params[:2], maker.rate: 0.5}, {"params": params[2:], maker.rate: 0.25}])
            return
        params = parameters()
        still = [p.detach().clone() for p in params[:2]]
        optimizer = maker([{"params": params[:2], "lr": 0.0}, {"params": params[2:]}], lr=0.1)
        advance(maker, optimizer, params)
        assert same(params[:2], still) and not torch.equal(params[2], parameters()[2])
        if maker.separable:
            together, alone = parameters(), parameters()
            advance(
                maker,
                maker([{"params": together[:2], "lr": 0.01}, {"params": together[2:]}], lr=0.1),
                together,
            )
            for group, lr in ((alone[:2], 0.01), (alone[2:], 0.1)):
                optimizer = maker(group, lr=lr)
                for _ in range(5):
                    optimizer.zero_grad()
                    loss_of(alone).backward()
                    optimizer.step()
            assert same(together, alone)

    def test_groups_can_join_later_and_names_are_kept(self, maker):
        params = parameters()
        optimizer = maker([(f"p{k}", p) for k, p in enumerate(params[:2])])
        optimizer.add_param_group({"params": [(f"p{k}", p) for k, p in enumerate(params[2:], 2)]})
        assert optimizer.state_dict()["param_groups"][1]["param_names"] == ["p2", "p3"]
        before = [p.detach().clone() for p in params]
        advance(maker, optimizer, params)
        assert not any(torch.equal(a, b) for a, b in zip(params, before))
        with pytest.raises(ValueError):
            optimizer.add_param_group({"params": params[:1]})
        with pytest.raises(ValueError):
            maker([])

    def test_a_closure_gives_the_same_steps(self, maker):
        params, other = parameters(), parameters()
        one, two = maker(params), maker(other)
        loss = None
        with torch.no_grad():  # the closure gets its gradients all the same
            for _ in range(3):

                def closure() -> Tensor:
                    one.zero_grad()
                    return loss_of(params) if maker.differentiates else backward(loss_of(params))

                before = loss_of(params)
                loss = one.step(closure)
                assert isinstance(loss, Tensor) and torch.equal(loss.detach(), before)
        advance(maker, two, other, 3)
        assert same(params, other)

    @pytest.mark.parametrize("answer", [None, "loss", 1.0], ids=repr)
    def test_a_closure_that_returns_no_tensor_is_named(self, maker, answer):
        if not maker.strict_closure:
            pytest.skip("PyTorch's own take any")
        params = parameters()
        with pytest.raises(InputError, match="closure: returned"):
            maker(params).step(lambda: answer)
        assert same(params, parameters())

    def test_parameters_without_gradient_wait(self, maker):
        params = parameters()
        optimizer = maker(params)
        grads = [torch.ones_like(p) for p in params]
        optimizer.step(frozen_closure(maker, params, [None, *grads[1:]]))
        assert torch.equal(params[0], parameters()[0])
        assert params[0] not in optimizer.state or maker.differentiates  # which keeps one state for all
        if not maker.separable:
            return
        for _ in range(2):
            optimizer.step(frozen_closure(maker, params, grads))
        late = parameters()[:1]
        fresh = maker(late)
        for _ in range(2):
            fresh.step(frozen_closure(maker, late, grads[:1]))
        assert torch.equal(params[0], late[0])
        nothing = parameters()
        maker(nothing).step(frozen_closure(maker, nothing, [None] * len(nothing)))
        assert same(nothing, parameters())

    def test_empty_tensors_pass(self, maker):
        params = [*parameters(), nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(3, 0))]
        advance(maker, maker(params), params)
        other = parameters()
        advance(maker, maker(other), other)
        for a, b in zip(params, other):
            torch.testing.assert_close(a, b)

    def test_memory_layout_changes_nothing(self, maker):
        base = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
        layouts = [
            base.clone(),
            base.clone().to(memory_format=torch.channels_last),
            base.transpose(1, 3).contiguous().transpose(1, 3),
            torch.stack([base, base], -1)[..., 0],  # strided, with holes
        ]
        ends = []
        for layout in layouts:
            params = [nn.Parameter(layout)]
            ends.append(advance(maker, maker(params), params)[0])
            assert params[0].stride() == layout.stride()
        for end in ends[1:]:
            torch.testing.assert_close(end, ends[0])

    def test_complex_numbers_are_pairs(self, maker):
        if not maker.complex_numbers:
            if maker.differentiates:
                with pytest.raises(InputError, match=r"params: got .*complex.*expected real"):
                    maker([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
            pytest.skip("refused")
        numbers = [
            nn.Parameter(torch.randn(3, 2, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)))
        ]
        pairs = [nn.Parameter(torch.view_as_real(numbers[0].detach()).clone())]
        advance(maker, maker(numbers), numbers)
        advance(maker, maker(pairs), pairs)
        torch.testing.assert_close(torch.view_as_real(numbers[0].detach()), pairs[0].detach())

    def test_sparse_gradients_are_refused_before_anything_moves(self, maker):
        params = parameters()
        optimizer = maker(params)
        grads = [torch.ones_like(p) for p in params]
        grads[2] = grads[2].to_sparse()
        with pytest.raises((InputError, RuntimeError), match=maker.sparse):
            optimizer.step(frozen_closure(maker, params, grads))
        if maker.strict_closure:
            assert same(params, parameters()) and not optimizer.state

    def test_a_copy_goes_on_alike(self, maker):
        params = parameters()
        optimizer = maker(params)
        advance(maker, optimizer, params, 2)
        held = {"params": params, "optimizer": optimizer}
        twin = copy.deepcopy(held)
        buffer = io.BytesIO()
        torch.save(held, buffer)
        buffer.seek(0)
        stored = torch.load(buffer, weights_only=False)
        end = advance(maker, optimizer, params, 3)
        for other in (twin, stored):
            assert same(advance(maker, other["optimizer"], other["params"], 3), end)

    def test_a_resumed_run_is_the_uninterrupted_one(self, maker):
        params = parameters()
        optimizer = maker(params, **{maker.rate: 0.05})
        advance(maker, optimizer, params, 3)
        buffer = io.BytesIO()
        torch.save({"params": [p.detach() for p in params], "state": optimizer.state_dict()}, buffer)
        end = advance(maker, optimizer, params, 4)
        buffer.seek(0)
        stored = torch.load(buffer, weights_only=True)
        again = [nn.Parameter(p) for p in stored["params"]]
        resumed = maker(again)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            resumed.load_state_dict(stored["state"])
        assert same(advance(maker, resumed, again, 4), end)

    def test_schedulers_set_the_rate(self, maker):
        if maker.rate != "lr":
            with pytest.raises(KeyError, match="lr"):
                torch.optim.lr_scheduler.MultiStepLR(maker(parameters()), [2])
            return
        params, other = parameters(), parameters()
        scheduled, by_hand = maker(params, lr=0.1), maker(other, lr=0.1)
        schedule = torch.optim.lr_scheduler.MultiStepLR(scheduled, [2], gamma=0.1)
        for step in range(4):
            advance(maker, scheduled, params, 1)
            schedule.step()
            by_hand.param_groups[0]["lr"] = 0.1 if step < 2 else 0.01
            advance(maker, by_hand, other, 1)
        assert scheduled.param_groups[0]["lr"] == pytest.approx(0.01) and not same(params, parameters())
        for a, b in zip(params, other):
            torch.testing.assert_close(a, b)
        if "betas" in scheduled.defaults:
            cycle = torch.optim.lr_scheduler.OneCycleLR(
                scheduled, 0.1, total_steps=5
            )  # moves the momentum too
            for _ in range(4):
                advance(maker, scheduled, params, 1)
                cycle.step()
            assert all(torch.isfinite(p).all() for p in params)

    def test_the_rate_may_be_a_tensor(self, maker):
        if maker.rate != "lr" or maker.options.get("foreach"):
            pytest.skip("a number only")
        params, other = parameters(), parameters()
        advance(maker, maker(params, lr=torch.tensor(0.1, dtype=torch.float64)), params)
        advance(maker, maker(other, lr=0.1), other)
        for a, b in zip(params, other):
            torch.testing.assert_close(a, b)

    def test_wrong_numbers_and_choices_are_refused(self, maker):
        for options, message in maker.bad:
            with pytest.raises(ValueError, match=f"(?is){message}") as caught:
                maker(parameters(), **options)
            assert not maker.strict_closure or isinstance(caught.value, InputError)
            if maker.strict_closure and maker.group_bad and "foreach" not in options:
                with pytest.raises(InputError, match=f"(?is){message}"):
                    maker([{"params": parameters(), **options}])

    def test_gradients_that_are_no_numbers(self, maker):
        if not maker.nonfinite:
            pytest.skip("they propagate")
        for bad in (float("nan"), float("inf")):
            params, other = parameters(), parameters()
            grads = [torch.ones_like(p) for p in params]
            spoilt = [g.clone() for g in grads]
            spoilt[-1][0] = bad
            strict, lax = maker(params, nonfinite="raise"), maker(other, nonfinite="skip")
            for step in range(3):
                if step == 1:
                    kept = copy.deepcopy(strict.state_dict())
                    before = [p.detach().clone() for p in params]
                    with pytest.raises(InputError, match=maker.nonfinite):
                        strict.step(frozen_closure(maker, params, spoilt))
                    lax.step(frozen_closure(maker, other, spoilt))
                    assert same(params, before) and same(other, before)
                    for key, state in strict.state_dict()["state"].items():
                        assert same(state.values(), kept["state"][key].values())
                strict.step(frozen_closure(maker, params, grads))
                lax.step(frozen_closure(maker, other, grads))
                assert same(params, other)
            assert getattr(lax, "skipped_steps", 1) == 1

    def test_gradients_and_flags_are_left_alone(self, maker):
        params = parameters()
        optimizer = maker(params, **({} if set(maker.decay) & set(maker.options) else maker.decay))
        grads = [torch.ones_like(p) for p in params]
        for p, g in zip(params, grads):
            p.grad = g
        for _ in range(2):
            optimizer.step(frozen_closure(maker, params, grads) if maker.needs_closure else None)
        for p, g in zip(params, grads):
            assert p.requires_grad and p.is_leaf and p.grad_fn is None and torch.equal(g, torch.ones_like(p))
            assert maker.needs_closure or p.grad is g
        state = [t for held in optimizer.state.values() for t in held.values() if isinstance(t, Tensor)]
        assert not any(t.requires_grad for t in state)

    def test_gradients_filled_in_place_are_as_good_as_fresh_ones(self, maker):
        params, other = parameters(), parameters()
        one, two = maker(params, **{maker.rate: 0.1}), maker(other, **{maker.rate: 0.1})
        for _ in range(4):
            one.zero_grad(set_to_none=False)
            two.zero_grad(set_to_none=True)
            for group, optimizer in ((params, one), (other, two)):

                def closure(group: Any = group) -> Tensor:
                    return loss_of(group) if maker.differentiates else backward(loss_of(group))

                if maker.needs_closure:
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
        assert same(params, other)

    def test_upwards_is_downwards_of_the_negative(self, maker):
        if not maker.maximize:
            pytest.skip("minimises only")
        up, down = parameters(), parameters()
        advance(maker, maker(up, maximize=True), up, sign=-1)
        advance(maker, maker(down), down)
        for a, b in zip(up, down):
            torch.testing.assert_close(a, b)

    def test_hooks_run(self, maker):
        params, calls = parameters(), []
        optimizer = maker(params)
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        advance(maker, optimizer, params, 1)
        assert calls == ["before", "after"]

    def test_threads_change_nothing_beyond_rounding(self, maker):
        ends, before = [], torch.get_num_threads()
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                params = parameters(shapes=((40, 5000), (7,)))
                ends.append(advance(maker, maker(params), params, 2))
        finally:
            torch.set_num_threads(before)
        for a, b in zip(*ends):
            torch.testing.assert_close(a, b)
