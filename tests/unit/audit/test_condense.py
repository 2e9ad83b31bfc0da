"""Condensed sets judged: the protocol, the scores, distances, memories; and ``lineament condense`` with its page."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import timedelta
from functools import partial, partialmethod
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lineament.audit.condense import CondenseOptions, condense_data
from lineament.cli import main
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError
from lineament.learn import (
    Condensation,
    Condensed,
    Protocol,
    class_directions,
    condense,
    convnet,
    evaluate,
    kernel_velocity,
)
from lineament.learn.condensation import evaluating, trials
from lineament.learn.condensation.continual import class_tasks, continual
from lineament.learn.condensation.diagnostics import jacobian
from lineament.learn.condensation.siamese import Strategy
from lineament.load import load_data

QUICK = Protocol(networks=2, epochs=8, full_epochs=2)


def stripes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes: which third of the rows is bright."""
    y = torch.arange(count) % 3
    x = 0.3 * torch.rand(count, 1, 9, 9, generator=torch.Generator().manual_seed(seed))
    for k, c in enumerate(y.tolist()):
        x[k, :, 3 * c : 3 * c + 3] += 0.6
    return x, y


REAL, TEST = stripes(60, 0), stripes(45, 1)


@pytest.fixture(scope="module")
def made() -> Condensed:
    return condense(
        *REAL, per_class=2, method="dcc", network="mlp", options=Condensation(outer=2, inner=2, epochs=2)
    )


def test_what_a_set_is_compared_with(made):
    found = evaluate(made, TEST, real=REAL, networks=["mlp", "lenet"], protocol=QUICK)
    assert list(found.accuracy) == [
        "condensed",
        "clamped",
        "8 bit",
        "own start",
        "random real",
        "class means",
        "all pictures",
    ]
    assert all(
        v.shape == (2,) and (v >= 0).all() and (v <= 1).all()
        for held in found.accuracy.values()
        for v in held.values()
    )
    assert set(found.augmented) == {"condensed", "own start", "random real"}
    mine, random, full = (found.mean(w, "mlp") for w in ("condensed", "random real", "all pictures"))
    alpha = 0.5 * (mine - random) - 0.5 * (full - mine)
    assert found.label_robust == pytest.approx(
        100 * (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))
    )
    beta = 0.5 * (mine - random) + 0.5 * (
        found.mean("condensed", "mlp", augmented=True) - found.mean("random real", "mlp", augmented=True)
    )
    assert found.augmentation_robust == pytest.approx(evaluating.robust_score(beta))
    again = evaluate(made, TEST, real=REAL, networks=["mlp"], protocol=QUICK, augmented=False)
    assert (
        torch.equal(again.accuracy["condensed"]["mlp"], found.accuracy["condensed"]["mlp"])
        and again.augmentation_robust is None
    )
    assert found.storage == pytest.approx(6 / 60)
    assert {what: set(held) for what, held in found.seconds.items()} == {
        what: set(held) for what, held in found.accuracy.items()
    }
    found.plot()


def test_a_set_of_good_pictures_is_learned_from_and_a_wrong_one_is_not(made):
    x, y = stripes(6, 5)
    order = y.argsort(stable=True)
    good = replace(made, pictures=x[order], labels=y[order], start=torch.empty(0))
    protocol = replace(QUICK, epochs=60, full_epochs=0)
    right = evaluate(good, TEST, networks=["mlp"], protocol=protocol, augmented=False)
    wrong = evaluate(
        replace(good, labels=(good.labels + 1) % 3),
        TEST,
        networks=["mlp"],
        protocol=protocol,
        augmented=False,
    )
    assert right.mean("condensed", "mlp") > 0.9 and wrong.mean("condensed", "mlp") < 0.1
    assert "all pictures" not in right.accuracy


