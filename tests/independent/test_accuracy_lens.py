"""What the accuracy lens says, every number of it, measured again in a few lines of PyTorch and SciPy."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from scipy.stats import binomtest

from tests.independent.conftest import answers
from tests.independent.said import Compact, Percent, says

CLASSIFIERS = [
    "residual",
    "misnormalised",
    "bfloat16",
    "normed",
    "softmax",
    "compiled",
    "one logit",
    "marked",
]


def share(right):
    """The share that is right with Wilson's interval."""
    found = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return [Percent(float(right.double().mean())), Percent(found.low), Percent(found.high)]


def of(right):
    return [share(right)[0], len(right)]


@pytest.fixture(params=CLASSIFIERS)
def case(request, people, told):
    network, x, y, logits = people(request.param)
    # Groups and the networks' sections are shared with the other lenses' tests.
    section = told(request.param, "accuracy")["accuracy"]
    p = logits(answers(network, x).double()).softmax(1)
    return section, p, y, p.argmax(1) == y


def test_the_sentence_of_a_classifier(case):
    section, p, y, right = case
    even, odd = right[0::2], right[1::2]
    accuracy, low, high = share(right)
    expected = [int(right.sum()), len(right), low, high, Percent(float(y.bincount().max()) / len(y))]
    if "equally often" in section["sentence"]:
        assert abs(float(even.double().mean() - odd.double().mean())) < 1e-3
        expected += [2]
    else:
        best, worst = sorted((even, odd), key=lambda r: -float(r.double().mean()))
        expected += [*of(best), *of(worst)]
    by_class = [right[y == k] for k in y.unique().tolist()]
    hardest = min(by_class, key=lambda r: float(r.double().mean()))
    alike = sum(bool(r.double().mean() == hardest.double().mean()) for r in by_class)
    if alike < len(by_class):
        expected += of(hardest) if alike == 1 else [len(by_class), alike, share(hardest)[0]]
    confidence = float(p.max(1).values.mean())
    says(section["sentence"], *expected, Percent(confidence))
    assert ("fits how often" in section["sentence"]) == (abs(confidence - accuracy.share) < 0.03)
    assert accuracy.fits(section["number"].replace("\u00a0%", ""))


def test_the_findings_of_a_classifier(case):
    section, p, y, right = case
    accuracy, low, high = share(right)
    sure = p.max(1).values
    gap = sure - right.double()
    error = 1.96 * float(gap.std()) / len(gap) ** 0.5
    seen = []
    for finding in section["findings"]:
        seen.append(finding["key"])
        match finding["key"]:
            case "accuracy":
                says(finding["sentence"], accuracy, len(right), low, high)
            case "no better than the majority":
                majority = Percent(float(y.bincount().max()) / len(y))
                says(finding["sentence"], accuracy, len(right), low, high, majority)
                assert low.share <= majority.share
            case "groups alike":
                says(finding["sentence"], 2, len(right))
            case "groups differ":
                best, worst = sorted((right[0::2], right[1::2]), key=lambda r: -float(r.double().mean()))
                says(finding["sentence"], *of(best), *share(best)[1:], *of(worst), *share(worst)[1:])
                assert share(worst)[2].share < share(best)[1].share
            case "class behind":
                worst = min(
                    (right[y == k] for k in y.unique().tolist()), key=lambda r: float(r.double().mean())
                )
                says(finding["sentence"], *of(worst), *share(worst)[1:], accuracy)
            case "overconfident" | "underconfident" as key:
                mean = float(gap.mean())
                says(
                    finding["sentence"],
                    Percent(float(sure.mean())),
                    accuracy,
                    Percent(abs(mean)),
                    Percent(error),
                )
                assert (mean > 0) == (key == "overconfident") and abs(mean) - error > 0.03
            case other:
                raise AssertionError(f"{other} is not measured again here")
    assert "accuracy" in seen or "no better than the majority" in seen
    assert len(seen) == len(set(seen))


def test_calibration_is_that_of_the_probabilities_that_the_network_means(case):
    section, p, y, right = case
    sure, found = p.max(1).values, section["numbers"]["calibration"]
    edges = torch.linspace(0, 1, 16, dtype=torch.float64)
    bins = [(sure > low) & (sure <= high) for low, high in pairwise(edges)]
    error = sum(abs(float(right[b].double().sum() - sure[b].sum())) for b in bins) / len(y)
    assert found["error"] == pytest.approx(error, abs=2e-4)
    assert found["confidence"] == pytest.approx(float(sure.mean()), abs=1e-4)
    assert sum(b["count"] for b in found["bins"]) == len(y)


def test_every_label_of_a_network_with_several(people, told):
    network, x, y, _ = people("multi-label")
    section = told("multi-label", "accuracy", "parts")["accuracy"]
    p = answers(network, x).double().sigmoid()
    right = (p > 0.5) == (y == 1)
    each = right.double().mean(1)
    accuracy = float(each.mean())
    half = 1.96 * float(each.std()) / len(each) ** 0.5
    told_first = [
        Percent(accuracy),
        right.numel(),
        len(y),
        Percent(accuracy - half),
        Percent(accuracy + half),
    ]
    shares = y.double().mean(0)
    majority = Percent(float(torch.maximum(shares, 1 - shares).mean()))
    hardest = right[:, int(right.double().mean(0).argmin())]
    sure = torch.maximum(p, 1 - p)
    says(
        section["sentence"],
        *told_first,
        Percent(float(right.all(1).double().mean())),
        majority,
        *of(hardest),
        Percent(float(sure.mean())),
    )
    gap = (sure - right.double()).mean(1)
    error = 1.96 * float(gap.std()) / len(gap) ** 0.5
    for finding in section["findings"]:
        if finding["key"] == "underconfident":
            says(
                finding["sentence"],
                Percent(float(sure.mean())),
                Percent(accuracy),
                Percent(abs(float(gap.mean()))),
                Percent(error),
            )
        else:
            assert finding["key"] == "accuracy"
            says(finding["sentence"], *told_first)


def test_a_regression_that_answers_one_number_a_sample(people, told):
    network, x, y, _ = people("values")
    section = told("values", "accuracy", "parts")["accuracy"]
    y, z = y.double(), answers(network, x).double()
    off, away = (y - z).square(), (y - y.mean()).square()
    r2 = 1 - float(off.sum() / away.sum())
    # The spread of R² by leaving one sample out at a time.
    without = 1 - (off.sum() - off) / (away.sum() - away)
    error = 1.96 * float((without - without.mean()).square().sum().sqrt())
    mae = float((y - z).abs().mean())

    def half(part):
        return Compact(1.96 * float((y - z).abs()[part].std()) / len(y[part]) ** 0.5, rough=True)

    worst = max((slice(k, None, 2) for k in (0, 1)), key=lambda part: float((y - z).abs()[part].mean()))
    explained = [Percent(r2), Percent(error), len(y)]
    mean = Compact(float((y - y.mean()).abs().mean()))
    says(
        section["sentence"],
        *explained,
        Compact(mae),
        half(slice(None)),
        mean,
        Compact(float((y - z).abs()[worst].mean())),
        half(worst),
        len(y[worst]),
    )
    (finding,) = section["findings"]
    assert finding["key"] == "accuracy"
    says(finding["sentence"], *explained, Compact(mae))
