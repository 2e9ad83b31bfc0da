"""Every public call under ``torch.inference_mode``: the same numbers, also where the model, the data and the loader were made under it.

Tensors of inference mode can be in no graph, and changing them in place outside of it is an error.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lineament
from lineament.core.gradients import per_sample_gradients
from lineament.explain.patching.circuit_nodes import component_nodes
from lineament.explain.saliency.methods import METHODS as SALIENCY
from lineament.explain.tokens.methods import METHODS as TOKENS
from lineament.learn.useful.early_outputs import outputs_of
from lineament.measure.landscape.axes import random_axes
from tests.contracts import test_patching, test_saliency, test_tokens
from tests.contracts.language_models import prompts, tiny
from tests.contracts.token_models import model

explain, measure, curvature = lineament.explain, lineament.measure, lineament.core.curvature


def images(count=4):
    return torch.rand(count, 2, 12, 9, generator=torch.Generator().manual_seed(0))


def labels(count=4):
    return torch.arange(count) % 4


def network():
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 4)).eval()


def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def rows(count=12):
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(count) % 2


def batches():
    x, y = rows()
    return [(x[:6], y[:6]), (x[6:], y[6:])]


def product(make):
    def call():
        operator = make(dense(), F.cross_entropy, batches())
        return operator @ torch.ones(operator.shape[0])

    return call


def trained(optimizer, **options):
    def call():
        net = dense()
        done = lineament.train.fit(net, rows(), optimizer=optimizer, epochs=2, batch_size=5, **options)
        return [done.history[-1].loss, list(net.parameters())]

    return call


def stepped(make, backward=True):
    """A loop of the user's own around one of the optimizers."""

    def call():
        net = dense()
        (x, y), optimizer = rows(), make(net)

        def closure():
            optimizer.zero_grad()
            # What a user's closure reads is the user's: data made under inference mode can be in no graph.
            loss = F.cross_entropy(net(x.clone()), y.clone())
            if backward:
                loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
        return list(net.parameters())

    return call


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.1)


def masks():
    return torch.rand(4, 1, 12, 9, generator=torch.Generator().manual_seed(3))


def token_scores(name, **options):
    return lambda: test_tokens.explain(model("gpt2"), name, torch.tensor([5, 40, 81, 12, 33]), target=3, **options)  # fmt: skip


def faithfulness(call):
    return lambda: call(model("gpt2"), [5, 40, 81, 12], torch.tensor([0.1, 0.4, 0.2, 0.3]))


def circuit():
    net, (clean, corrupt) = tiny("gpt2"), prompts()
    nodes = component_nodes(net, ["mlp_out"])
    effects = explain.node_effects(net, clean, corrupt, test_patching.METRIC, dictionaries=nodes)
    return explain.circuit_curve(net, clean, corrupt, test_patching.METRIC, effects, dictionaries=nodes)


def tract():
    net = dense()
    with lineament.learn.tract(net):
        done = lineament.train.fit(net, rows(), optimizer=sgd, epochs=2, batch_size=5)
    return [done.history[-1].loss, list(net.parameters())]


def useful():
    net, data = dense(), rows(60)
    fit = lineament.learn.trainer(data, optimizer=sgd)
    done = lineament.learn.useful(net, fit, data, epochs=4, separating=2)
    return [done.errors, list(net.parameters())]


