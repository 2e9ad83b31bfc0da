"""SAM and ASAM: norms and invariances of the perturbation, exact restoring, and what every optimizer keeps."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.core.checks import InputError
from lineament.optim import ASAM, GNS, SAM, DiffGrad
from lineament.optim.sam import running_statistics_kept

BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "adadelta, whose rho is another": lambda p: torch.optim.Adadelta(p, rho=0.8),
    "adagrad": torch.optim.Adagrad,
    "adamax": torch.optim.Adamax,
    "adafactor": torch.optim.Adafactor,
    "asgd": torch.optim.ASGD,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rprop": torch.optim.Rprop,
    "diffgrad": lambda p: DiffGrad(p, lr=0.01, weight_decay=1e-3),
}
X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3


def net(seed: int = 0, norm: bool = False) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = [nn.BatchNorm1d(8)] if norm else []
        return nn.Sequential(nn.Linear(5, 8), *parts, nn.ReLU(), nn.Linear(8, 3))


def closure_of(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor = X):
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), Y[: len(x)])
        loss.backward()
        return loss

    return closure


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("kind", [SAM, ASAM])
@pytest.mark.parametrize("base", BASES)
def test_a_radius_of_zero_is_the_wrapped_optimizer(kind, base):
    plain, wrapped = net(), net()
    one = BASES[base](plain.parameters())
    two = kind(BASES[base](wrapped.parameters()), rho=0.0)
    for _ in range(4):
        one.step(closure_of(plain, one))
        two.step(closure_of(wrapped, two))
    assert equal(weights(plain), weights(wrapped))


@pytest.mark.parametrize("rho", [0.05, 2.0])
def test_the_perturbation_has_length_rho_and_goes_back_bit_by_bit(rho):
    model = net()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=rho)
    before = weights(model)
    closure_of(model, optimizer)()
    slope = [p.grad.clone() for p in model.parameters()]
    optimizer.first_step()
    moved = [a - b for a, b in zip(weights(model), before)]
    length = torch.cat([m.flatten() for m in moved]).norm()
    assert length == pytest.approx(rho, rel=1e-4)
    cosine = F.cosine_similarity(
        torch.cat([m.flatten() for m in moved]), torch.cat([s.flatten() for s in slope]), dim=0
    )
    assert cosine == pytest.approx(1.0, abs=1e-5)
    optimizer.restore()
    assert equal(weights(model), before)


def test_asam_does_not_see_a_rescaling_of_two_layers():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)).double()
    second = copy.deepcopy(first)
    with torch.no_grad():
        second[0].weight.mul_(4.0)
        second[2].weight.div_(4.0)
    losses = {}
    for kind in (ASAM, SAM):
        losses[kind] = []
        for model in (first, second):
            optimizer = kind(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.7)
            closure_of(model, optimizer, X.double())()
            optimizer.first_step()
            losses[kind].append(float(F.cross_entropy(model(X.double()), Y).detach()))
            optimizer.restore()
    assert losses[ASAM][0] == pytest.approx(losses[ASAM][1], rel=1e-9)
    assert abs(losses[SAM][0] - losses[SAM][1]) > 1e-3


def test_the_norm_is_joint_and_groups_have_their_own_radius():
    model = net()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "rho": 0.0, "lr": 0.5}]
    optimizer = SAM(torch.optim.SGD(groups, lr=0.1), rho=0.3)
    before = weights(model)
    closure_of(model, optimizer)()
    slope = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    expected = 0.3 * model[0].weight.grad / slope
    optimizer.first_step()
    after = weights(model)
    assert torch.allclose(after[0] - before[0], expected, atol=1e-6)
    assert torch.equal(after[2], before[2]) and torch.equal(after[3], before[3])


def test_weight_decay_takes_the_unperturbed_weights():
    w = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = SAM(torch.optim.SGD([w], lr=0.1, weight_decay=0.5), rho=1.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    # Gradient 2 · 3 at w + 1, decay .5 · 2 at w.
    assert w.item() == pytest.approx(2 - 0.1 * (6 + 1), abs=1e-12)


def test_maximising_climbs_down_to_the_worst_point():
    w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = SAM(torch.optim.SGD([w], lr=0.1, maximize=True), rho=0.5)
    (-w.square()).sum().backward()
    optimizer.first_step()
    assert w.item() == pytest.approx(1.5)


def test_running_statistics_are_those_of_the_first_pass():
    one, two = net(norm=True), net(norm=True)
    two(X)
    optimizer = SAM(torch.optim.SGD(one.parameters(), lr=0.1), rho=0.5, model=one)
    optimizer.step(closure_of(one, optimizer))
    assert torch.equal(one[1].running_mean, two[1].running_mean)
    assert int(one[1].num_batches_tracked) == 1 and one[1].track_running_stats
    bare = net(norm=True)
    optimizer = SAM(torch.optim.SGD(bare.parameters(), lr=0.1), rho=0.5)
    optimizer.step(closure_of(bare, optimizer))
    assert int(bare[1].num_batches_tracked) == 2
    with pytest.raises(RuntimeError), running_statistics_kept(one):
        raise RuntimeError
    assert one[1].track_running_stats


def test_a_scheduler_turns_the_wrapped_rate_and_hooks_run():
    model = net()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step(closure_of(model, optimizer))
    schedule.step()
    assert optimizer.base.param_groups[0]["lr"] == 0.05 and seen == [1]


@pytest.mark.parametrize("kind", [SAM, ASAM])
@pytest.mark.parametrize("base", BASES)
def test_a_resumed_run_equals_an_uninterrupted_one(kind, base):
    whole = net(norm=True)
    optimizer = kind(BASES[base](whole.parameters()), rho=0.1, model=whole)
    for step in range(6):
        if step == 3:
            file = io.BytesIO()
            torch.save({"net": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
        optimizer.step(closure_of(whole, optimizer))
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    resumed = net(seed=5, norm=True)
    resumed.load_state_dict(stored["net"])
    second = kind(BASES[base](resumed.parameters()), rho=0.9, model=resumed)
    second.load_state_dict(stored["optimizer"])
    radius = "sam_rho" if base.startswith("adadelta") else "rho"
    assert second.param_groups[0][radius] == 0.1 and second.param_groups is second.base.param_groups
    for _ in range(3):
        second.step(closure_of(resumed, second))
    assert equal(weights(whole), weights(resumed))
    assert torch.equal(whole[1].running_var, resumed[1].running_var)


def test_a_state_of_the_wrapped_optimizer_alone_is_taken():
    plain, wrapped = net(), net()
    one = torch.optim.SGD(plain.parameters(), lr=0.3, momentum=0.9)
    one.step(closure_of(plain, one))
    two = SAM(torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9), rho=0.2)
    two.load_state_dict(one.state_dict())
    assert two.param_groups[0]["lr"] == 0.3 and two.param_groups[0]["rho"] == 0.2
    two.step(closure_of(wrapped, two))


@pytest.mark.parametrize("base", ["diffgrad", "adadelta, whose rho is another"])
def test_a_radius_that_is_refused_changes_nothing(base):
    model, key = net(), "rho" if base == "diffgrad" else "sam_rho"
    optimizer = SAM(BASES[base](model.parameters()), rho=0.2)
    optimizer.step(closure_of(model, optimizer))
    before, bad = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    bad["param_groups"][0].update({key: -3.0, "lr": 7.0})
    with pytest.raises(InputError, match=f"{key}: got -3"):
        optimizer.load_state_dict(bad)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


def test_a_deep_copy_goes_its_own_way():
    model = net()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.1, model=model)
    optimizer.step(closure_of(model, optimizer))
    other, twin = copy.deepcopy((model, optimizer))
    assert twin.param_groups[0]["params"][0] is other[0].weight and twin.state is twin.base.state
    before = weights(model)
    twin.step(closure_of(other, twin))
    assert equal(weights(model), before)
    optimizer.step(closure_of(model, optimizer))
    assert equal(weights(model), weights(other))


def test_a_copy_between_the_halves_holds_the_weights_themselves():
    model = net()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5)
    before = weights(model)
    closure_of(model, optimizer)()
    optimizer.first_step()
    other, _ = copy.deepcopy((optimizer, 0))
    assert equal([p.detach() for p in other.param_groups[0]["params"]], before)


def test_the_radius_is_not_an_option_that_the_wrapped_optimizer_calls_so():
    one, two = (nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
    optimizer = SAM(torch.optim.Adadelta([{"params": [one], "rho": 0.7}], rho=0.9), rho=0.5)
    optimizer.add_param_group({"params": [two], "rho": 0.6, "sam_rho": 0.0})
    assert [g["rho"] for g in optimizer.base.param_groups] == [0.7, 0.6]
    assert [g["sam_rho"] for g in copy.deepcopy(optimizer).param_groups] == [0.5, 0.0]
    with pytest.raises(InputError, match="sam_rho: got -1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "sam_rho": -1})
    one.grad, two.grad = torch.tensor([3.0, 4.0]), torch.zeros(2)
    optimizer.first_step()
    assert one.tolist() == pytest.approx([3.3, 4.4]) and two.tolist() == [3.0, 4.0]


def test_groups_added_later_take_part():
    model = net()
    optimizer = SAM(torch.optim.SGD(model[0].parameters(), lr=0.1), rho=0.1)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.01})
    assert len(optimizer.base.param_groups) == 2 and optimizer.param_groups[1]["rho"] == 0.1
    before = weights(model)
    optimizer.step(closure_of(model, optimizer))
    assert not torch.equal(model[2].weight, before[2])


def test_parameters_without_gradient_empty_complex_and_half_ones():
    w = [
        nn.Parameter(torch.ones(3, dtype=torch.complex64)),
        nn.Parameter(torch.zeros(0)),
        nn.Parameter(torch.ones(2)),
        nn.Parameter(300 * torch.ones(2, dtype=torch.float16)),
    ]
    for kind in (SAM, ASAM):
        optimizer = kind(torch.optim.SGD(w, lr=0.1), rho=0.1)
        before = [p.detach().clone() for p in w]

        def closure(optimizer=optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = w[0].abs().square().sum() + w[1].sum() + (300 * w[3].float()).square().sum() / 1e4
            loss.backward()
            return loss

        # The squares of these half-precision gradients are beyond float16.
        optimizer.step(closure)
        assert w[2].grad is None and torch.equal(w[2], before[2])
        assert not torch.equal(w[0], before[0]) and bool(torch.isfinite(w[3]).all())


def test_an_exception_in_the_second_pass_leaves_the_weights():
    model = net(norm=True)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model)
    before, calls = weights(model), []
    real = closure_of(model, optimizer)

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert equal(weights(model), before) and model[1].track_running_stats
    optimizer.step(real)


@pytest.mark.parametrize("bad_pass", [1, 2])
def test_gradients_that_are_nan_raise_or_skip(bad_pass):
    for nonfinite in ("raise", "skip"):
        model = net()
        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), nonfinite=nonfinite)
        real, before, calls = closure_of(model, optimizer), weights(model), []

        def closure(real=real, model=model, calls=calls) -> Tensor:
            loss = real()
            calls.append(1)
            if len(calls) == bad_pass:
                model[0].weight.grad[0, 0] = float("nan")
            return loss

        if nonfinite == "raise":
            with pytest.raises(InputError, match="parameter 0: 1 of 40 values are NaN or infinite"):
                optimizer.step(closure)
        else:
            optimizer.step(closure)
        assert equal(weights(model), before) and not optimizer.state
        assert optimizer.skipped_steps == int(nonfinite == "skip")
        optimizer.step(real)
        assert not equal(weights(model), before)


@pytest.mark.parametrize("second", [True, False], ids=["as usual", "left out"])
def test_a_scaled_first_pass_that_overflows_costs_one_step_only(second):
    model = net()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), nonfinite="skip")
    scaler = torch.amp.GradScaler("cpu")
    before = weights(model)
    for factor in (float("inf"), 1.0):
        scaler.scale(F.cross_entropy(model(X), Y) * factor).backward()
        scaler.unscale_(optimizer)
        optimizer.first_step(zero_grad=True)
        scaler.update()
        assert all(p.grad is None for p in model.parameters()) and optimizer.skipped_steps == 1
        if factor == 1 or second:
            scaler.scale(F.cross_entropy(model(X), Y)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert equal(weights(model), before) == (factor != 1)


def test_what_cannot_be_used_is_named():
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for rho in (-0.1, float("nan"), float("inf"), "x"):
        with pytest.raises(InputError, match="rho: got"):
            SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=rho)
    with pytest.raises(InputError, match="base: got"):
        SAM(model.parameters())
    with pytest.raises(InputError, match="cannot be wrapped twice"):
        SAM(SAM(sgd))
    for other in (torch.optim.LBFGS(model.parameters()), GNS(model.parameters())):
        with pytest.raises(InputError, match=f"got {type(other).__name__}, which calls the closure itself"):
            SAM(other)
    with pytest.raises(InputError, match="sparse gradients only"):
        SAM(torch.optim.SparseAdam(nn.Embedding(3, 2).parameters()))
    with pytest.raises(InputError, match="nonfinite"):
        SAM(sgd, nonfinite="ignore")
    optimizer = SAM(sgd)
    with pytest.raises(InputError, match="rho: got -1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "rho": -1})
    with pytest.raises(InputError, match="two passes"):
        optimizer.step()
    with pytest.raises(InputError, match="closure: returned None"):
        optimizer.step(lambda: None)
    with pytest.raises(InputError, match="call first_step"):
        optimizer.second_step()
    closure_of(model, optimizer)()
    optimizer.first_step()
    with pytest.raises(InputError, match="called twice"):
        optimizer.first_step()
    optimizer.restore()
    table = nn.Embedding(4, 2, sparse=True)
    sparse = SAM(torch.optim.SGD(table.parameters(), lr=0.1))
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match="sparse"):
        sparse.first_step()