def test_the_protocol_to_the_letter(made, monkeypatch):
    made_with, steps = [], []

    class Counted(torch.optim.SGD):
        def __init__(self, weights, **how):
            made_with.append(how)
            super().__init__(weights, **how)

        def step(self, closure=None):
            steps.append(len(made_with))
            return super().step(closure)

    monkeypatch.setattr(trials.torch.optim, "SGD", Counted)
    evaluate(made, TEST, networks=["mlp"], protocol=Protocol(networks=1, epochs=10), augmented=False)
    first = [n for n in steps if n <= 2]
    assert len(first) == 11 and first.count(1) == 7  # E + 1 epochs, the rate falls after epoch E // 2 + 1
    assert [how["lr"] for how in made_with[:2]] == pytest.approx([0.01, 0.001])
    assert made_with[0]["momentum"] == 0.9 and made_with[0]["weight_decay"] == 5e-4
    assert (Protocol().networks, Protocol().epochs_of(False), Protocol().epochs_of(True)) == (20, 300, 1000)


def test_judging_that_was_cut_off_goes_on_with_the_network_it_stopped_at(made, tmp_path, monkeypatch):
    """Alone and as a memory: the same numbers, no network trained twice."""
    calls, trained = [], trials._train

    def killed(*given):
        calls.append(given)
        if len(calls) in stops:
            raise KeyboardInterrupt
        trained(*given)

    def judged(checkpoint=None):
        how = {"protocol": QUICK, "checkpoint": checkpoint}
        return evaluate(made, TEST, real=REAL, networks=["mlp"], augmented=True, **how)

    def remembered(checkpoint=None):
        tasks, options = class_tasks(*REAL6, *TEST6, 3), Condensation(outer=2, inner=1, epochs=0)
        how = {"network": "mlp", "options": options, "protocol": QUICK, "checkpoint": checkpoint}
        return continual(tasks, per_class=1, methods=["dcc", "random"], **how)

    REAL6, TEST6 = ((x, y + 3 * (torch.arange(len(y)) // 3 % 2)) for x, y in (REAL, TEST))
    monkeypatch.setattr(trials, "_train", killed)
    monkeypatch.setattr(Checkpoint, "loop", partialmethod(Checkpoint.loop, every=1))
    for name, work, networks in (("set", judged, 20), ("memory", remembered, 12)):
        stops = ()
        whole = work()
        stops = (6, 13)
        calls.clear()
        for _ in stops:
            with pytest.raises(KeyboardInterrupt):
                work(Checkpoint(tmp_path / name, {}))
        again = work(Checkpoint(tmp_path / name, {}))
        assert len(calls) == networks + 2
        for what, found in again.accuracy.items():
            held = whole.accuracy[what]
            assert torch.equal(found, held) if name == "memory" else torch.equal(found["mlp"], held["mlp"])


def test_the_time_of_an_evaluation_is_told_before_it(made, monkeypatch):
    """Here each network takes as long as it has steps: what is told is their sum, and what is left follows it."""
    said, shown = [], {}

    def noted(items, description, total, **how):
        shown[description] = (total, how["work"])
        return items

    monkeypatch.setattr(evaluating, "progress", noted)
    clock = iter(range(10**6))
    monkeypatch.setattr(trials.time, "perf_counter", lambda: float(next(clock)))
    how = {"networks": ["mlp"], "protocol": QUICK, "augmented": False, "note": said.append}
    evaluate(made, TEST, real=REAL, **how)
    total, work = shown["networks trained"]
    assert total == len(work) == 14 and len(set(work)) == 3  # a set, the class means, all pictures
    step = 0.5  # of the clock above: two steps between two looks at it
    assert work[0] == pytest.approx(step * (9 + 45 / 6 / 3)) and work[-1] == pytest.approx(
        step * (3 * 60 / 32 + 45 / 32 / 3)
    )
    assert said == [
        f"training 14 networks, 2 in each of 7 ways, in about {timedelta(seconds=math.ceil(sum(work)))}"
    ]


def test_other_constants_and_scales_are_refused(made):
    with pytest.raises(InputError, match="made with"):
        evaluate(made, TEST, normalisation=(torch.zeros(1), torch.ones(1)), protocol=QUICK)
    with pytest.raises(InputError, match=r"\[0, 255\]"):
        evaluate(made, (255 * TEST[0], TEST[1]), protocol=QUICK)
    with pytest.raises(InputError, match="pictures of"):
        evaluate(made, (TEST[0][..., 1:], TEST[1]), protocol=QUICK)
    with pytest.raises(InputError, match="nearest"):
        evaluate(made, TEST, networks=["lennet"], protocol=QUICK)


def test_distances_to_training_pictures(made):
    rows = torch.tensor([0, 3, 1, 4, 2, 5])
    copied = replace(made, pictures=REAL[0][rows] + 0.01, labels=REAL[1][rows])
    found = evaluate(
        copied,
        TEST,
        real=REAL,
        networks=["mlp"],
        protocol=replace(QUICK, epochs=1, full_epochs=0),
        augmented=False,
    )
    assert torch.allclose(found.nearest, torch.full((6,), 0.01), atol=1e-5)
    assert (found.nearest_real > 0.02).all()  # a training picture is not its own neighbour
    assert found.apart.shape == (6,) and (found.apart >= found.nearest_real).all()


def test_networks_with_batch_norm_are_judged_with_the_old_augmentation(made, monkeypatch):
    told = []
    monkeypatch.setattr(
        trials, "_train", lambda *given: told.append((given[5], given[6]))
    )  # what is trained with, and how long
    pool = {
        norm: partial(convnet, (1, 9, 9), 3, width=4, depth=1, norm=norm) for norm in ("instance", "batch")
    }
    for old, plain in (
        (None, (None, 300)),
        ("crop_scale_rotate", (Strategy("crop_scale_rotate", "old"), 1000)),
    ):
        told.clear()
        protocol = Protocol(networks=1, full_epochs=0, old=old)
        evaluate(made, TEST, networks=pool, protocol=protocol)
        normed = (Strategy(old or "crop_noise", "old"), 1000)
        assert told[:4] == [
            plain,
            (Strategy(protocol.strategy), 1000),
            normed,
            (Strategy(protocol.strategy), 1000),
        ]


def test_memories_grow_and_a_learner_without_old_classes_would_fail():
    tasks = class_tasks(*(torch.cat([a, a]) for a in (REAL[0],)), torch.cat([REAL[1], REAL[1] + 3]), *TEST, 3)
    assert [sorted(t[1].unique().tolist()) for t in tasks] and sum(len(t[1]) for t in tasks) == 120
    domains = [(*REAL, *TEST), (1 - REAL[0], REAL[1], 1 - TEST[0], TEST[1])]
    found = continual(domains, per_class=3, methods=["random", "dcc"], network="mlp", options=Condensation(outer=1, inner=1, epochs=1), protocol=replace(QUICK, epochs=80))  # fmt: skip
    assert found.memory == [9, 18] and found.accuracy["random"].shape == (2, 2)
    assert found.accuracy["random"][1].mean() > 0.6
    found.plot()


def test_kernel_velocity_and_directions():
    net = nn.Sequential(nn.Flatten(), nn.Linear(81, 8), nn.Tanh(), nn.Linear(8, 3))
    x, probe = REAL[0][:6], TEST[0][:4]
    by_hand = torch.cat(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(net(p[None])[0, k], list(net.parameters()))])[
                None
            ]
            for p in probe
            for k in range(3)
        ]
    )
    assert torch.allclose(jacobian(net, probe), by_hand, atol=1e-5)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    velocity = kernel_velocity(net, x, REAL[1][:6], probe, epochs=3, rate=0.5)
    assert (
        velocity.shape == (3,) and (velocity >= -1e-6).all() and (velocity <= 1).all() and velocity[0] > 1e-5
    )
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert class_directions(REAL[0], REAL[1], 1 - REAL[0], REAL[1]).mean() < -0.9


