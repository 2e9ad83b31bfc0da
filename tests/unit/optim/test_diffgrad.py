"""diffGrad's oracles: Adam at both ends of the friction, other libraries, and every way to run one step."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lineament.core.checks import InputError
from lineament.optim import diffgrad
from lineament.optim.diffgrad import DiffGrad
from lineament.optim.frictions import friction, summarise

SHAPES = ((30, 20), (20,), (5, 3, 2, 2))


def gradients(count=8, shapes=SHAPES, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(s, generator=generator, dtype=dtype) for s in shapes] for _ in range(count)]


def start(shapes=SHAPES, dtype=torch.float64):
    return [nn.Parameter(torch.linspace(-1, 1, torch.Size(s).numel(), dtype=dtype).view(s)) for s in shapes]


def run(make, grads, params=None, prepare=None):
    params = params or start(dtype=grads[0][0].dtype)
    optimizer = make(params)
    for each in grads:
        for p, g in zip(params, each):
            p.grad = g.clone()
        optimizer.step()
    return params, optimizer


def close(one, other, **tolerance):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), **tolerance)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    ("ours", "adams"),
    [
        ({"fixed_friction": 1.0}, {}),
        ({"fixed_friction": 0.5}, {"lr": 0.05}),
        (
            {"fixed_friction": 1.0, "weight_decay": 0.1, "amsgrad": True},
            {"weight_decay": 0.1, "amsgrad": True},
        ),
        ({"fixed_friction": 1.0, "maximize": True, "eps": 1e-2}, {"maximize": True, "eps": 1e-2}),
    ],
)
def test_a_fixed_friction_is_adam(ours, adams, foreach):
    grads = gradients()
    one, _ = run(lambda p: DiffGrad(p, lr=0.1, foreach=foreach, **ours), grads)
    other, _ = run(lambda p: torch.optim.Adam(p, **{"lr": 0.1, **adams}), grads)
    close(one, other, rtol=1e-12, atol=1e-13)


def test_decoupled_decay_and_rectification_are_adamw_and_radam():
    grads = gradients(12)
    one, _ = run(
        lambda p: DiffGrad(p, lr=0.1, fixed_friction=1, weight_decay=0.1, decoupled_weight_decay=True), grads
    )
    other, _ = run(lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1), grads)
    close(one, other, rtol=1e-12, atol=1e-13)
    # With beta2 = 0.9 the rectified step begins at the sixth; both kinds of step are taken.
    one, _ = run(
        lambda p: DiffGrad(
            p, lr=0.1, betas=(0.9, 0.9), fixed_friction=1, rectify="momentum", eps_mode="code"
        ),
        grads,
    )
    other, _ = run(lambda p: torch.optim.RAdam(p, lr=0.1, betas=(0.9, 0.9)), grads)
    close(one, other, rtol=1e-12, atol=1e-13)
    idle, _ = run(lambda p: DiffGrad(p, lr=0.1, rectify="skip"), grads[:4])
    close(idle, start(), rtol=0, atol=0)


def test_constant_gradients_make_it_adam_at_half_the_rate():
    grads = gradients(1) * 6
    steps_of = {}
    for name, make in {
        "diffgrad": lambda p: DiffGrad(p, lr=0.1),
        "half": lambda p: torch.optim.Adam(p, lr=0.05),
    }.items():
        after_one, _ = run(make, grads[:1])
        after_all, _ = run(make, grads)
        steps_of[name] = [b - a for a, b in zip(after_one, after_all)]
    close(steps_of["diffgrad"], steps_of["half"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("scale", "lr"), [(1e-8, 0.05), (1e8, 0.1)])
def test_the_losss_scale_decides_which_adam_it_is(scale, lr):
    grads = gradients()
    scaled = [[scale * g for g in each] for each in grads]
    one, _ = run(lambda p: DiffGrad(p, lr=0.1, eps=0), scaled)
    other, _ = run(lambda p: torch.optim.Adam(p, lr=lr, eps=0), grads)
    close(one, other, rtol=1e-6, atol=1e-9)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=8), st.sampled_from([0, 1, 2])
)
def test_bounds_and_symmetry_of_the_friction(values, version):
    change = torch.tensor(values, dtype=torch.float64)
    xi, mirrored = friction(change, version), friction(-change, version)
    low, high = {0: (0.5, 1.0), 1: (0.0, 1.0), 2: (0.5, 5.0)}[version]
    assert (xi >= low).all() and (xi <= high).all()
    if version == 1:
        torch.testing.assert_close(xi + mirrored, torch.ones_like(xi))
    else:
        assert torch.equal(xi, mirrored)


def test_a_signed_friction_does_not_overflow():
    assert friction(torch.tensor([-1e30, 1e30]), 1).tolist() == [0.0, 1.0]


def test_friction_names_what_it_lacks():
    with pytest.raises(InputError, match="version: got 9"):
        friction(torch.zeros(2), 9)
    with pytest.raises(InputError, match="friction version 4 needs both"):
        friction(torch.zeros(2), 4)
    with pytest.raises(InputError, match="floating-point"):
        friction(torch.zeros(2, dtype=torch.int64))


def test_gradients_of_zero_move_nothing():
    params, optimizer = run(
        lambda p: DiffGrad(p, track_friction=True),
        [[torch.zeros(s, dtype=torch.float64) for s in SHAPES]] * 3,
    )
    close(params, start(), rtol=0, atol=0)
    assert optimizer.friction_summary().maximum == 0.5 and optimizer.friction_summary().still == 1.0


def test_the_released_bug_hides_behind_fresh_gradients_and_shows_in_place():
    grads = gradients()
    right, _ = run(lambda p: DiffGrad(p, lr=0.1), grads)
    hidden, _ = run(lambda p: DiffGrad(p, lr=0.1, alias_previous_grad=True), grads)
    close(hidden, right, rtol=1e-12, atol=1e-13)

    def in_place(**options):
        params = start()
        optimizer = DiffGrad(params, lr=0.1, track_friction=True, **options)
        for p in params:
            p.grad = torch.zeros_like(p)
        means = []
        for each in grads:
            for p, g in zip(params, each):
                p.grad.copy_(g)
            optimizer.step()
            means.append(optimizer.friction_summary().mean)
        return params, means

    shown, means = in_place(alias_previous_grad=True)
    assert means[0] > 0.6 and means[1:] == [0.5] * 7
    fixed, means = in_place()
    close(fixed, right, rtol=0, atol=0)
    assert min(means) > 0.6
    assert max((a - b).abs().max() for a, b in zip(shown, fixed)) > 0.05


def test_the_released_bug_also_changes_the_gradient():
    (p,) = params = [nn.Parameter(torch.tensor([2.0]))]
    p.grad = torch.tensor([1.0])
    DiffGrad(params, weight_decay=0.5, alias_previous_grad=True).step()
    assert p.grad.item() == 2.0


VARIANTS = [
    *({"version": v} for v in range(6)),
    {"weight_decay": 0.1, "maximize": True, "amsgrad": True},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "eps": 1e-2, "eps_mode": "code"},
    {"rectify": "momentum", "betas": (0.9, 0.9)},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_eager_way_takes_the_same_steps(variant, dtype, monkeypatch):
    grads = gradients(dtype=dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
    whole, _ = run(lambda p: DiffGrad(p, lr=0.01, **variant), grads)
    monkeypatch.setattr(diffgrad, "BATCH", 7)
    blocks, _ = run(lambda p: DiffGrad(p, lr=0.01, **variant), grads)
    close(blocks, whole, rtol=tolerance["rtol"], atol=tolerance["atol"])
    lists, _ = run(lambda p: DiffGrad(p, lr=0.01, foreach=True, **variant), grads)
    close(lists, whole, **tolerance)
    if "rectify" not in variant:
        captured, _ = run(lambda p: DiffGrad(p, lr=torch.tensor(0.01), capturable=True, **variant), grads)
        close(captured, whole, **tolerance)
        both, _ = run(lambda p: DiffGrad(p, lr=0.01, capturable=True, foreach=True, **variant), grads)
        close(both, whole, **tolerance)


@pytest.mark.slow
def test_the_compiled_step_is_the_same_and_compiles_once():
    shapes = ((300, 20), (40,), (6, 5, 14, 14))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    rectified = (
        {"rectify": "momentum"},
        {"rectify": "momentum", "version": 1},
        {"rectify": "skip", "eps": 0},
    )
    variants = (VARIANTS[0], VARIANTS[4], VARIANTS[6], *rectified)
    for variant in variants:
        grads = gradients(8, shapes, torch.float32)
        grads[0][0].zero_()
        one, _ = run(
            lambda p, v=variant: DiffGrad(p, lr=0.01, compiled=True, **v), grads, start(shapes, torch.float32)
        )
        other, _ = run(
            lambda p, v=variant: DiffGrad(p, lr=0.01, foreach=False, **v), grads, start(shapes, torch.float32)
        )
        close(one, other, rtol=1e-5, atol=1e-6)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # Both rectified at version 0 are one rule.
    assert before == len(variants) - 1 and not torch._dynamo.utils.counters["graph_break"]
    params = start(((70, 9), (11,), (3, 300)), torch.float32)
    optimizer = DiffGrad(params, compiled=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
    for _ in range(8):
        for p in params:
            p.grad = torch.randn_like(p)
        versions = [p._version for p in params]
        optimizer.step()
        assert all(p._version > version for p, version in zip(params, versions))
        schedule.step()
    # Other shapes, rates, momenta and counts: nothing is compiled again.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@pytest.mark.slow
@pytest.mark.parametrize("amsgrad", [False, True])
def test_compiled_tensors_move_together_whatever_becomes_of_their_memory(amsgrad):
    """Equal sizes, one element, gradients by columns, and whatever changes between steps: as without a compiler."""
    shapes = ((40,), (40,), (1,), (8, 5), (30, 7), (40,), (3, 4, 5), (0,), (90,), (11, 2), (40,), (6,))
    sides = []
    for compiled in (True, False):
        params = start(shapes, torch.float32)
        optimizer = DiffGrad(params, lr=0.05, amsgrad=amsgrad, compiled=compiled, foreach=False)
        for t, each in enumerate(gradients(7, shapes, torch.float32)):
            for p, g in zip(params, each):
                p.grad = g.clone() if g.ndim != 2 else g.T.contiguous().T
            if t in (1, 2):
                params[3].grad = params[5].grad = None
            if t == 2:
                params[0].data = params[0].data.clone() + 1
            if t == 3:
                optimizer.state[params[8]]["exp_avg"] = optimizer.state[params[8]]["exp_avg"] + 1
            if t == 4:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            if t == 5:
                optimizer.param_groups[0]["maximize"] = True
            if t == 6:  # as a state that was moved to another device and back
                for state in optimizer.state.values():
                    state["exp_avg"].data = state["exp_avg"].data + 1
            optimizer.step()
        sides.append([*params, *(optimizer.state[p]["exp_avg"] for p in params)])
    close(*sides, rtol=1e-5, atol=1e-6)


def test_half_precision_sees_small_changes_of_the_gradient():
    """A change of 0.01 moves xi by 0.0025, below what bfloat16 resolves near 1/2: the product is taken in float32."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = DiffGrad([p], track_friction=True)
    for value in (0.0, 0.01):
        p.grad = torch.full_like(p, value)
        optimizer.step()
    assert optimizer.friction_summary().mean == pytest.approx(0.5025, abs=1e-4)


