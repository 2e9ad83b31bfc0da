"""Read-outs against scikit-learn, brute force and their own optimality conditions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.linear_model import Ridge as SkRidge

from lineament.core.checks import InputError
from lineament.core.readouts import logistic, ridge

PENALTIES = [0.1, 1.0, 10.0, 100.0]


def _regression(samples: int, features: int, dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, features, generator=g, dtype=dtype) * torch.logspace(
        -1, 0.5, features, dtype=dtype
    )
    x = x + 3
    y = x @ torch.randn(features, 5, generator=g, dtype=dtype) + torch.randn(
        samples, 5, generator=g, dtype=dtype
    )
    return x, y


@pytest.mark.parametrize("shape", [(60, 12), (15, 40), (20, 20)])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("method", ["auto", "eigh", "svd"])
def test_ridge_is_scikit_learns(shape, intercept, method):
    x, y = _regression(*shape)
    fit = ridge(x, y, PENALTIES, intercept=intercept, method=method)
    theirs = RidgeCV(PENALTIES, fit_intercept=intercept, alpha_per_target=True, store_cv_results=True)
    theirs.fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(fit.penalty, theirs.alpha_)
    np.testing.assert_allclose(fit.weight, theirs.coef_, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(fit.bias, np.broadcast_to(theirs.intercept_, 5), rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(fit.errors, theirs.cv_results_.mean(0).T, rtol=1e-7)
    np.testing.assert_allclose(fit.predict(x), theirs.predict(x.numpy()), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("shape", [(14, 5), (8, 20)])
def test_leave_one_out_is_leaving_one_out(shape):
    x, y = _regression(*shape)
    fit = ridge(x, y, [0.5, 20.0])
    for row, penalty in enumerate([0.5, 20.0]):
        errors = []
        for i in range(len(x)):
            rest = np.arange(len(x)) != i
            model = SkRidge(alpha=penalty, solver="svd").fit(x[rest].numpy(), y[rest].numpy())
            errors.append((model.predict(x[i : i + 1].numpy())[0] - y[i].numpy()) ** 2)
        np.testing.assert_allclose(fit.errors[row], np.mean(errors, 0), rtol=1e-8)


def test_one_shared_penalty_has_the_least_mean_error():
    x, y = _regression(40, 12)
    fit = ridge(x, y, PENALTIES, choose="shared")
    assert len(set(fit.chosen.tolist())) == 1
    assert fit.chosen[0] == fit.errors.mean(1).argmin()


def test_ridge_in_float32_agrees_with_float64():
    x, y = _regression(300, 30)
    wide, narrow = ridge(x, y, PENALTIES), ridge(x.float(), y.float(), PENALTIES)
    assert narrow.weight.dtype == torch.float32
    np.testing.assert_allclose(narrow.errors, wide.errors, rtol=1e-4)
    np.testing.assert_allclose(narrow.weight, wide.weight, rtol=1e-3, atol=1e-3)


def test_penalty_zero_is_least_squares_of_least_norm():
    x, y = _regression(9, 30)
    fit = ridge(x, y, 0.0)
    centred = x - x.mean(0)
    np.testing.assert_allclose(
        fit.weight, (torch.linalg.pinv(centred) @ (y - y.mean(0))).T, rtol=1e-6, atol=1e-8
    )
    duplicate = torch.cat([x[:, :3], x[:, :1]], 1)
    assert torch.isfinite(ridge(duplicate, y, [0.0, 1.0]).weight).all()


def test_many_targets_are_each_their_own_fit():
    x, y = _regression(30, 8)
    together = ridge(x, y, PENALTIES)
    for t in range(5):
        alone = ridge(x, y[:, t], PENALTIES)
        np.testing.assert_allclose(together.weight[t], alone.weight[0], rtol=1e-10, atol=1e-12)


def _classes(samples: int, features: int, classes: int, targets: int):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(samples, features, generator=g, dtype=torch.float64) * torch.logspace(0, 1, features) + 2
    w = torch.randn(features, classes * targets, generator=g, dtype=torch.float64)
    scores = x @ w / 3 + 4 * torch.randn(samples, classes * targets, generator=g, dtype=torch.float64)
    return x, scores.view(samples, targets, classes).argmax(2)


@pytest.mark.parametrize(("samples", "features", "classes"), [(120, 6, 4), (60, 10, 2), (25, 40, 3)])
@pytest.mark.parametrize("intercept", [True, False])
def test_logistic_is_scikit_learns(samples, features, classes, intercept):
    x, y = _classes(samples, features, classes, 2)
    fit = logistic(x, y, [10.0, 1.0], intercept=intercept)
    assert fit.converged.all()
    for row, penalty in enumerate([10.0, 1.0]):
        for t in range(2):
            theirs = LogisticRegression(
                C=1 / penalty, solver="newton-cg", tol=1e-12, max_iter=1000, fit_intercept=intercept
            )
            theirs.fit(x.numpy(), y[:, t].numpy())
            weight, bias = fit.path_weight[row, t], fit.path_bias[row, t]
            if classes == 2:
                weight, bias = (weight[1] - weight[0])[None], (bias[1] - bias[0])[None]
            np.testing.assert_allclose(weight, theirs.coef_, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(bias, theirs.intercept_, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(fit.predict(x)[:, t], theirs.predict(x.numpy())) if row else None


def test_the_gradient_of_every_target_is_zero():
    x, y = _classes(80, 5, 3, 7)
    penalty = 2.0
    fit = logistic(x, y, penalty)
    share = torch.softmax(fit.logits(x), 2) - torch.nn.functional.one_hot(y, 3)
    gradient = torch.einsum("ntk,nd->tkd", share, x) + penalty * fit.weight
    assert gradient.abs().max() < 1e-6
    assert share.sum(0).abs().max() < 1e-6
    losses = torch.nn.functional.cross_entropy(fit.logits(x).mT, y, reduction="none").sum(0)
    losses = losses + penalty / 2 * fit.weight.square().sum((1, 2))
    np.testing.assert_allclose(fit.losses[0], losses, rtol=1e-10)


def test_targets_do_not_touch_each_other_and_the_path_starts_warm():
    x, y = _classes(80, 5, 3, 4)
    together = logistic(x, y, [5.0, 4.0])
    for t in range(4):
        alone = logistic(x, y[:, t], [5.0, 4.0], classes=3)
        np.testing.assert_allclose(together.weight[t], alone.weight[0], rtol=1e-6, atol=1e-8)
    cold = logistic(x, y, 4.0)
    np.testing.assert_allclose(together.weight, cold.weight, rtol=1e-6, atol=1e-8)
    assert together.iterations[1].sum() < cold.iterations[0].sum()


def test_a_fit_that_was_cut_short_says_so():
    x, y = _classes(80, 5, 3, 2)
    fit = logistic(x, y, 1e-3, max_iterations=2)
    assert not fit.converged.any() and (fit.iterations == 2).all()


def test_separable_classes_and_float32():
    x = torch.cat([torch.randn(40, 3) - 20, torch.randn(40, 3) + 20])
    y = torch.arange(80) // 40
    fit = logistic(x, y, 1e-2)
    assert fit.converged.all() and torch.equal(fit.predict(x)[:, 0], y)
    assert fit.weight.dtype == torch.float32


def test_bad_input_is_named():
    x, y = _regression(10, 3)
    with pytest.raises(InputError, match=r"y: .*expected a tensor of shape \(10, targets\)"):
        ridge(x, y[:9])
    with pytest.raises(InputError, match="penalties: got -1"):
        ridge(x, y, [-1.0, 1.0])
    with pytest.raises(InputError, match="at least 2"):
        ridge(x[:1], y[:1])
    with pytest.raises(InputError, match="NaN"):
        ridge(x * float("nan"), y)
    with pytest.raises(InputError, match="choose: got 'best'"):
        ridge(x, y, choose="best")
    labels = torch.arange(10) % 3
    with pytest.raises(InputError, match="penalties: got 0, expected more"):
        logistic(x, labels, 0.0)
    with pytest.raises(InputError, match="at least 2"):
        logistic(x, torch.zeros(10).long())
    with pytest.raises(InputError, match="label 2 at position 2"):
        logistic(x, labels, classes=2)


def test_results_plot_and_become_plain():
    x, y = _regression(20, 3)
    fit = ridge(x, y, PENALTIES)
    assert fit.plot().get_xlabel() == "penalty"
    assert len(fit.to_dict()["weight"]) == 5
    read = logistic(x, torch.arange(20) % 3, [2.0, 1.0])
    assert read.plot().get_xlabel() == "penalty"
    assert np.shape(read.to_dict()["path_weight"]) == (2, 1, 3, 3)
