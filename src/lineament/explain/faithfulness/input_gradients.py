"""The attributions that DiffROAR was made to judge: input gradients of the loss, a logit or a probability, and random scores.

Shah, Jain, Netrapalli, NeurIPS 2021, arXiv 2102.12781. One forward and one backward a batch gives every kind that is asked for. The scheme
of the paper takes the logit of the *predicted* class: a gradient of the true class writes the label into what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.batching import chunked
from lineament.core.models import answered, class_logits, decided, device_of, dtype_of, frozen

KINDS = (
    "logit_predicted",
    "logit_true",
    "softmax_predicted",
    "softmax_true",
    "loss",
    "loss_predicted",
    "random",
)


# On a CPU a part of the batch whose activations stay in the caches is faster than all of it (measured: 1.5 to 1.9 times).
_CPU_BATCH = 32


@torch.inference_mode(False)
def input_gradient(
    model: nn.Module,
    inputs: Float[Tensor, "batch *shape"],
    targets: Any = None,
    *,
    kind: str | Sequence[str] = "logit_predicted",
    times_input: bool = False,
    seed: int = 0,
    batch_size: int | str = "auto",
) -> Any:
    """The gradient with respect to each input coordinate: of a logit z_c, of the softmax probability p_c, or of the cross-entropy.

    Args:
        inputs: a batch of any shape, as the model takes it.
        targets: the true class of each; only ``"logit_true"``, ``"softmax_true"`` and ``"loss"`` need it.
        kind: one of :data:`KINDS`, or several, which gives a dict. ``"logit_predicted"`` is ∂z_ŷ/∂x with ŷ the class with the
            largest logit; ``"loss"`` is ∂(-log p_y)/∂x and ``"loss_predicted"`` the same for ŷ; ``"random"`` is N(0, 1), the control.
        times_input: multiply by the input.
        seed: of the random scores, which are drawn for the batch as a whole.
        batch_size: samples at a time, or ``"auto"``: all at once (32 on a CPU), halved when memory runs out.

    Returns:
        A tensor of the inputs' shape, or a dict {kind: tensor}.

    Raises:
        InputError: inputs, targets or kinds that cannot be used; gradients that are not finite.

    >>> net = nn.Linear(2, 2, bias=False); _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    >>> input_gradient(net, torch.tensor([[1.0, 1.0], [1.0, 0.0]])).tolist()
    [[0.0, 3.0], [1.0, 0.0]]
    """
    kinds = [kind] if isinstance(kind, str) else list(kind)
    checks.require(len(kinds) > 0, "kind: got none, expected at least one")
    for each in kinds:
        checks.one_of("kind", each, KINDS)
    checks.require(
        isinstance(model, nn.Module), f"model: got {checks.show(model)}, expected a torch.nn.Module"
    )
    checks.tensor("inputs", inputs, floating=True)
    inputs = inputs.clone() if inputs.is_inference() else inputs.detach()
    inputs = inputs.to(device_of(model), dtype_of(model) if any(True for _ in model.parameters()) else None)
    needs = [k for k in kinds if k in ("logit_true", "softmax_true", "loss")]
    checks.require(
        targets is not None or not needs,
        f"targets: got None, expected the true classes, which kind={needs[0] if needs else ''!r} needs; "
        "'logit_predicted' needs none",
    )
    known = [] if targets is None else [_labels(targets, len(inputs)).to(inputs.device)]
    with frozen(model), torch.enable_grad():
        found = chunked(
            lambda x, *y: _gradients(model, x, y[0] if y else None, kinds),
            inputs,
            *known,
            batch_size=batch_size,
            most=_CPU_BATCH if inputs.device.type == "cpu" else None,
        )
    for name, value in found.items():
        bad = int((~torch.isfinite(value)).sum())
        checks.require(
            bad == 0, f"model: {bad} of {value.numel()} values of its {name} gradient are NaN or infinite"
        )
    if "random" in kinds:
        drawn = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found["random"] = drawn.to(inputs)
    answer = {name: found[name] * inputs if times_input else found[name] for name in kinds}
    return answer[kind] if isinstance(kind, str) else answer


def attribution(
    model: nn.Module, kind: str = "logit_predicted", *, times_input: bool = False, seed: int = 0
) -> Callable[[Tensor], Tensor]:
    """An attribution function ``inputs -> scores`` of one of the kinds that need no label, for :func:`lineament.explain.faithfulness.retraining.diffroar`.

    Raises:
        InputError: a kind that needs the true label, which would leak into the masked test inputs.

    >>> attribution(nn.Linear(2, 2), "random")(torch.ones(3, 2)).shape
    torch.Size([3, 2])
    """
    checks.one_of("kind", kind, KINDS)
    checks.require(
        kind not in ("logit_true", "softmax_true", "loss"),
        f"kind: {kind!r} looks at the true label and would write it into the masks of the test inputs; use "
        f"{kind.replace('_true', '') + '_predicted'!r}",
    )

    def scores(inputs: Tensor) -> Tensor:
        return input_gradient(model, inputs, kind=kind, times_input=times_input, seed=seed)

    return scores


def _labels(targets: Any, count: int) -> Tensor:
    labels = torch.as_tensor(targets)
    labels = labels.clone() if labels.is_inference() else labels
    return checks.labels("targets", labels.expand(count) if labels.ndim == 0 else labels, count=count)


def _gradients(model: nn.Module, x: Tensor, y: Tensor | None, kinds: Sequence[str]) -> dict[str, Tensor]:
    wanted = [k for k in dict.fromkeys(kinds) if k != "random"]
    if not wanted:
        return {"random": torch.zeros_like(x)}
    x = x.clone().requires_grad_()
    z = answered(model, x, "inputs")
    checks.require(
        z.ndim == 2 and len(z) == len(x),
        f"model: its logits are {checks.show(z)} for {len(x)} inputs, expected shape (batch, classes)",
    )
    pair, predicted = class_logits(z), decided(z.detach())
    if y is not None:
        y = checks.labels("targets", y, count=len(x), classes=pair.shape[1])
    found = {}
    for name in wanted:
        label = predicted if name.endswith("predicted") or y is None else y
        if name.startswith("loss"):
            score = F.cross_entropy(pair, label, reduction="sum")
        elif name.startswith("logit"):
            # A single logit is explained itself, whatever it decides.
            score = z.gather(1, label.clamp_max(z.shape[1] - 1)[:, None]).sum()
        else:
            score = pair.softmax(1).gather(1, label[:, None]).sum()
        last = name == wanted[-1]
        gradient = torch.autograd.grad(score, x, retain_graph=not last, allow_unused=True)[0]
        found[name] = torch.zeros_like(x) if gradient is None else gradient
    return found if len(wanted) == len(set(kinds)) else {**found, "random": torch.zeros_like(x)}