def test_a_parameter_that_starts_late_has_its_own_count():
    grads = gradients(6)
    params = start()
    optimizer = DiffGrad(params, lr=0.1)
    for t, each in enumerate(grads):
        for p, g in zip(params, each):
            p.grad = g.clone()
        if t < 3:
            params[0].grad = None
        optimizer.step()
    alone, _ = run(lambda p: DiffGrad(p, lr=0.1), [each[:1] for each in grads[3:]], start(SHAPES[:1]))
    close(params[:1], alone, rtol=0, atol=0)
    assert [float(optimizer.state[p]["step"]) for p in params] == [3, 6, 6]


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(
    ("more", "own"),
    [
        ({}, {}),
        ({}, {"rectify": "skip"}),
        ({"rectify": True, "betas": (0.9, 0.9)}, {}),
        ({"rectify": True, "degenerated_to_sgd": False}, {"rectify": "skip"}),
        ({"ams_bound": True}, {}),
    ],
    ids=str,
)
def test_pytorch_optimizers_state_goes_on_here(decoupled, more, own):
    peer = pytest.importorskip("pytorch_optimizer")
    grads = gradients(12)
    params, theirs = run(
        lambda p: peer.DiffGrad(p, lr=0.1, weight_decay=0.1, weight_decouple=decoupled, **more), grads[:3]
    )
    ours = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = DiffGrad(ours, lr=7.0, **own)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.1 and group["eps_mode"] == "code" and group["decoupled_weight_decay"] is decoupled
    assert group["nonfinite"] == "propagate" and float(optimizer.state[ours[0]]["step"]) == 3
    for each in grads[3:]:
        for p, q, g in zip(params, ours, each):
            p.grad, q.grad = g.clone(), g.clone()
        theirs.step()
        optimizer.step()
    close(ours, params, rtol=1e-9, atol=1e-11)