def test_the_command_makes_a_set_that_opens_everywhere(tmp_path, capsys):
    out = tmp_path / "set"
    words = [
        "condense",
        "digits",
        "--per-class",
        "1",
        "--method",
        "dcc",
        "--network",
        "mlp",
        "--outer",
        "2",
        "--out",
        str(out),
        "--samples",
        "300",
    ]
    judged = ["--evaluate", "--networks", "mlp", "--nets", "2", "--epochs", "3", "--continual", "2"]
    assert main([*words, *judged]) == 0
    told, parts = capsys.readouterr()
    assert "dcc: part 2 of 2, 5 classes" in parts
    assert "condensed.npz" in told and "test pictures" in told
    assert "s on the set (4 epochs)" in told and "on all pictures (31 epochs)" in told
    report = json.loads((out / "condense.json").read_text())
    assert [s["name"] for s in report["sections"]] == ["set", "worth", "nearest", "memory"]
    assert not (out / ".stages").exists() and "no promise of anonymity" in (out / "condense.html").read_text()
    assert len(load_data(out / "condensed.npz")) == len(load_data(out / "pictures")) == 10
    assert main(words) == 2 and "--overwrite" in capsys.readouterr().err
    more = tmp_path / "more"
    assert main([*words[:-4], "--samples", "300", "--from", str(out), "--out", str(more)]) == 0
    assert torch.equal(Condensed.load(more).start, Condensed.load(out).pictures)
    small = tmp_path / "small.npz"
    np.savez(small, x=np.random.default_rng(0).random((20, 1, 6, 6)), y=np.arange(20) % 10)
    for wrong, says in (
        (["--method", "dca"], "nearest"),
        (["--networks", "vgg"], "vgg11"),
        (["--rate", "quick"], "paper"),
        (["--continual", "9", "--evaluate"], "[2, 5]"),
        (["--per-class", "900"], "--per-class: got 900"),
        (["--strategy", "flop"], "flip"),
        (["--continual", "9"], "--continual: got 9"),
        (["--evaluate", "--nets", "0"], "--nets: got 0"),
        (["--evaluate", "--networks", ","], "--networks: got none"),
        (["--from", str(tmp_path)], "--from: "),
        (["--device", "gpu"], "--device: 'gpu' cannot be used here"),
        (["--test", "digits"], "--evaluate"),
        (["--test", str(small), "--evaluate"], "expected pictures of (1, 8, 8)"),
        (["--rate", "1e30"], "diverged"),
    ):
        assert main([*words, "--overwrite", *wrong]) == 2
        assert says in capsys.readouterr().err
        assert not (out / ".stages").exists()
    assert (out / "condensed.npz").exists()  # what was refused replaced nothing


