"""What the gaze lens says, measured again: patches and frequencies exchanged by hand between the pairs of images that report.json names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from tests.independent.conftest import answers
from tests.independent.said import Percent, numbers, says

NAMES = ["residual", "misnormalised", "marked", "one marked"]


@pytest.fixture(params=NAMES)
def case(request, people, told):
    network, x, _, _ = people(request.param)
    return request.param, network, x, told(request.param, "accuracy", "gaze")["gaze"]


def corners(window):
    return slice(window["top"], window["top"] + window["height"]), slice(
        window["left"], window["left"] + window["width"]
    )


def with_window(x, giver, window):
    x = x.clone()
    x[(..., *corners(window))] = giver[(..., *corners(window))]
    return x


def interval(values):
    mean, half = float(values.mean()), 1.96 * float(values.std()) / len(values) ** 0.5
    return mean, mean - half, mean + half


def share(values):
    found = binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
    return float(values.double().mean()), found.low, found.high


def difference(ours, theirs):
    """Newcombe's interval of a difference of two shares."""
    (p, low, high), (q, other_low, other_high) = share(ours), share(theirs)
    return (
        p - q,
        p - q - ((p - low) ** 2 + (other_high - q) ** 2) ** 0.5,
        p - q + ((high - p) ** 2 + (q - other_low) ** 2) ** 0.5,
    )


def percents(values, decimals=1):
    return [Percent(value, decimals) for value in values]


def by_hand(network, x, place):
    """Which answers follow the patch and stay right, and the same for patches elsewhere."""
    rows, donors = torch.tensor(place["rows"]), torch.tensor(place["donors"])
    said = answers(network, x).argmax(1)
    assert (
        bool((said[rows] != said[donors]).all()) and len(set(place["rows"])) == len(rows) == place["samples"]
    )
    found = [
        answers(network, with_window(x[rows], x[donors], window)).argmax(1)
        for window in (place["window"], *place["others"])
    ]
    return said, rows, donors, found


def test_one_place_of_the_image(case, people):
    name, network, x, section = case
    place, y = section["numbers"]["place"], people(name)[2]
    said, rows, donors, found = by_hand(network, x, place)
    follows = [(each == said[donors]).double() for each in found]
    right = [(each == y[rows]).double() for each in found]
    others_follow, others_right = torch.stack(follows[1:]).mean(0), torch.stack(right[1:]).mean(0)
    before = (said[rows] == y[rows]).double()
    measured = {
        "followed": follows[0].mean(),
        "others_followed": others_follow.mean(),
        "accuracy": before.mean(),
        "swapped_accuracy": right[0].mean(),
        "others_swapped_accuracy": others_right.mean(),
    }
    for key, value in measured.items():
        assert place[key] == pytest.approx(float(value), abs=1e-6)
    followed, lost = interval(follows[0] - others_follow), interval(others_right - right[0])
    assert place["followed_excess"] == pytest.approx(followed, abs=1e-5)
    assert place["lost_excess"] == pytest.approx(lost, abs=1e-5)
    window, (height, width) = place["window"], x.shape[-2:]
    area = Percent(window["height"] * window["width"] / (height * width), 0)
    where = [
        window["top"] + 1,
        window["top"] + window["height"],
        window["left"] + 1,
        window["left"] + window["width"],
    ]
    cost, elsewhere = float(before.mean() - right[0].mean()), float(before.mean() - others_right.mean())
    first = section["sentence"].partition(" Exchanged between images")[0].partition(" The maps put")[0]
    finding = next(f for f in section["findings"] if not f["key"].startswith("cue"))
    if place["decides"]:
        # Rows and columns in sentences are written 1–4.
        shares = [Percent(float(follows[0].mean()), 0), len(rows), Percent(float(others_follow.mean()), 0)]
        accuracy = percents([float(before.mean()), float(right[0].mean())])
        says(_ranged(first), area, *where, *shares, *percents(followed), *accuracy)
        assert finding["key"] == "place" and finding["severity"] == "warning"
        says(_ranged(finding["sentence"]), *where, area, *shares, *percents(followed), *accuracy)
        assert followed[1] > 0.1
    elif place["one"] and place["one"]["decides"]:
        _one_answer(section, place, said, rows, donors, network, x, first, finding)
    elif place["matters"]:
        shown = Percent(float(follows[0].mean()), 0)
        says(
            _ranged(first),
            *where,
            area,
            Percent(abs(cost)),
            len(rows),
            Percent(elsewhere),
            *percents(lost),
            shown,
        )
        assert finding["key"] == "place matters"
        says(_ranged(finding["sentence"]), *where, Percent(abs(cost)), len(rows), *percents(lost))
    else:
        tried = place["windows"]
        says(
            _ranged(first),
            tried,
            *where,
            area,
            Percent(abs(cost)),
            len(rows),
            Percent(elsewhere),
            *percents(lost),
        )
        assert finding["key"] == "no place" and followed[1] <= 0.15
        says(finding["sentence"], tried, len(rows))