CASES = {
    **{f"saliency {m}": lambda m=m: test_saliency.explain(test_saliency.network(method=m), images(), m) for m in SALIENCY},
    "saliency of layers": lambda: explain.combined_saliency(network(), images(), site=["0", "2"]),
    "layer weights": lambda: list(explain.layer_weights(network(), images(8), labels(8), site=["0", "2"], folds=2).values()),
    "meta-saliency": lambda: explain.meta_saliency(network(), images(), labels(), site="2"),
    "still to learn": lambda: explain.still_to_learn(network(), images(), labels(), site="2"),
    "integrated gradients": lambda: explain.integrated_gradients(network(), images(), steps=3),
    "class sensitivity": lambda: explain.class_sensitivity(network(), images(), site="2"),
    "randomisation": lambda: explain.randomisation(network(), images(), site="2"),
    "input gradient": lambda: explain.input_gradient(network(), images()),
    "deletion": lambda: explain.deletion_insertion(network(), images(), masks(), steps=3),
    "infidelity": lambda: explain.infidelity(network(), images(), masks(), samples=3),
    "sensitivity": lambda: explain.sensitivity(explain.attribution(network()), images(), samples=2),
    "score maps": lambda: explain.score_maps(network(), images(), {"m": masks()}, steps=3, samples=3, perturbations=2),
    **{f"tokens {m}": token_scores(m) for m in TOKENS},
    "continuation": lambda: explain.explain_continuation(model("gpt2"), [5, 40, 81], max_new_tokens=2, method="grad_norm").matrix,
    "hard faithfulness": lambda: list(faithfulness(explain.hard_faithfulness)().values()),
    "soft faithfulness": faithfulness(explain.soft_faithfulness),
    **{f"patching {m}": lambda m=m: test_patching.numbers(test_patching.METHODS[m](tiny("gpt2"), *prompts(), test_patching.METRIC)) for m in test_patching.METHODS},
    "circuit": circuit,
    "hessian": product(curvature.hessian),
    "gauss-newton": product(curvature.gauss_newton),
    "fisher": product(curvature.fisher),
    "eigenpairs": lambda: curvature.top_eigenpairs(curvature.hessian(dense(), F.cross_entropy, batches()), 2).values,
    "trace": lambda: curvature.trace(curvature.hessian(dense(), F.cross_entropy, batches()), 4).value,
    "density": lambda: curvature.spectral_density(curvature.hessian(dense(), F.cross_entropy, batches()), steps=4, probes=1),
    "per-sample gradients": lambda: list(per_sample_gradients(dense(), F.cross_entropy, *rows()).values()),
    "line": lambda: measure.line(dense(), F.cross_entropy, batches(), random_axes(dense(), 1)[0], steps=3, metrics=["accuracy", "class_loss", "gradient_norm"]),
    "plane": lambda: measure.plane(network(), F.cross_entropy, [(images(), labels())], random_axes(network()), steps=3, batchnorm="recalibrate"),
    "interpolation": lambda: measure.interpolation(network(), F.cross_entropy, [(images(), labels())], network(), steps=3),
    "perturbations": lambda: measure.perturbations(dense(), F.cross_entropy, batches(), count=2),
    "criteria": lambda: measure.hessian_criteria(dense(), F.cross_entropy, batches(), steps=4, probes=2),
    "hessian axes": lambda: measure.hessian_axes(curvature.hessian(dense(), F.cross_entropy, batches()))[0].vector,
    "alignment": lambda: measure.alignment(dense(), dense(), batches(), blocks=2, nulls=("shuffled",)),
    "barrier": lambda: measure.barrier(dense(), dense(), batches(), points=3),
    "collapse": lambda: measure.collapse(dense(), batches()),
    "collapse metrics": lambda: measure.collapse_metrics(rows()[0], rows()[1], weight=dense()[0].weight[:2]),
    "central path": lambda: measure.central_path(measure.UFM(2, 2), torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), [0.0, 1.0]),
    "outputs": lambda: outputs_of(network(), (images(), labels()), recalibrate=True)[0],
    "tract": tract,
    "fit": trained(sgd),
    "fit with DiffGrad": trained(lambda net: lineament.optim.DiffGrad(net.parameters())),
    "fit with SAM": trained(lambda net: lineament.optim.SAM(sgd(net), model=net)),
    "DiffGrad": stepped(lambda net: lineament.optim.DiffGrad(net.parameters())),
    "SAM": stepped(lambda net: lineament.optim.SAM(sgd(net), model=net)),
    "GNS": stepped(lambda net: lineament.optim.GNS(net.parameters()), backward=False),
    "minimize": lambda: lineament.optim.minimize(lambda w: (w**2).sum() ** 2, torch.ones(3)).x,
    "training": lambda: list(lineament.train.Training(dense, epochs=2, select="last")(*rows(), 1).parameters()),
    "stacked": lambda: [list(n.parameters()) for n in lineament.train.Training(dense, epochs=2).stacked([rows(40)[0]] * 2, rows(40)[1], [0, 1])],
    "robust accuracy": lambda: lineament.train.robust_accuracy(network(), images(), labels(), lineament.train.PGD(eps=0.1, step=0.1, steps=1)),
    "diffroar": lambda: explain.diffroar(explain.attribution(dense()), lineament.train.Training(dense, epochs=2), (*rows(40), *rows(40)), fractions=[0.5], seeds=[0], chance_ok=True),
    "useful": useful,
    "attack": lambda: lineament.train.pgd(network().eval(), images(), labels(), eps=0.1, norm="linf", step=0.05, steps=2).delta,
}  # fmt: skip


def numbers(found):
    """All numbers of a result, in order."""
    if isinstance(found, Tensor):
        return [found.detach().double().flatten().numpy()]
    if isinstance(found, (int, float, np.ndarray, np.generic)) and not isinstance(found, bool):
        return [np.asarray(found, dtype=np.float64).ravel()]
    if dataclasses.is_dataclass(found):
        found = [getattr(found, f.name) for f in dataclasses.fields(found)]
    if isinstance(found, dict):
        found = list(found.values())
    return [n for each in found for n in numbers(each)] if isinstance(found, (list, tuple)) else []


@pytest.mark.filterwarnings("ignore::lineament.measure.landscape.batchnorm_modes.LandscapeWarning")
@pytest.mark.parametrize("name", CASES)
def test_everything_made_and_called_under_inference_mode(name):
    reference = np.concatenate(numbers(CASES[name]()))
    assert len(reference)
    with torch.inference_mode():
        found = np.concatenate(numbers(CASES[name]()))
        assert torch.is_inference_mode_enabled()
    np.testing.assert_allclose(found, reference, rtol=1e-6, atol=1e-9)


def test_an_audit_of_what_was_made_under_inference_mode(tmp_path):
    def audited(name):
        lenses = ["accuracy", "collapse", "spectrum"]
        report = lineament.audit(network(), (images(40), labels(40)), out=tmp_path / name, lenses=lenses)
        return {section.name: (section.status, section.sentence) for section in report.sections}

    reference = audited("outside")
    with torch.inference_mode():
        found = audited("inside")
    assert found == reference and len(found) == 3