def test_torch_optimizers_and_adams_states_go_on_here():
    grads = gradients(4)
    peer = pytest.importorskip("torch_optimizer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        params, theirs = run(lambda p: peer.DiffGrad(p, lr=0.1, weight_decay=0.1), grads[:2])
    ours = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = DiffGrad(ours)
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for each in grads[2:]:
        for p, q, g in zip(params, ours, each):
            p.grad, q.grad = g.clone(), g.clone()
        theirs.step()
        optimizer.step()
    close(ours, params, rtol=1e-9, atol=1e-11)


def test_adams_state_lacks_the_previous_gradient_and_says_so():
    grads = gradients(4)
    _, adam = run(lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True), grads)
    optimizer = DiffGrad(start())
    with pytest.warns(UserWarning, match="no previous_grad: starting from zero"):
        optimizer.load_state_dict(adam.state_dict())
    group = optimizer.param_groups[0]
    assert group["amsgrad"] and group["eps_mode"] == "paper" and group["lr"] == 0.1
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert float(optimizer.state[optimizer.param_groups[0]["params"][0]]["step"]) == 5


def test_foreign_options_without_an_equal_are_named():
    peer = pytest.importorskip("pytorch_optimizer")
    _, theirs = run(lambda p: peer.DiffGrad(p, weight_decay=0.1, fixed_decay=True), gradients(1))
    with pytest.raises(InputError, match="fixed_decay is True, which has no equal"):
        DiffGrad(start()).load_state_dict(theirs.state_dict())
    _, theirs = run(peer.DiffGrad, gradients(1))
    with pytest.raises(ValueError, match="parameter group"):
        DiffGrad(start()[:1]).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    ("option", "value"), [("lr", -3.0), ("betas", (0.9, 1.0)), ("eps_mode", "papr"), ("version", 9)]
)
def test_a_state_that_is_refused_changes_nothing(option, value):
    params, optimizer = run(DiffGrad, gradients(2))
    before, bad = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    bad["param_groups"][0][option] = value
    bad["state"][0]["exp_avg"].zero_()
    with pytest.raises(InputError, match=f"{option}: got"):
        optimizer.load_state_dict(bad)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], before["state"][0]["exp_avg"])
    two = DiffGrad([{"params": params[:1]}, {"params": params[1:]}])
    with pytest.raises(ValueError, match="number of parameter groups"):
        two.load_state_dict(bad)


