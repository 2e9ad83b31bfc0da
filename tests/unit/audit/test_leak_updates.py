"""``lineament leak`` on saved updates, local training, people, and data of the attacker's own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lineament.audit import leak_budget
from lineament.audit.leak import LeakOptions, leak
from lineament.cli import main
from lineament.core.checks import InputError
from lineament.data.digits import digit_images
from lineament.privacy import Local, Search
from lineament.privacy.defences import defence_of

FACTORY = """import torch
from torch import nn
def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
"""


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A folder with a client's pictures, others, and the weights before and after one step on its pictures, as pipelines save them."""
    held = digit_images()
    x, y = held.inputs.float() / held.inputs.float().max(), held.targets
    for name, rows in (("mine", slice(4)), ("theirs", slice(4, 8)), ("others", slice(10, 90))):
        np.savez(tmp_path / f"{name}.npz", inputs=x[rows].numpy(), targets=y[rows].numpy())
    (tmp_path / "net.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(FACTORY, scope)
    net = scope["make"]().train()
    np.savez(tmp_path / "before.npz", *[v.numpy() for v in net.state_dict().values()])
    descent = torch.optim.SGD(net.parameters(), 0.1)
    nn.functional.cross_entropy(net(x[:4]), y[:4]).backward()
    descent.step()
    np.savez(tmp_path / "after.npz", *[v.numpy() for v in net.state_dict().values()])
    save_file(net.state_dict(), tmp_path / "after.safetensors")
    torch.save(net.state_dict(), tmp_path / "after.pt")
    return tmp_path


WORDS = (
    "--public",
    "others.npz",
    "--local",
    "rate=0.1",
    "--prior",
    "none",
    "--attack",
    "ig",
    "--steps",
    "25",
)


@pytest.mark.parametrize("form", ["npz", "safetensors", "pt"])
def test_a_saved_update_is_audited_with_the_pictures_behind_it(trained, capsys, form):
    assert main(["leak", "net.py:make", "mine.npz", "--update", f"after.{form}", "--before", "before.npz", *WORDS, "--out", "own"]) == 0  # fmt: skip
    told = json.loads((trained / "own" / "leak.json").read_text())
    section = told["sections"][0]
    numbers = section["numbers"]
    assert numbers["prices"][0]["cosine"] == pytest.approx(1, abs=1e-3) and numbers["buffers"] == 1
    assert numbers["local"].startswith("1 local epoch of sgd at rate 0.1")
    attacked = numbers["attacked"][0]
    assert len(attacked["psnr"]) == len(attacked["wrong"]) == 4
    assert sum(attacked["psnr"]) > sum(attacked["wrong"]) + 4 * 2  # dB above the guess from another message
    assert sum(attacked["registered"]) >= sum(attacked["psnr"]) - 1e-4
    keys = [finding["key"] for finding in told["findings"]]
    assert "buffers leak" in keys and "update of others" not in keys
    assert "buffers of 1 batch norm were sent along" in " ".join(told["notes"])


def test_an_update_of_one_picture_is_audited(trained, capsys):
    held = np.load("mine.npz")
    np.savez("one.npz", inputs=held["inputs"][:1], targets=held["targets"][:1])
    (trained / "head.py").write_text(
        FACTORY.replace("nn.Flatten(), nn.Linear(512, 10)", "nn.Conv2d(8, 10, 8), nn.Flatten()")
    )
    assert main(["leak", "head.py:make", "others.npz", "--out", "head"]) == 2
    told = capsys.readouterr().err
    assert "pass --known-labels" in told and "training a prior" not in told
    words = [*WORDS[:-1], "1", "--out", "one"]
    assert main(["leak", "net.py:make", "one.npz", "--update", "after.pt", *words]) == 0
    numbers = json.loads((trained / "one" / "leak.json").read_text())["sections"][0]["numbers"]
    assert len(numbers["attacked"][0]["psnr"]) == 1


def test_copies_of_audited_pictures_are_kept_from_the_attacker(tmp_path):
    held = digit_images()
    x = held.inputs[:40].float() / held.inputs.float().max()
    np.savez(tmp_path / "twice.npz", inputs=np.concatenate([x, x]), targets=np.concatenate([held.targets[:40]] * 2))  # fmt: skip
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 10))
    options = LeakOptions(attacks=("ig",), prior="none", search=Search(steps=1, restarts=1))
    found = leak(net, str(tmp_path / "twice.npz"), out=tmp_path / "out", defences=["none"], pictures=4, options=options)  # fmt: skip
    facts = {fact["name"]: fact["value"] for fact in json.loads(found.json.read_text())["facts"]}
    assert int(facts["Other pictures, known to the attacker"]) in (72, 73, 74)


def test_an_update_of_other_pictures_is_said_to_be_one(trained, capsys):
    assert main(["leak", "net.py:make", "theirs.npz", "--update", "after.pt", *WORDS, "--out", "foreign"]) == 0  # fmt: skip
    assert "is of other pictures, other weights, or other steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mine.npz", "--update", "after.pt"], "--public: got none"),
        (["mine.npz", "--update", "before.npz", *WORDS], "same weights as before"),
        (["mine.npz", "--update", "mine.npz", *WORDS], "2 arrays, expected 9"),
        (["mine.npz", "--update", "after.pt", "--public", "mine.npz"], "contains the audited pictures"),
        (["mine.npz", "--update", "after.pt", "--public", "nowhere.npz"], "--public: 'nowhere.npz'"),
        (["mine.npz", "--before", "before.npz"], "--before: got weights before an update"),
        (["others.npz", "--local", "epochs=2.5"], "a whole number after the ="),
        (["others.npz", "--batch-norm", "off"], "running"),
        (["others.npz", "--minutes", "-1"], "--minutes"),
        (["others.npz", "--minutes", "1", "--steps", "5"], "--steps: --minutes says how many"),
        (
            ["others.npz", "--attack", "closed form", "--prior", "none", "--pictures", "2"],
            "linear first layer",
        ),
        (["others.npz", "--attack", "gifd", "--prior", "none"], "--attack: 'gifd' searches a generator"),
    ],
)
def test_what_cannot_be_audited_is_named_in_a_line(trained, capsys, words, says):
    assert main(["leak", "net.py:make", *words, "--out", "wrong"]) != 0
    told = capsys.readouterr().err
    assert says in told and "Traceback" not in told
    assert not (trained / "wrong" / "leak.html").exists()


