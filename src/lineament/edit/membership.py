"""Can a guesser that knows the edit tell networks that learned a class and lost it from networks that never saw it?

U-LiRA, the likelihood-ratio attack on unlearning (Hayes et al. 2024, arXiv 2403.01218): networks of both kinds show, sample by sample, how sure they are of
its label; a further network belongs to the kind under which what it says is likelier. What was erased is told no more often than by chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from lineament.core.checks import labels as class_labels
from lineament.core.checks import require, show
from lineament.core.models import called, device_of, frozen, logits
from lineament.core.results import Readable

_BATCH = 256
_FEWEST = 3  # one is judged, and two others have a spread


@dataclass(frozen=True)
class Membership(Readable):
    """How often the attack is right.

    Attributes:
        accuracy: over all networks and samples; 0.5 is chance.
        error: its standard error over networks, since the samples of one network go together.
        networks: of each kind. samples: judged in each.
    """

    accuracy: float
    error: float
    networks: int
    samples: int


def u_lira(
    edited: Sequence[nn.Module], never: Sequence[nn.Module], samples: tuple[Tensor, Tensor]
) -> Membership:
    """U-LiRA: each network in turn is told by the others, from log-odds of the right label, normal for each sample with one spread a kind.

    Args:
        edited: networks that were trained on the samples and then edited, from three on.
        never: as many, trained without them in the same way.
        samples: (inputs, labels) that were to be forgotten.

    Raises:
        InputError: fewer than three networks of a kind, unequal numbers, labels that are none.

    >>> nets = [nn.Linear(2, 2) for _ in range(6)]
    >>> x, y = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(8).long()
    >>> u_lira(nets[:3], nets[3:], (x, y)).networks
    3
    """
    require(
        len(edited) == len(never) and len(edited) >= _FEWEST,
        f"networks: got {len(edited)} edited and {len(never)} that never saw the samples, expected as many of each, {_FEWEST} or more",
    )
    inputs, targets = samples[0], class_labels("samples", samples[1])
    require(
        len(inputs) == len(targets) > 0, f"samples: got {show(inputs)} and {show(targets)}, expected as many inputs as labels"
    )  # fmt: skip
    # [kind, networks, samples]
    odds = torch.stack(
        [torch.stack([_log_odds(net, inputs, targets) for net in kind]) for kind in (edited, never)]
    )
    right = []
    for kind in range(2):
        for number in range(len(edited)):
            said = odds[kind, number]
            likely = []
            for other in range(2):
                known = odds[other]
                if other == kind:
                    known = torch.cat([known[:number], known[number + 1 :]])
                # Few networks give no spread of each sample: one is taken for all.
                spread = known.var(0).mean().sqrt().clamp(min=1e-12)
                likely.append(Normal(known.mean(0), spread).log_prob(said))
            # What both kinds make as likely tells nothing.
            lead = likely[kind] - likely[1 - kind]
            right.append(float(((lead > 0).double() + 0.5 * (lead == 0).double()).mean()))
    told = torch.tensor(right, dtype=torch.float64)
    return Membership(float(told.mean()), float(told.std() / math.sqrt(len(told))), len(edited), len(targets))


def _log_odds(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """log p / (1 - p) of the right label, without rounding p to 1."""
    found = []
    with frozen(model), torch.no_grad():
        for x, y in zip(inputs.split(_BATCH), targets.split(_BATCH)):
            z = logits(called(model, x.to(device_of(model)))).double().cpu()
            own = z.gather(1, y[:, None].cpu())
            found.append((own - z.scatter(1, y[:, None].cpu(), -math.inf).logsumexp(1, keepdim=True))[:, 0])
    return torch.cat(found)