def test_the_summary_is_the_friction_of_the_last_step():
    grads = gradients(3)
    names = ["weight", "bias", "kernel"]
    params = start()
    optimizer = DiffGrad(list(zip(names, params)), weight_decay=0.3, maximize=True, track_friction=True)
    before = [torch.zeros_like(p) for p in params]
    for each in grads:
        effective = [-g + 0.3 * p.detach() for p, g in zip(params, each)]
        xi = [torch.sigmoid((b - g).abs()) for b, g in zip(before, effective)]
        for p, g in zip(params, each):
            p.grad = g.clone()
        optimizer.step()
        before = effective
    summary = optimizer.friction_summary()
    every = torch.cat([x.flatten() for x in xi])
    assert summary.mean == pytest.approx(float(every.mean())) and summary.count == len(every)
    assert (summary.minimum, summary.maximum) == (float(every.min()), float(every.max()))
    assert summary.quantiles[0.25] == pytest.approx(float(every.quantile(0.25)))
    assert summary.by_parameter["bias"] == pytest.approx(float(xi[1].mean()))
    assert list(summary.to_dict()["by_parameter"]) == names
    assert len(summary.plot().patches) == 3
    # Tracking is a group's option like any other, may be switched off, and a copy keeps what was measured.
    optimizer.param_groups[0]["track_friction"] = False
    optimizer.step()
    assert copy.deepcopy(optimizer).friction_summary() == summary


def test_a_summary_needs_a_tracked_step():
    with pytest.raises(InputError, match="no step was tracked"):
        DiffGrad(start()).friction_summary()
    many = torch.linspace(0, 1, 3 * 2**20 + 1)
    assert summarise([("w", many)]).quantiles[0.5] == pytest.approx(0.5, abs=1e-5)


def test_an_option_with_a_slip_is_named():
    with pytest.raises(InputError, match="unknown option 'weight_deca'; nearest: 'weight_decay'"):
        DiffGrad([{"params": start(), "weight_deca": 0.1}])
    with pytest.raises(InputError, match="lr: got a float32 tensor of shape \\(2,\\)"):
        DiffGrad(start(), lr=torch.ones(2))