def _ranged(text):
    return text.replace("–", " to ")


def _one_answer(section, place, said, rows, donors, network, x, first, finding):
    one = place["one"]
    window, answer = one["window"], one["answer"]
    swapped = answers(network, with_window(x[rows], x[donors], window)).argmax(1)
    lent = said[donors] == answer
    others = ~lent & (said[rows] != answer)
    followed, control = share(swapped[lent] == answer), float((swapped[others] == answer).double().mean())
    excess = difference(swapped[lent] == answer, swapped[others] == answer)
    assert one["excess"] == pytest.approx(excess, abs=1e-4) and excess[1] > 0.15
    assert one["samples"] == int(lent.sum()) and f"“{answer}”" in first
    where = [
        window["top"] + 1,
        window["top"] + window["height"],
        window["left"] + 1,
        window["left"] + window["width"],
    ]
    area = Percent(place["area"], 0)
    says(_ranged(first), area, *where, *percents(followed), int(lent.sum()), Percent(control))
    shares = [Percent(followed[0], 0), int(lent.sum()), *percents(followed[1:], 0), Percent(control, 0)]
    says(_ranged(finding["sentence"]), *where, area, *shares)


def within(mixed, x, giver):
    """Within the values that both images have."""
    low = np.minimum(x.min((2, 3), keepdims=True), giver.min((2, 3), keepdims=True))
    high = np.maximum(x.max((2, 3), keepdims=True), giver.max((2, 3), keepdims=True))
    return np.clip(mixed, low, high)


def frequencies(x, giver, fine):
    """The giver's amplitudes at fine or coarse frequencies, with the image's own phases; in float32, where the phase of a frequency that an image lacks is rounding."""
    own, other = (torch.fft.rfft2(torch.from_numpy(image)) for image in (x, giver))
    radius = np.hypot(np.fft.fftfreq(x.shape[-2])[:, None], np.fft.rfftfreq(x.shape[-1]))
    band = torch.from_numpy(radius >= 0.125 if fine else (radius < 0.125) & (radius > 0))
    turn = own * other.conj()
    mixed = torch.where(band, other * (turn / turn.abs().clamp_min(1e-12)), own)
    return within(torch.fft.irfft2(mixed, s=x.shape[-2:]).numpy(), x, giver)


def light(x, giver):
    """The mean and the deviation of the giver, contrast raised at most fourfold."""
    gain = np.clip(giver.std((1, 2, 3), keepdims=True) / x.std((1, 2, 3), keepdims=True), 0, 4)
    mixed = (x - x.mean((1, 2, 3), keepdims=True)) * gain + giver.mean((1, 2, 3), keepdims=True)
    return within(mixed, x, giver)


CHANGES = {
    "brightness and contrast": light,
    "coarse frequencies": lambda x, giver: frequencies(x, giver, False),
    "texture and fine frequencies": lambda x, giver: frequencies(x, giver, True),
}


def pasted(x, giver, to, taken, size):
    x = x.clone()
    for image, (t, own) in enumerate(zip(taken, to)):
        patch = giver[image, :, t[0] : t[0] + size[0], t[1] : t[1] + size[1]]
        x[image, :, own[0] : own[0] + size[0], own[1] : own[1] + size[1]] = patch
    return x


def exchanged(cue, cues, network, x):
    """Which receivers take the giver's answer, the same for the controls, and which givers keep theirs without the cue."""
    pairs, places, size = cues["pairs"], cues["places"], cues["patch"]
    receivers, givers, same = (x[torch.tensor(pairs[key])] for key in ("receivers", "givers", "same"))
    # Of two answers there is none that neither image has.
    third = x[torch.tensor(pairs["third"])] if pairs["third"] else None
    other = same if third is None else third
    lent = torch.tensor(pairs["lent"])
    if cue["name"] == "patch that moves":
        found = [
            pasted(receivers, givers, places["to"], places["taken"], size),
            pasted(receivers, givers, places["to"], places["another"], size),
            pasted(receivers, other, places["to"], places["theirs"], size),
            pasted(givers, receivers, places["taken"], places["taken"], size),
        ]
    else:
        change = CHANGES[cue["name"]]
        found = [
            torch.from_numpy(change(own.numpy(), other.numpy()))
            for own, other in (
                (receivers, givers),
                (receivers, same),
                (receivers, third),
                (givers, receivers),
            )
            if other is not None
        ]
    return [answers(network, each).argmax(1) == lent for each in found], lent