def test_people_are_kept_from_the_attacker_and_found_among_their_other_pictures(tmp_path):
    generator = torch.Generator().manual_seed(0)
    people = torch.arange(24).repeat_interleave(4)
    faces = torch.rand(24, 1, 8, 8, generator=generator)[people]
    x = (0.8 * faces + 0.2 * torch.rand(96, 1, 8, 8, generator=generator)).numpy()
    np.savez(tmp_path / "faces.npz", inputs=x, targets=(people % 3).numpy(), person=people.numpy())
    torch.manual_seed(1)
    net = nn.Sequential(nn.AvgPool2d(1), nn.Flatten(), nn.Linear(64, 8), nn.Sigmoid(), nn.Linear(8, 3))
    options = LeakOptions(
        attacks=("ig",),
        prior="none",
        groups="person",
        local=Local(rate=0.01),
        search=Search(steps=2, restarts=1),
    )
    found = leak(
        net, str(tmp_path / "faces.npz"), out=tmp_path / "out", defences=["none"], pictures=6, options=options
    )
    by = {a["attack"]: a for a in found.sections[0].numbers["attacked"]}
    assert list(by) == ["ig", "closed form"]  # it applies, so that the strongest attacker has it
    assert by["closed form"]["picture_ranks"] == [1] * 6 and by["closed form"]["person_ranks"] == [1] * 6
    assert min(by["closed form"]["psnr"]) > 60
    page = found.html.read_text()
    assert "None of the attacker" in page and "another message" in page
    with pytest.raises(InputError, match="of two"):
        leak(
            net,
            str(tmp_path / "faces.npz"),
            out=tmp_path / "many",
            defences=["none"],
            pictures=20,
            options=options,
        )


def test_minutes_set_the_steps(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 10))
    lines: list[str] = []
    options = LeakOptions(attacks=("ig",), prior="none", minutes=0.1, search=Search(steps=1, restarts=1))
    leak(
        net,
        "digits",
        out=tmp_path,
        defences=["none"],
        pictures=2,
        samples=40,
        options=options,
        note=lines.append,
    )
    (told,) = [line for line in lines if "fit in 0.1 minutes" in line]
    assert int(told.split()[0]) > 1


class Clock:
    """A clock that only what is timed moves."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def look(self, steps: int) -> None:
        self.now += 2 + 0.5 * steps


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(leak_budget, "time", made)
    return made


def test_a_plan_ends_near_its_time_and_leaves_out_what_would_be_searched_too_little(clock):
    few = [(1, defence_of("none")), (1, defence_of("clip=1"))]
    plan = leak_budget.Budget(2, clock.now).plan(clock.look, few)
    assert plan.looks == 2
    for _ in few:
        clock.look(plan.steps)
    assert 0.75 * 120 < clock.now - 100 < 120

    clock.now = 100.0
    many = [(size, defence_of(text)) for size in (1, 4) for text in ("none", "clip=1", "prune=90")]
    plan = leak_budget.Budget(1.2, clock.now).plan(clock.look, many)
    assert plan.steps >= leak_budget.FEWEST and plan.looks == 3  # a percentile is repeated in two ways
    for defence in many[: plan.looks]:
        for _ in defence[1].copies():
            clock.look(plan.steps)
    assert clock.now - 100 < 1.2 * 60
    told = leak_budget.told_left_out(many[plan.looks :], 1)
    assert told == ["Left out, because 1 minute was too short for it: undefended messages of 4; messages of 4 under clip 1; messages of 4 under prune 90."]  # fmt: skip
    clock.now = 100.0
    assert leak_budget.Budget(0.1, clock.now).plan(clock.look, many).looks == 1
    assert clock.now - 100 <= 2.5  # one trial says that there is no time for more


def test_a_prior_takes_its_share_of_the_time(clock):
    budget = leak_budget.Budget(1, clock.now)
    steps = budget.prior_steps(lambda n: clock.look(n), 600)
    assert 10 < steps < 600 and 2 + 0.5 * steps < 0.3 * 60
    assert leak_budget.Budget(60, clock.now).prior_steps(lambda n: clock.look(n), 600) == 600


def test_what_there_was_no_time_for_is_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(leak_budget.Budget, "plan", lambda self, look, looks: leak_budget.Plan(2, 2))
    monkeypatch.setattr(leak_budget.Budget, "prior_steps", lambda self, train, most: 3)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 10))
    options = LeakOptions(attacks=("latent",), minutes=5, search=Search(restarts=1))
    found = leak(net, "digits", out=tmp_path, defences=["none", "clip=1", "noise=1"], pictures=2, samples=40, options=options)  # fmt: skip
    attacked = found.sections[0].numbers["attacked"]
    assert [a["defence"] for a in attacked] == ["nothing", "clip 1"]
    notes = " ".join(json.loads(found.json.read_text())["notes"])
    assert "messages of 1 under noise 1" in notes and "3 of 600 steps" in notes
