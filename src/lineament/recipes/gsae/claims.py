"""Claims of the gsae recipe: predicates from the specification, written before the first run.

All comparisons are of means over the seeds, at equal k; ``OURS`` was trained with gradients of labels drawn from the model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from lineament.recipes.gsae.language import Spoken
from lineament.recipes.gsae.planted import INFERENCE, OURS, RANDOM, SHUFFLED, TOPK, Measured
from lineament.recipes.kit.claims import judged
from lineament.report.outcome import Claim

Found = Mapping[int, Sequence[Measured]]


def values(found: Found, name: str, mode: str, field: str) -> list[float]:
    """A number of one dictionary in one mode, for each seed."""
    return [getattr(m, field) for each in found.values() for m in each if (m.name, m.mode) == (name, mode)]


def planted_claims(found: Found) -> list[Claim]:
    def compared(
        name: str,
        paper: str,
        field: str,
        other: tuple[str, str],
        test: Callable[[float, float], bool],
        otherwise: str,
        mode: str = "gradient",
    ) -> Claim | None:
        ours, theirs = values(found, OURS, mode, field), values(found, *other, field)
        if not ours or not theirs:
            return None
        one, two = statistics.mean(ours), statistics.mean(theirs)
        apart = [a - b for a, b in zip(ours, theirs)]
        spread = f" (differences by seed {', '.join(f'{a:+.4f}' for a in apart)})" if len(apart) > 1 else ""
        return judged(name, paper, f"{one:.4f} against {two:.4f}{spread}", test(one, two), otherwise)

    plain = (TOPK, "activation")
    told = "lower downstream loss at equal k (no figures accessible)"
    claims = [
        compared("KL at least 4 % below TopK's", told, "kl", plain, lambda a, b: a <= 0.96 * b, "the gain is smaller at this scale"),
        compared("Recovered loss at least 0.03 above TopK's", told, "recovered", plain, lambda a, b: a >= b + 0.03, "the gain is smaller at this scale"),
        compared("Not more dead latents than TopK", "fewer dead latents", "dead", plain, lambda a, b: a <= b, "more latents are dead"),
        compared("In activation mode KL is no worse than TopK's", "which mode the figures use could not be checked", "kl", plain, lambda a, b: a <= b,
                 "without the gradient at inference the trained weights are worse", "activation"),
        compared("FVU at most 5 % above TopK's", "reconstruction may be slightly worse", "fvu", plain, lambda a, b: a <= 1.05 * b, "it costs more reconstruction"),
        compared("Steering is stronger: a larger mean KL of adding one typical norm of an atom", "stronger steering", "steering", plain, lambda a, b: a > b,
                 "the specification did not reproduce it either", "activation"),
        compared("Training is needed: KL below that of the gradient used at inference only, on plain TopK's weights", "not run in the paper", "kl",
                 (INFERENCE, "gradient"), lambda a, b: a < b, "the selection at inference gives all of the gain"),
        compared("The direction is needed: KL below that with random directions of each row's norm", "not run in the paper", "kl", (RANDOM, "gradient"),
                 lambda a, b: a < b, "noise does as well"),
        compared("The row's own gradient is needed: KL below that with gradients shuffled over rows", "not run in the paper", "kl", (SHUFFLED, "gradient"),
                 lambda a, b: a < b, "any row's gradient does as well"),
        compared("Fewer dead latents come from the gradient: fewer than with random directions", "fewer dead latents", "dead", (RANDOM, "gradient"),
                 lambda a, b: a < b, "noise in the selection revives as many"),
    ]  # fmt: skip
    return [claim for claim in claims if claim is not None]


def language_claims(spoken: Sequence[Spoken]) -> list[Claim]:
    by = {(s.name, s.mode): s for s in spoken}
    plain, ours, active = by["TopK", "activation"], by["g-SAE", "gradient"], by["g-SAE", "activation"]
    return [
        judged(
            "Language model: cross-entropy with the reconstruction is below TopK's (gradient mode, sampled labels)",
            "lower downstream loss at equal k",
            f"{ours.ce_substituted:.4f} ± {ours.ce_error:.4f} against {plain.ce_substituted:.4f} (the model's own {plain.ce:.4f})",
            ours.ce_substituted < plain.ce_substituted,
            "no gain at this site and scale",
        ),
        judged(
            "Language model: KL is below TopK's in activation mode",
            "not told",
            f"{active.kl:.4f} ± {active.kl_error:.4f} against {plain.kl:.4f}; in gradient mode {ours.kl:.4f}",
            active.kl < plain.kl,
            "the weights are no better without the gradient",
        ),
        judged(
            "Language model: not more dead latents than TopK",
            "fewer dead latents",
            f"{ours.dead:.4f} against {plain.dead:.4f}",
            ours.dead <= plain.dead,
            "more latents are dead",
        ),
        judged(
            "Language model: steering is stronger",
            "stronger steering",
            f"{active.steering:.4f} against {plain.steering:.4f}",
            active.steering > plain.steering,
            "the specification did not reproduce it either",
        ),
    ]