def test_cues_that_are_exchanged_between_images(case):
    _, network, x, section = case
    cues = section["numbers"]["cues"]
    said = answers(network, x).argmax(1)
    pairs = cues["pairs"]
    assert torch.equal(said[torch.tensor(pairs["givers"])], torch.tensor(pairs["lent"]))
    assert bool((said[torch.tensor(pairs["receivers"])] != torch.tensor(pairs["lent"])).all())
    measured = {}
    for cue in cues["tried"]:
        if cue["name"] == "place of the object":
            continue
        (follows, *controls, kept), lent = exchanged(cue, cues, network, x)
        part = torch.tensor(pairs["measure"])
        part &= True if cue["answer"] is None else lent == cue["answer"]
        assert cue["samples"] == int(part.sum())
        # Rounding may turn an answer or two.
        near = 2.5 / int(part.sum())
        assert cue["followed"] == pytest.approx(share(follows[part]), abs=near)
        assert list(cue["controls"].values()) == pytest.approx(
            [float(each[part].double().mean()) for each in controls], abs=near
        )
        assert cue["kept"] == pytest.approx(share(kept[part]), abs=near)
        assert (
            min(abs(cue["excess"][0] - difference(follows[part], each[part])[0]) for each in controls)
            < 2 * near
        )
        measured[cue["name"]] = cue
    _told(section, cues, measured)


def _told(section, cues, measured):
    """Sentence and findings say what the cues' numbers are, which were just measured again."""
    text = "Exchanged between images" + section["sentence"].partition("Exchanged between images")[2]
    text = text.partition(" Not tested")[0].partition(" Saliency maps")[0]
    deciding = [cue for cue in cues["tried"] if cue["decides"]]
    if not deciding:
        first = cues["tried"][0]
        says(text, *percents(first["excess"]), first["samples"])
    else:
        expected = []
        for cue in deciding:
            expected += [
                *percents(cue["followed"]),
                cue["samples"],
                Percent(max(cue["controls"].values())),
            ]
        says(text, *expected)
    area = Percent(cues["patch"][0] * cues["patch"][1] / 64, 0)
    by_name = {f"cue {cue['name']}": cue for cue in cues["tried"]}
    for finding in section["findings"]:
        if finding["key"].startswith("cue"):
            cue = by_name[finding["key"]]
            assert cue["decides"] and cue["excess"][1] > 0.15
            says(
                finding["sentence"],
                *([area] if cue["name"] == "patch that moves" else []),
                Percent(cue["followed"][0], 0),
                cue["samples"],
                *percents(cue["followed"][1:], 0),
                *percents(cue["controls"].values(), 0),
                *([Percent(cue["kept"][0], 0)] if cue["answer"] is not None else []),
            )


def test_the_gain_of_the_maps_is_that_of_their_curves(case):
    section = case[3]
    truth = section["numbers"]["faithfulness"]
    area = {
        name: float(np.trapezoid(truth[name], truth["fractions"]))
        for name in ("deletion", "insertion", "random_deletion", "random_insertion")
    }
    gain = area["insertion"] - area["random_insertion"] + area["random_deletion"] - area["deletion"]
    mean, low, high = truth["gain"]
    assert mean == pytest.approx(gain, abs=1e-4) and low < mean < high
    last = section["sentence"].rpartition("gain ")[2]
    assert [float(n.replace("−", "-")) for n in numbers(last)] == pytest.approx([mean, low, high], abs=0.0051)
    better = "truer than chance: taking" in section["sentence"]
    assert better == (low > 0 and max(abs(low), abs(high)) >= 0.005)


def test_what_was_planted_is_what_is_found(told):
    marked = told("marked", "accuracy", "gaze")["gaze"]
    assert marked["numbers"]["place"]["decides"] and marked["status"] == "warning"
    corner = marked["numbers"]["place"]["window"]
    assert (corner["top"], corner["left"]) == (0, 0)
    one = told("one marked", "accuracy", "gaze")["gaze"]["numbers"]["place"]["one"]
    assert one["decides"] and one["answer"] == 3 and (one["window"]["top"], one["window"]["left"]) == (0, 0)
