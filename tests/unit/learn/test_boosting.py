"""Oracles of arXiv 1909.12098: line searches by autograd, least squares, merged heads, batched search, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.model_selection import KFold, StratifiedKFold
from torch import nn

from lineament.core.checks import InputError
from lineament.learn.boosting.estimators import GBNNClassifier, GBNNRegressor
from lineament.learn.boosting.losses import Binary, Huber, Multiclass, Poisson, Quantile, Squared, step_size
from lineament.learn.boosting.network import SiteFeatures, boosted_head
from lineament.learn.boosting.search import search
from lineament.learn.boosting.subnetwork import SOLVERS, TORCH, Objective, Training, fitted, initial


def _torch_loss(loss):
    """The loss of F, in autograd's words."""
    return {
        Squared: lambda y, F: (y - F).square().sum(),
        Binary: lambda y, F: nn.functional.softplus(-2 * y * F).sum(),
        Multiclass: lambda y, F: (F.logsumexp(1) - (y * F).sum(1)).sum(),
        Poisson: lambda y, F: (F.exp() - y * F).sum(),
    }[type(loss)]


@pytest.fixture(scope="module")
def scores():
    rng = np.random.default_rng(0)
    return rng, rng.normal(size=(30, 3)), rng.normal(size=(30, 3))