PIXELS, EVEN = np.random.default_rng(0).random((20, 1, 6, 6)).astype("f4"), np.arange(20) % 4
REFUSED = {
    "labels with a gap": (PIXELS, np.where(EVEN == 2, 5, EVEN), "", "DATA: no picture is of classes 2, 4; expected labels from 0 to 5"),
    "a class without pictures": (PIXELS, EVEN, "--classes a,b,c,d,e", "DATA: no picture is of class e; leave out the name"),
    "a name twice": (PIXELS, EVEN, "--classes a,b,a,c", "--classes: 'a' is the name of several classes"),
    "one class": (PIXELS, 0 * EVEN, "", "DATA: got one class"),
    "fewer than wanted": (PIXELS, EVEN, "--per-class 6", "--per-class: got 6, but class 0 has only 5"),
    "one-hot labels": (PIXELS, np.eye(4)[EVEN], "", "DATA: got a float32 tensor of shape (20, 4) as labels, expected one whole number or name a picture; of one-hot rows take argmax(1)"),
    "rows for pictures": (PIXELS.reshape(20, 36), EVEN, "", "DATA: got samples of (36,), expected images"),
    "too small": (PIXELS[..., :3, :3], EVEN, "", "DATA: got pictures of 3 x 3, expected at least 4 x 4"),
    "16 bits": ((65535 * PIXELS).astype("u2"), EVEN, "", "divide 16 bits by 65535"),
    "alpha": (np.tile(PIXELS, (1, 4, 1, 1)), EVEN, "", "DATA: got 4 channels, expected 1 or 3; leave out the fourth (alpha)"),
    "not a number": (np.where(PIXELS > 0.99, np.nan, PIXELS), EVEN, "", "DATA: the inputs hold NaN"),
    "normalised": (PIXELS - 0.5, EVEN, "", "pass them as they were before they were normalised"),
    "test data that are missing": (PIXELS, EVEN, "--evaluate --test no.npz", "--test: 'no.npz' does not exist"),
    "no set to begin with": (PIXELS, EVEN, "--from nois", "--from: got 'nois', expected 'real', 'noise' or the folder of a condensed set; nearest: 'noise'"),
    "one class of a named array": (PIXELS, 0 * EVEN, "--targets y", "--targets: got one class"),
    "a part where there are none": (PIXELS, EVEN, "--split train", "--split: got 'train'"),
    "none at all": (PIXELS, EVEN, "--per-class 0", "--per-class: got 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_condensed_is_one_line_and_leaves_nothing(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    x, y, more, says = REFUSED[case]
    np.savez("data.npz", x=x, y=y)
    line = "condense data.npz --per-class 1 --outer 1 --network mlp --out set"
    assert main([*line.split(), *more.split()]) == 2
    *before, said = capsys.readouterr().err.splitlines()
    assert says in said
    assert {text.partition(" ")[2].split()[0] for text in before} <= {"reading"}
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


def test_sets_that_cannot_be_begun_with_are_refused(made, tmp_path, monkeypatch):
    from lineament.learn.condensation import condensed

    begin = partial(condense, *REAL, per_class=2, method="dcc", network="mlp")
    with pytest.raises(
        InputError, match=r"start: a set of \[6, 0, 0\] pictures by class, expected 2 of each"
    ):
        begin(start=replace(made, labels=0 * made.labels))
    monkeypatch.setattr(condensed, "_digest", lambda path: "the same")  # whoever edits both files
    folder = made.save(tmp_path)
    with np.load(folder / "condensed.npz") as stored:
        arrays = dict(stored)
    for change in ({"x": arrays["x"] * np.nan}, {"y": arrays["y"][:5]}):
        np.savez(folder / "condensed.npz", **{**arrays, **change})
        with pytest.raises(InputError, match=r"expected finite pictures .* with a label each"):
            begin(start=folder)


def test_networks_and_data_that_cannot_be_used_are_refused():
    x, y = REAL
    cases: list[tuple[dict[str, Any], str]] = [
        ({"network": lambda: nn.Linear(3, 3)}, r"network: it cannot take pictures of \(1, 9, 9\) \(mat1"),
        ({"network": lambda: torch.relu}, "network: it makes .*relu.*, expected a module"),
        ({"start": None}, "start: got None, expected 'real', 'noise' or the folder"),
        ({"options": Condensation(outer=2, outer_warmup=3)}, r"outer_warmup: got 3, expected .*\[0, 2\]"),
    ]
    for bad, says in cases:
        with pytest.raises(InputError, match=says):
            condense(x, y, per_class=1, method="dcc", **bad)
    with pytest.raises(InputError, match="images: got a complex64 tensor"):
        condense(x.to(torch.complex64), y, per_class=1)


def test_a_condensing_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    from lineament.audit import condense as module

    options = CondenseOptions(network="mlp", learning=Condensation(outer=2, inner=2, epochs=1))
    how = {"per_class": 1, "method": "dsac", "samples": 200, "options": options}
    first = module.Condensed.save

    def killed(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Condensed, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        condense_data("digits", out=tmp_path / "a", **how)
    monkeypatch.setattr(module.Condensed, "save", first)
    notes: list[str] = []
    condense_data("digits", out=tmp_path / "a", **how, note=notes.append)
    assert any("cut off" in line for line in notes)
    condense_data("digits", out=tmp_path / "b", **how)
    assert torch.equal(*(Condensed.load(tmp_path / name).pictures for name in "ab"))


def test_a_set_that_is_worse_than_what_costs_nothing_is_not_called_good():
    from lineament.audit.condense import _worth

    def told(means: float, random: float) -> tuple[str, str]:
        accuracy = {"condensed": 0.6, "random real": random, "class means": means}
        held = {what: {"mlp": torch.tensor([v, v + 0.02])} for what, v in accuracy.items()}
        (finding,) = _worth(evaluating.Evaluation(held), QUICK, 10).findings
        return finding.severity, finding.sentence

    assert told(0.5, 0.5)[0] == "good" and "better" not in told(0.5, 0.5)[1]
    severity, sentence = told(0.7, 0.5)
    assert severity == "warning" and sentence.endswith("does better: class means 71.0 %.")
    severity, sentence = told(0.5, 0.6)
    assert severity == "warning" and "no better than real pictures" in sentence
