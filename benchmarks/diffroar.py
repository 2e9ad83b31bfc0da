"""DiffROAR's parts against its peers: masks beside the reference's loop over samples, PGD beside torchattacks and foolbox, scores beside Captum's,
and small networks trained together beside one after the other.

All on the CPU in one process. Each attack runs the same number of steps from the same start on the same network.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lineament.bench import Row, compare
from lineament.explain.faithfulness.input_gradients import input_gradient
from lineament.explain.faithfulness.pixel_scores import infidelity, sensitivity
from lineament.explain.faithfulness.unmasking import Unmasked, rank
from lineament.train.attacks import PGD
from lineament.train.stacked import Training

SLUG = "diffroar"
LEVELS = (0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05)
EPS, STEP, STEPS = 8 / 255, 2 / 255, 8


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 256, 10),
    ).eval()  # fmt: skip


def looped(x: Tensor, scores: Tensor) -> list[Tensor]:
    """Every level and end, one sample after the other: sort, index, replace, as a plain script does it."""
    made = []
    for kept in LEVELS:
        for descending in (True, False):
            out = x.clone()
            for k in range(len(x)):
                order = scores[k].abs().flatten().argsort(descending=descending)
                out[k].view(-1)[order[round(kept * order.numel()) :]] = 0.0
            made.append(out)
    return made


def ours_masks(x: Tensor, scores: Tensor) -> list[Tensor]:
    order, fill = rank(scores), torch.zeros(())
    return [Unmasked(x, order, kept, end, fill).whole() for kept in LEVELS for end in ("top", "bottom")]


def per_sample(model: nn.Module, x: Tensor) -> Tensor:
    found = []
    for k in range(len(x)):
        one = x[k : k + 1].clone().requires_grad_()
        z = model(one)
        found.append(torch.autograd.grad(z[0, int(z.argmax())], one)[0])
    return torch.cat(found)


def rows(repeats: int = 5) -> Iterator[Row]:
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model, x, y = convolutional(), torch.rand(128, 3, 32, 32), torch.randint(10, (128,))
    scores = torch.randn(x.shape)
    yield compare(
        SLUG,
        "masks of 7 levels at both ends, 128 x 3 x 32 x 32",
        lambda: ours_masks(x, scores),
        "a loop over samples",
        lambda: looped(x, scores),
        target=3.0,
        repeats=repeats,
        note="one sort of all samples for all levels; the limit is writing 14 copies of the data",
    )
    yield compare(
        SLUG,
        "gradient of the predicted logit, 128 images",
        lambda: input_gradient(model, x),
        "one backward a sample",
        lambda: per_sample(model, x),
        target=2.0,
        repeats=repeats,
        note="one forward and one backward a batch is the limit",
    )
    yield from _attacks(model, x, y, repeats)
    yield from _captum(model, x[:16], repeats)

    data = torch.rand(1000, 1, 8, 8)
    labels = torch.randint(10, (1000,))
    training = Training(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
        epochs=5,
        select="last",
    )
    order = rank(torch.rand(1000, 1, 8, 8))
    views = [Unmasked(data, order, k / 49, "top", torch.zeros(())) for k in range(1, 49)]
    yield compare(
        SLUG,
        "48 perceptrons of 2,410 weights, 5 epochs",
        lambda: training.stacked(views, labels, range(48)),
        "one after the other",
        lambda: [training(view.whole(), labels, seed) for seed, view in enumerate(views)],
        target=1.0,
        repeats=min(repeats, 3),
        note="larger networks are trained one after the other on a CPU: their stacked state leaves the caches",
    )


def _attacks(model: nn.Module, x: Tensor, y: Tensor, repeats: int) -> Iterator[Row]:
    attack = PGD(norm="linf", eps=EPS, step=STEP, steps=STEPS)
    what = f"PGD linf, {STEPS} steps, 128 images"
    yield compare(
        SLUG,
        what,
        lambda: attack(model, x, y),
        "bare forwards and backwards",
        lambda: _bare(model, x, y),
        target=1 / 1.25,
        repeats=repeats,
        note="the limit is 1: sign, two clips and a check of the logits a step besides",
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            import torchattacks
    except ImportError:
        yield compare(SLUG, what, lambda: None, "torchattacks", None, repeats=1)
    else:
        theirs = torchattacks.PGD(model, eps=EPS, alpha=STEP, steps=STEPS, random_start=False)
        gap = float((theirs(x, y) - x - attack(model, x, y).delta).abs().max())
        yield compare(
            SLUG, what, lambda: attack(model, x, y), "torchattacks, and whom it fooled",
            lambda: _answers(model, theirs(x, y)) != y, target=1.0, repeats=repeats,
            note=f"largest difference of a pixel {gap:.1g}; ours says whom it fooled, so theirs is asked too: one forward",
        )  # fmt: skip
    try:
        import foolbox
    except ImportError:
        yield compare(SLUG, what, lambda: None, "foolbox", None, repeats=1)
    else:
        bounded = foolbox.PyTorchModel(model, bounds=(0, 1))
        other: Any = foolbox.attacks.LinfProjectedGradientDescentAttack(
            abs_stepsize=STEP, steps=STEPS, random_start=False
        )
        gap = float((other.run(bounded, x, y, epsilon=EPS) - x - attack(model, x, y).delta).abs().max())
        yield compare(
            SLUG, what, lambda: attack(model, x, y), "foolbox",
            lambda: other.run(bounded, x, y, epsilon=EPS), target=1.0, repeats=repeats,
            note=f"largest difference of a pixel {gap:.1g}",
        )  # fmt: skip


def _answers(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


def _bare(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    delta = torch.zeros_like(x)
    for _ in range(STEPS):
        delta.requires_grad_()
        gradient = torch.autograd.grad(nn.functional.cross_entropy(model(x + delta), y), delta)[0]
        delta = (delta.detach() + STEP * gradient.sign()).clamp(-EPS, EPS)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with torch.no_grad():
        return model(x + delta)


def _captum(model: nn.Module, x: Tensor, repeats: int) -> Iterator[Row]:
    try:
        from captum import metrics
    except ImportError:
        yield compare(SLUG, "infidelity", lambda: None, "captum", None, repeats=1)
        return
    gradient = input_gradient(model, x)
    target = model(x).argmax(1)

    def noise(inputs: Tensor) -> tuple[Tensor, Tensor]:
        change = 0.1 * torch.randn(inputs.shape)
        return change, inputs - change

    yield compare(
        SLUG,
        "infidelity, 50 changes, 16 images",
        lambda: infidelity(model, x, gradient, target, samples=50, perturb="noise"),
        "captum, 16 images at a time",
        lambda: metrics.infidelity(
            model, noise, x, gradient, target=target, n_perturb_samples=50, max_examples_per_batch=16
        ),
        target=1.0,
        repeats=repeats,
        note="both are 50 forwards; Captum repeats the unchanged inputs' forward beside each",
    )
    yield compare(
        SLUG,
        "sensitivity, 10 changes, 16 images",
        lambda: sensitivity(lambda z: input_gradient(model, z, target, kind="logit_true"), x, samples=10),
        "captum, 16 images at a time",
        lambda: metrics.sensitivity_max(
            lambda z: (input_gradient(model, z[0], target, kind="logit_true"),), (x,), n_perturb_samples=10,
            max_examples_per_batch=16,
        ),
        target=1.0,
        repeats=repeats,
        note="both are ten explanations",
    )  # fmt: skip


if __name__ == "__main__":
    for row in rows(3):
        print(row)