@pytest.mark.parametrize(
    "loss", [Squared(), Binary(), Multiclass(), Poisson()], ids=lambda v: type(v).__name__
)
def test_residuals_and_newton_steps_are_autograds(loss, scores):
    rng, F, h = scores
    F, h = (v[:, :1] if isinstance(loss, Binary) else v for v in (F, h))
    y = {
        Squared: rng.normal(size=F.shape),
        Binary: np.sign(rng.normal(size=F.shape)),
        Multiclass: np.eye(3)[rng.integers(0, 3, 30)],
        Poisson: rng.poisson(2.0, F.shape).astype(float),
    }[type(loss)]
    t = [torch.from_numpy(v) for v in (y, F, h)]
    score = t[1].clone().requires_grad_()
    gradient = torch.autograd.grad(_torch_loss(loss)(t[0], score), score)[0].numpy()
    np.testing.assert_allclose(
        loss.residual(y, F), -gradient / (2 if isinstance(loss, Squared) else 1), atol=1e-12
    )
    rho = torch.zeros((), dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(_torch_loss(loss)(t[0], t[1] + rho * t[2]), rho, create_graph=True)[0]
    second = torch.autograd.grad(first, rho)[0]
    truth = float((-first / second).detach())
    assert step_size(loss, y, F, h, np.ones(30), "newton-full") == pytest.approx(truth)
    if isinstance(loss, Multiclass):
        assert abs(step_size(loss, y, F, h, np.ones(30), "newton") - truth) > 1e-3
    start = torch.from_numpy(np.tile(loss.start(y, np.ones(30)), (30, 1)))
    constant = start[:1].clone().requires_grad_()
    if not isinstance(loss, Multiclass):
        slope = torch.autograd.grad(_torch_loss(loss)(t[0], constant.expand(30, -1)), constant)[0]
        np.testing.assert_allclose(slope.numpy(), 0, atol=1e-9)
    zero = step_size(loss, y, F, 0 * h, np.ones(30), "newton-full")
    assert zero == 0


@pytest.mark.parametrize("loss", [Quantile(0.3), Huber(0.7)])
def test_losses_without_a_second_derivative_are_searched_along_the_line(loss, scores):
    _, F, h = scores
    y = F + 2 * h + 0.1
    rho = step_size(loss, y, F, h, np.ones(30), "newton")
    at = lambda step: loss.mean(y, F + step * h, np.ones(30))  # noqa: E731
    assert at(rho) <= min(at(step) for step in np.linspace(0, 3, 61)) + 1e-6


def test_a_linear_part_without_penalty_is_least_squares():
    rng = np.random.default_rng(1)
    X = rng.normal(size=(80, 3))
    y = X @ [1.0, -2.0, 0.5] + 0.3 * rng.normal(size=80)
    net = GBNNRegressor(
        3, 1, 1.0, 1.0, activation="identity", l2=0.0, max_iter=500, tol=1e-10, random_state=0
    ).fit(X, y)
    design = np.hstack([X, np.ones((80, 1))])
    truth = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    np.testing.assert_allclose(net.predict(X), truth, atol=1e-4)
    first = next(iter(net.staged_predict(X)))
    np.testing.assert_allclose(first, truth, atol=1e-3)


@pytest.mark.parametrize("activation", ["logistic", "tanh", "relu", "identity"])
def test_an_objective_of_arrays_and_one_of_tensors_have_autograds_gradient(activation):
    rng = np.random.RandomState(0)
    X, r, weights = rng.normal(size=(40, 3)), 5 * rng.normal(size=(40, 2)), rng.uniform(0.5, 2, 40)
    inputs = np.hstack([X, np.ones((40, 1))])
    start = initial(3, 2, 2, activation, rng)
    for scale in (1.0, 3.0):
        ours = Objective(start, inputs, r, weights, 0.3, scale)
        theirs = Objective(start, torch.from_numpy(inputs), r, weights, 0.3, scale)
        theta = torch.from_numpy(ours.theta).requires_grad_()
        V, U = theta[:8].view(4, 2), theta[8:].view(3, 2)
        h = TORCH[activation](torch.from_numpy(inputs) @ V) @ U[:-1] + U[-1]
        share = torch.from_numpy(weights / weights.sum())
        error = (torch.from_numpy(r) / scale - h).square().sum(1) @ share
        penalty = 0.3 / weights.sum() * (V[:-1].square().sum() / scale**2 + U[:-1].square().sum())
        truth = 0.5 * (error + penalty)
        gradient = torch.autograd.grad(truth, theta)[0].numpy()
        for found in (ours(ours.theta), theirs(theirs.own(theirs.theta))):
            assert float(
                found[0].detach() if isinstance(found[0], torch.Tensor) else found[0]
            ) == pytest.approx(truth.item())
            np.testing.assert_allclose(np.asarray(found[1]), gradient, atol=1e-12)
        parts = [theirs(theta.detach(), rows)[1] for rows in torch.arange(40).chunk(4)]
        np.testing.assert_allclose(torch.stack(parts).mean(0).numpy(), gradient, atol=1e-12)
        np.testing.assert_allclose(ours.sub(ours.theta)(X), scale * h.detach().numpy(), atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_part_trained_on_tensors_is_as_good_as_one_on_arrays(solver):
    rng = np.random.RandomState(1)
    X = rng.normal(size=(300, 4))
    r = 50 * np.tanh(X[:, :1] - X[:, 1:2] + 0.3)
    inputs = np.hstack([X, np.ones((300, 1))])
    start = initial(4, 2, 1, "tanh", rng)
    training = Training(solver, max_iter=300, tol=1e-8)
    errors = []
    for given in (inputs, torch.from_numpy(inputs)):
        made = fitted(start, given, r, np.ones(300), training, np.random.RandomState(0))
        np.testing.assert_allclose(made.of(given), made(X), atol=1e-12)
        errors.append(float(np.square(made(X) - r).mean()))
    assert max(errors) < 0.01 * float(np.square(r).mean()), errors


@pytest.mark.parametrize("n_iter_no_change", [None, 3])
def test_a_warm_start_goes_on_where_the_fit_ended(n_iter_no_change, tmp_path):
    X, y = load_iris(return_X_y=True)
    made = {"units_per_step": 2, "max_iter": 10, "random_state": 0, "n_iter_no_change": n_iter_no_change}
    net = GBNNClassifier(8, warm_start=True, **made).fit(X, y).set_params(total_units=16)
    net.save(tmp_path / "net.safetensors")
    first = net.decision_function(X)
    net.fit(X, y)
    np.testing.assert_allclose(net.truncate(8).decision_function(X), first, atol=1e-12)
    assert net.n_iter_ == 8 and len(net.train_losses_) == 8
    if n_iter_no_change is None:
        whole = GBNNClassifier(16, **made).fit(X, y)
        np.testing.assert_allclose(net.decision_function(X), whole.decision_function(X), atol=1e-6)
    other = GBNNClassifier.load(tmp_path / "net.safetensors").fit(X[::2], y[::2])
    np.testing.assert_allclose(other.truncate(8).decision_function(X), first, atol=1e-12)
    assert other.n_iter_ == 8
    for change, word in (({"total_units": 4}, "total_units"), ({"units_per_step": 4}, "units_per_step")):
        with pytest.raises(InputError, match=word):
            other.set_params(**{"total_units": 16, "units_per_step": 2, **change}).fit(X, y)
    other.set_params(total_units=16, units_per_step=2)
    with pytest.raises(InputError, match="features"):
        other.fit(X[:, :3], y)
    with pytest.raises(InputError, match="classes"):
        other.fit(X, y + 1)


@pytest.mark.parametrize("loss", ["absolute", "huber", "quantile", "poisson", "auto"])
@pytest.mark.parametrize("solver", ["lbfgs", "adam"])
def test_every_loss_falls_with_every_line_search(loss, solver):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(120, 3))
    y = rng.poisson(np.exp(0.5 * X[:, 0] + 1)).astype(float)
    for how in ("newton", "newton-full", "exact", "none"):
        net = GBNNRegressor(
            12,
            2,
            0.5,
            1.0,
            loss=loss,
            quantile=0.8,
            solver=solver,
            line_search=how,
            max_iter=30,
            random_state=0,
        ).fit(X, y)
        assert (np.diff(net.train_losses_) <= 0).all() and net.train_losses_[-1] < net.train_losses_[0]
        if loss == "quantile":
            assert 0.6 < float((y <= net.predict(X)).mean()) < 0.95
        if loss == "poisson":
            assert (net.predict(X) > 0).all()


def test_weights_of_classes_are_weights_of_samples_and_the_published_settings_have_names():
    X, y = load_iris(return_X_y=True)
    X, y = X[30:100], y[30:100]
    made = {"total_units": 6, "units_per_step": 2, "max_iter": 20, "random_state": 0}
    weighed = GBNNClassifier(class_weight={0: 3.0, 1: 1.0}, **made).fit(X, y)
    by_sample = GBNNClassifier(**made).fit(X, y, sample_weight=np.where(y == 0, 3.0, 1.0))
    np.testing.assert_array_equal(weighed.decision_function(X), by_sample.decision_function(X))
    assert not np.allclose(
        weighed.decision_function(X), GBNNClassifier(**made).fit(X, y).decision_function(X)
    )
    net = GBNNClassifier.as_published(random_state=0)
    told = (
        "total_units",
        "units_per_step",
        "learning_rate",
        "subsample",
        "solver",
        "activation",
        "l2",
        "max_iter",
        "tol",
    )
    assert [getattr(net, name) for name in told] == [200, 1, 1.0, 0.5, "lbfgs", "logistic", 1e-4, 200, 0.0]


def test_classes_change_places_together_and_a_rate_of_nothing_learns_nothing():
    X, y = load_iris(return_X_y=True)
    made = {
        "total_units": 6,
        "units_per_step": 3,
        "subsample": 1.0,
        "max_iter": 30,
        "random_state": 0,
        "solver": "varpro",
    }
    net = GBNNClassifier(learning_rate=1e-9, **made).fit(X, y)
    np.testing.assert_allclose(net.predict_proba(X), 1 / 3, atol=1e-6)
    one = GBNNClassifier(**made).fit(X, y)
    order = np.array([2, 0, 1])
    other = GBNNClassifier(**made).fit(X, order[y])
    np.testing.assert_allclose(other.decision_function(X)[:, order], one.decision_function(X), atol=1e-5)
    assert (
        GBNNClassifier(6, 3, max_iter=5, random_state=1).fit(X, y).predict_proba(X)[0, 0]
        != one.predict_proba(X)[0, 0]
    )


@pytest.mark.parametrize("labels", [2, 3])
def test_a_saved_model_answers_the_same(labels, tmp_path):
    X, y = load_iris(return_X_y=True)
    X, y = X[: 50 * labels], np.array(["a", "b", "c"])[y[: 50 * labels]]
    net = GBNNClassifier(8, 2, max_iter=10, random_state=0).fit(X, y)
    net.save(tmp_path / "net.safetensors")
    again = GBNNClassifier.load(tmp_path / "net.safetensors")
    np.testing.assert_array_equal(again.predict_proba(X), net.predict_proba(X))
    np.testing.assert_array_equal(again.truncate(4).predict(X), net.truncate(4).predict(X))
    with pytest.raises(InputError, match="GBNNRegressor"):
        GBNNRegressor.load(tmp_path / "net.safetensors")
    with pytest.raises(InputError, match="path"):
        GBNNClassifier.load(tmp_path / "none.safetensors")


class Small(nn.Module):
    """A network whose head is not the end of a Sequential."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.conv(x))


@pytest.mark.parametrize("units", [None, 4])
def test_a_boosted_head_takes_the_place_of_the_last_layer(units):
    torch.manual_seed(0)
    net = Small()
    x = torch.randn(90, 1, 8, 8)
    y = torch.arange(90) % 3
    x[y == 1, :, :, :4] += 2
    x[y == 2, :, 4:] -= 2
    before = [p.clone() for p in net.parameters()]
    head = GBNNClassifier(8, 2, max_iter=30, random_state=0)
    made = boosted_head(net, [(x[:50], y[:50]), (x[50:], y[50:])], head=head, units=units)
    features = SiteFeatures(net, "fc:in").fit(x).transform(x)
    stage = head.truncate(8 if units is None else units)
    np.testing.assert_allclose(
        made(x).detach().numpy(), stage.decision_function(features), rtol=1e-3, atol=1e-4
    )
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
    assert float((made(x).argmax(1) == y).float().mean()) > 0.7
    assert torch.export.export(made.eval(), (x[:2],)) is not None
    with pytest.raises(InputError, match="nearest: 'fc'"):
        boosted_head(net, (x, y), site="fcc")


def test_a_site_is_a_transformer_of_pictures_and_flat_rows():
    net, x = Small().eval(), torch.randn(10, 1, 8, 8)
    whole = SiteFeatures(net, "conv.0").fit(x)
    np.testing.assert_allclose(whole.transform(x), net.conv[0](x).detach().mean((2, 3)).double(), atol=1e-6)
    flat = SiteFeatures(net, "conv.0", input_shape=(1, 8, 8), batch_size=3).fit(x.flatten(1).numpy())
    np.testing.assert_allclose(flat.transform(x.flatten(1).numpy()), whole.transform(x), atol=1e-6)
    assert list(whole.get_feature_names_out()) == [f"conv.0_{k}" for k in range(4)]
    bytes_ = np.arange(128, dtype=np.uint8).reshape(2, 64)
    np.testing.assert_allclose(flat.transform(bytes_), flat.transform(bytes_.astype(float)))
    words = nn.Sequential(nn.Embedding(9, 4), nn.Tanh())
    np.testing.assert_allclose(
        SiteFeatures(words, "1").fit_transform(np.array([[1, 2, 8]]))[0],
        words[0].weight[[1, 2, 8]].tanh().mean(0).detach(), atol=1e-6,
    )  # fmt: skip
    with pytest.raises(InputError, match="64 features"):
        flat.transform(np.zeros((2, 63)))


def test_a_batched_search_finds_what_separate_fits_find():
    X, y = load_iris(return_X_y=True)
    X = (X - X.mean(0)) / X.std(0)
    grid = {"learning_rate": [0.5], "subsample": [1.0], "units_per_step": [2], "total_units": [8]}
    found = search(X, y, grid, outer=3, inner=3, steps=10)
    alone = []
    for train, test in StratifiedKFold(3, shuffle=True, random_state=0).split(X, y):
        net = GBNNClassifier(8, 2, 0.5, 1.0, solver="varpro", max_iter=10, random_state=0).fit(
            X[train], y[train]
        )
        alone.append(net.score(X[test], y[test]))
    assert found.mean == pytest.approx(np.mean(alone), abs=0.04)
    values = X[:, 0] + 0.5 * X[:, 1] ** 2
    grid = {"total_units": [16], "units_per_step": [2], "subsample": [1.0], "learning_rate": [1e-6, 0.5]}
    tuned = search(X, values, grid, outer=3, inner=2)
    assert tuned.mean > 0.9 and [s["learning_rate"] for s in tuned.chosen] == [0.5] * 3
    assert tuned.cv_results_["rank_test_score"].tolist() == [2, 1]
    with pytest.raises(InputError, match="learning_rate"):
        search(X, y, {"learning_rte": [0.1]})


@pytest.mark.parametrize(
    ("made", "y", "word"),
    [
        (GBNNRegressor(loss="poisson"), np.array([-1.0, 2.0, 3.0, 4.0]), "Poisson"),
        (GBNNRegressor(loss="hubre"), np.arange(4.0), "huber"),
        (GBNNRegressor(loss="quantile", quantile=1.5), np.arange(4.0), "quantile"),
        (GBNNClassifier(), np.zeros(4), "one class"),
        (GBNNClassifier(subsample=1.5), np.array([0, 1, 0, 1]), "subsample"),
        (GBNNClassifier(solver="adams"), np.array([0, 1, 0, 1]), "adam"),
        (GBNNClassifier(batch_size=0), np.array([0, 1, 0, 1]), "batch_size"),
        (GBNNClassifier(learning_rate_init=0.0), np.array([0, 1, 0, 1]), "learning_rate_init"),
        (GBNNClassifier(device="cudda"), np.array([0, 1, 0, 1]), "cudda"),
        (GBNNClassifier(n_iter_no_change=0), np.array([0, 1, 0, 1]), "n_iter_no_change"),
    ],
)
def test_bad_targets_and_options_are_refused(made, y, word):
    with pytest.raises(InputError, match=word):
        made.fit(np.eye(4), y)


def test_what_no_batch_holds_is_searched_network_by_network_in_any_number_of_processes():
    X, y = load_diabetes(return_X_y=True)
    X, y = X[:120], y[:120]
    model = GBNNRegressor(6, 2, 0.3, loss="absolute", solver="varpro", max_iter=5)
    grid = {"total_units": [4, 6], "activation": ["tanh", "logistic"]}
    one = search(X, y, grid, outer=2, inner=2, estimator=model)
    two = search(X, y, grid, outer=2, inner=2, estimator=model, n_jobs=2)
    assert one.scores == two.scores and one.chosen == two.chosen and len(one.cv_results_["params"]) == 4
    train, test = next(KFold(2, shuffle=True, random_state=0).split(X))
    alone = clone(model).set_params(random_state=0, **one.chosen[0]).fit(X[train], y[train])
    assert alone.score(X[test], y[test]) == one.scores[0]


def test_a_batched_search_never_leaves_out_what_was_asked_for():
    X, y = load_iris(return_X_y=True)
    grid, model = {"total_units": [4]}, GBNNClassifier(4, 2, random_state=0)
    train, test = next(StratifiedKFold(2, shuffle=True, random_state=0).split(X, y))
    for asked in (
        {"solver": "adam", "max_iter": 1},
        {"class_weight": {0: 1e-6, 1: 1.0, 2: 1.0}},
        {"init": "prior"},
    ):
        net = clone(model).set_params(**asked)
        found = search(X, y, grid, outer=2, inner=2, estimator=net)
        assert found.scores[0] == clone(net).fit(X[train], y[train]).score(X[test], y[test])
    # Of one grid each setting goes its own way.
    mixed = search(
        X, y, {"solver": ["lbfgs", "sgd"], "activation": ["tanh", "relu"]}, outer=2, inner=2, estimator=model
    )
    alone = search(X, y, {"activation": ["tanh", "relu"]}, outer=2, inner=2, estimator=model)
    assert mixed.cv_results_["mean_test_score"][:2] == pytest.approx(alone.cv_results_["mean_test_score"])
    several = search(X, np.stack([X[:, 0], X[:, 1]], 1), grid, outer=2, inner=2)
    assert np.isfinite(several.scores).all()
