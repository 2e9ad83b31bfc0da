"""Which labels were in the batch? They can be read off the last layer's gradient.

Fang et al. 2023, arXiv 2308.04699, section 1.3; Zhao, Mopuri, Bilen 2020.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lineament.core.checks import InputError, number, one_of, require
from lineament.core.models import logits
from lineament.privacy.messages import Message, fixed, head_of


def inferred_labels(
    weight: Tensor,
    batch: int,
    *,
    rule: Literal["row_sums", "bias", "counts"] = "row_sums",
    bias: Tensor | None = None,
    expected: Tensor | None = None,
) -> list[int]:
    """The labels of a batch, sorted.

    Args:
        weight: gradient of the last weights [classes, features]; bias: of its bias [classes].
        rule: ``"row_sums"``: the classes of the smallest row sums, each once (exact for one picture and features that are not negative);
            ``"bias"``: classes of negative bias gradient, and again those that stay most negative, so that labels may repeat;
            ``"counts"``: batch · (p - b) of each class, rounded to the batch, with p what the model answers on average to ``expected`` pictures.
        expected: mean probabilities [classes] of pictures of the same kind, for ``"counts"``.

    >>> inferred_labels(torch.tensor([[1.0], [-2.0]]), 1)
    [1]
    """
    number("batch", batch, low=1, integer=True)
    one_of("rule", rule, ("row_sums", "bias", "counts"))
    if rule == "row_sums":
        require(
            batch <= len(weight),
            f"batch: got {batch} pictures of {len(weight)} classes, of which row sums name each but once; pass known_labels=True, or give the last layer a bias",
        )
        return sorted(weight.sum(1).topk(batch, largest=False).indices.tolist())
    if bias is None:
        raise InputError(
            f"bias: the rule {rule!r} needs the gradient of the last bias, and this layer has none"
        )
    if rule == "counts":
        if expected is None:
            raise InputError("expected: the rule 'counts' needs what the model answers to other pictures")
        share = (batch * (expected - bias)).clamp(min=0)
        whole = share.floor()
        rest = max(batch - int(whole.sum()), 0)
        whole[(share - whole).topk(rest).indices] += 1
        found = torch.repeat_interleave(torch.arange(len(whole), device=whole.device), whole.long())
        return sorted(found[:batch].tolist())
    left = bias.clone()
    found = torch.nonzero(left < 0)[:, 0].tolist()[:batch]
    impact = left[left < 0].sum() / batch
    for label in found:
        left[label] -= impact
    while len(found) < batch:
        best = int(left.argmin())
        found.append(best)
        left[best] -= impact
    return sorted(found)


def label_rule(
    bias: Tensor | None, batch: int, expected: Tensor | None
) -> Literal["row_sums", "bias", "counts"]:
    """Which rule suits a message: counts where the model is not sure of its answers yet, else the bias; row sums where the head has no bias.

    A model that is sure of its answers is also sure of the audited pictures, so that mean answers say nothing of how large their gradients are.

    >>> label_rule(torch.tensor([-0.5, 0.5]), 4, torch.tensor([0.5, 0.5])), label_rule(torch.zeros(10), 4, None)
    ('counts', 'bias')
    """
    if bias is None:
        return "row_sums"
    # Present classes of an unsure model pull its bias by about 1 / batch each; where the gradient is smaller than half of that, it is sure.
    unsure = float(-bias.clamp(max=0).sum()) > 0.25 or batch == 1
    return "counts" if expected is not None and unsure and batch > 1 else "bias"


def guessed_targets(
    model: nn.Module, message: Message, example: Tensor, public: Tensor | None = None
) -> tuple[Tensor, str]:
    """The labels that an attacker reads off a message [batch], and by which rule; a change of weights is read as a gradient first.

    Args:
        example: any picture as the model takes it [1, ...]; the last linear layer is found by running the model. public: pictures of the same kind.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x = torch.rand(1, 1, 2, 2)
    >>> guessed_targets(net, Message.of(net, x, torch.tensor([2])), x)
    (tensor([2]), 'bias')
    """
    name, _ = head_of(model, example)
    named = {
        n: t
        for (n, _), t in zip(
            ((n, p) for n, p in model.named_parameters() if p.requires_grad), message.gradient(model)
        )
    }
    if f"{name}.weight" not in named:
        raise InputError(
            f"model: the weights of its last layer {name!r} are not trainable, so that no message has labels to read; pass known_labels=True"
        )
    weight, bias = named[f"{name}.weight"], named.get(f"{name}.bias")
    expected = None
    signs = message.local is not None and message.local.optimizer == "adam"
    if (
        public is not None and not signs and message.count > 1
    ):  # counts need sizes, and Adam sends little but signs
        still, parameters = fixed(model)
        with torch.no_grad():
            expected = logits(functional_call(still, parameters, (public,))).softmax(-1).mean(0)
    rule = label_rule(bias, message.count, expected)
    found = inferred_labels(weight, message.count, rule=rule, bias=bias, expected=expected)
    return torch.tensor(found, device=weight.device), rule
