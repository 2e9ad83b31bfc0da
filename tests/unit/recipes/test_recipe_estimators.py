"""The recipes of the three families of estimators: tiny runs go through, and claims can hold and fall."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier, MLPRegressor

from lineament.recipes import bangla_digits, gbnn, wide_deep_kernels
from lineament.recipes.bangla_digits.study import DESCRIPTORS, Controls, Held, sets, split
from lineament.recipes.gbnn.study import REFERENCE, Cut, Head, Score, Solvers, for_seconds, parts
from lineament.recipes.wide_deep_kernels.study import PAIRS, Digits, Limits, Pair, drawn

TINY = {
    wide_deep_kernels: {"samples": (60,), "tests": 50, "seeds": (0,), "digits": 150, "principal": (3,)},
    gbnn: {"sets": ("wine",), "seeds": (0,), "iterations": 5, "units": 16, "images": 80, "epochs": 1},
    bangla_digits: {"classifiers": ("svm", "knn"), "train": 150, "test": 60},
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TINY, ids=lambda r: r.SLUG)
def test_a_tiny_run(recipe, tmp_path, monkeypatch):
    monkeypatch.delenv("LINEAMENT_DATA", raising=False)
    found = recipe.run(dataclasses.replace(recipe.Config.preset("quick"), **TINY[recipe]), out=tmp_path)
    assert len(found.claims) >= 7 and found.tables and found.figures
    assert all(claim.reason or claim.holds for claim in found.claims)
    assert all((tmp_path / figure.file).stat().st_size > 0 for figure in found.figures)


def test_the_bayes_rule_is_the_best_of_all_and_parts_do_not_overlap():
    X, y, bayes = drawn(2, 4000, np.random.default_rng(0))
    assert np.allclose(np.linalg.norm(X, axis=1), 1) and (bayes == y).mean() == pytest.approx(0.95, abs=0.02)
    held = sets(bangla_digits.Config(data_folder="/nowhere"))["digits"]
    train, test = split(held, 0, 300, 200)
    assert not set(train) & set(test) and len(train) == 300 and len(test) == 200
    assert np.bincount(held.labels[test]).min() >= 19


@pytest.mark.parametrize("inner", ["bangla-digits", ""])
def test_bangla_digits_are_found_in_the_data_folder_and_in_their_own(inner, tmp_path):
    (tmp_path / inner).mkdir(exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32), dtype=np.uint8)
    labels = np.arange(8)
    np.savez(
        tmp_path / inner / "cmaterdb_3_1_1.npz",
        train_images=images[:5], train_labels=labels[:5], test_images=images[5:], test_labels=labels[5:],
    )  # fmt: skip
    found = sets(bangla_digits.Config(data_folder=str(tmp_path)))
    assert list(found) == ["cmaterdb"] and found["cmaterdb"].train == 5 and len(found["cmaterdb"].images) == 8


def test_claims_of_wide_deep_kernels_can_hold_and_fall():
    config = wide_deep_kernels.Config()
    n = config.samples[-1]

    def claims(good):
        def one(d):
            accuracy = {f"psi {e}": 0.9 - 0.01 * (e != d) * good for e in PAIRS}
            return Pair(
                {**accuracy, "1-NN": 0.8, "majority": 0.6, "permuted labels": 0.6 if good else 0.7, "k-NN, k tuned": 0.9 if good else 0.95, "RBF SVM": 0.9, "Laplace kernel": 0.9 if good else 0.95, "MLP of width 4096": 0.9 if good else 0.95},
                0.99 if good else 0.5,
            )  # fmt: skip

        slopes = {str(d): -d * (1.0 if good else 1.1) for d in (1, 2)}
        depth = {"10": 0.3, "100": 0.27, "1000": 0.253 if good else 0.27}
        regression = {"1": 1.0, "4": 2.0, "16": 3.0 if good else 0.5}
        known = Limits(slopes, depth, regression, 1.0 if good else 0.9, 1.0, 1.0 if good else 0.0)
        seen = [Digits("digits", 3, 3.0, 3.0, 3.0 if good else 5.0, 0.9, 0.9)]
        pairs = {(d, n, s): one(d) for d in PAIRS for s in config.seeds}
        return [c.holds for c in wide_deep_kernels.claims_of(config, pairs, known, seen)]

    assert all(claims(True)) and not any(claims(False))


def test_claims_of_gbnn_can_hold_and_fall():
    config = gbnn.Config()

    def claims(good):
        def one(name):
            told = REFERENCE[name]
            worse = 0.5 if told.classes else 2.0
            mine = told.mean * (1 if good else worse)
            rival = told.mean * (worse if good else 1)
            return Score(
                {"boosted, lbfgs": mine, "boosted, varpro": mine}
                | dict.fromkeys(
                    ("random hidden units", "random hidden units, boosted", "boosted, rho = 1", "HistGB", "XGBoost", "MLP, 200 units, L-BFGS", "MLP, the same, L2 tuned", "MLP, same units, same seconds"),
                    rival,
                ),
                0.0 if good else 0.1,
            )  # fmt: skip

        kept = {"boosted": [0.97, 0.97] if good else [0.5, 0.97], "MLP": [0.9, 0.97]}
        cuts = {0: Cut([20, 80], kept, {})}
        heads = {0: Head(0.9, 0.9 if good else 0.8)}
        solvers = [Solvers("wine", 1.0, 1.0, 2.0 if good else 0.5, 1.0)]
        scores = {(name, s): one(name) for name in config.sets for s in config.seeds}
        return [c.holds for c in gbnn.claims_of(config, scores, cuts, heads, solvers)]

    assert all(claims(True)) and not any(claims(False))


@pytest.mark.parametrize(("name", "kind"), [("wine", MLPClassifier), ("diabetes", MLPRegressor)])
def test_a_perceptron_keeps_its_best_epoch_and_stops_in_time(name, kind):
    X, _, y, _ = parts(name, 0)
    seen = []

    class Watched(kind):
        def score(self, X, y, sample_weight=None):
            seen.append(super().score(X, y, sample_weight))
            return seen[-1]

    start = time.process_time()
    net = for_seconds(0.3, Watched, 10, X, y, 0)
    assert 0.3 <= time.process_time() - start < 1 and len(seen) > 5
    _, held, _, truth = train_test_split(
        X, y, test_size=0.1, random_state=0, stratify=y if name == "wine" else None
    )
    assert kind.score(net, held, truth) == max(seen) > seen[0]


def test_claims_of_bangla_digits_can_hold_and_fall():
    config = bangla_digits.Config()
    held = {"cmaterdb": Held("CMATERdb", None, np.zeros(1), 0)}

    def claims(good):
        mean = {
            ("cmaterdb", d, c): 0.9 + 0.09 * (good == (d.startswith("hog") or d == "gabor")) - 0.05 * ((c != "svm") == good)
            for d in DESCRIPTORS
            for c in config.classifiers
        }  # fmt: skip
        if good:
            mean |= {("cmaterdb", "hog", "svm"): 0.995, ("cmaterdb", "gabor", "svm"): 0.99}
        said = Controls(
            {
                "random filters of equal number and size, SVM": 0.8 if good else 0.99,
                "Gabor on a grid, SVM": 0.98,
                "HOG tuned on the test part (leakage), SVM": 0.98 if good else 0.995,
                "small CNN, the seconds of the Gabor SVM": 0.9 if good else 0.99,
            },
            7, 0.98 if good else 0.95, 0.1 if good else 0.3,
        )  # fmt: skip
        return [c.holds for c in bangla_digits.claims_of(config, held, mean, said)]

    assert all(claims(True)) and not any(claims(False))
