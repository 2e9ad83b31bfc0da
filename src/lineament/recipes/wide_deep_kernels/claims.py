"""Claims of the wide-deep-kernels recipe: predicates from the paper, written before the first run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lineament.recipes.kit.claims import judged
from lineament.recipes.wide_deep_kernels.study import PAIRS, Digits, Limits, Pair
from lineament.report.outcome import Claim


def claims_of(
    config: Any, pairs: Mapping[tuple[int, int, int], Pair], known: Limits, seen: Sequence[Digits]
) -> list[Claim]:
    """Predicates: a higher mean accuracy, equality at every point, bounds as the specification states them."""
    n, seeds = config.samples[-1], config.seeds
    mean = lambda d, rule, size=n: sum(pairs[d, size, s].accuracy[rule] for s in seeds) / len(seeds)  # noqa: E731
    claims = []
    for d in PAIRS:
        others = {rule: mean(d, rule) for rule in (*(f"psi {o}" for o in PAIRS if o != d), "1-NN")}
        mine = mean(d, f"psi {d}")
        claims.append(
            judged(
                f"In {d} dimension{'s' if d > 1 else ''}, the matching ψ beats each mismatched one and 1-NN at n = {n:,}",
                "it is the consistent one",
                f"{mine:.4f} against " + ", ".join(f"{rule} {value:.4f}" for rule, value in others.items()),
                mine > max(others.values()),
                "a mismatched exponent is as good at this number of points",
            )
        )
    agree = sum(pairs[d, n, s].agrees_with_hilbert for d in PAIRS for s in seeds) / (len(PAIRS) * len(seeds))
    claims += [
        judged(
            "The square's limit is 1-NN at every point, and relu's the majority",
            "the same at every point",
            f"{100 * known.square_is_nearest:.1f} % and {100 * known.mixture_is_majority:.1f} % of points",
            known.square_is_nearest == 1 and known.mixture_is_majority == 1,
            "some points differ",
        ),
        judged(
            "ln ψ falls with ln distance at slope -d (within 2 %)",
            "-d",
            ", ".join(f"d = {d}: {slope:.3f}" for d, slope in known.slopes.items()),
            all(abs(slope + int(d)) < 0.02 * int(d) for d, slope in known.slopes.items()),
            "a slope is off",
        ),
        judged(
            "relu's tangent kernel between orthogonal points tends to 1/4 of its diagonal (0.005 near at depth 1,000)",
            "1/4",
            ", ".join(f"{value:.4f} at {depth}" for depth, value in known.relu.items()),
            abs(known.relu["1000"] - 0.25) < 0.005 and known.relu["10"] > known.relu["100"] > known.relu["1000"],
            "it is not there yet",
        ),
        judged(
            "For regression, deeper is worse (RMSE rises with depth)",
            "values vanish with depth",
            ", ".join(f"depth {depth}: {value:.2f}" for depth, value in known.regression.items()),
            sorted(known.regression.values()) == list(known.regression.values()),
            "a deeper network is better on these data",
        ),
        judged(
            "The leave-one-out exponent is less than 2 from the estimated dimension on digits",
            "the exponent must be the manifold's dimension",
            "; ".join(f"{r.components} components: {r.chosen:g} for {(r.two_nn * r.likelihood) ** 0.5:.1f}" for r in seen),
            # The search looks at neighbours within two and a half of it, so that the end of that range counts against the claim.
            all(abs(r.chosen - round((r.two_nn * r.likelihood) ** 0.5)) < 2 for r in seen),
            "accuracy prefers the end of the range that was searched",
        ),
        judged(
            "Control: the kernel is no more than the Hilbert rule r^-d (the same answer at 98 % of points or more)",
            "the limit of ψ near a point",
            f"the same at {100 * agree:.1f} % of points",
            agree >= 0.98,
            "the kernel far from a point matters",
        ),
        judged(
            "Control: with permuted labels it is no better than the majority (by 2 points)",
            "nothing to learn",
            ", ".join(f"d = {d}: {mean(d, 'permuted labels'):.3f} against {mean(d, 'majority'):.3f}" for d in PAIRS),
            all(mean(d, "permuted labels") <= mean(d, "majority") + 0.02 for d in PAIRS),
            "it finds something in noise",
        ),
        judged(
            "Control: a tuned k-NN or an RBF SVM does not beat the matching ψ by more than a point",
            "not in the paper",
            ", ".join(f"d = {d}: ψ {mean(d, f'psi {d}'):.3f}, k-NN {mean(d, 'k-NN, k tuned'):.3f}, SVM {mean(d, 'RBF SVM'):.3f}" for d in PAIRS),
            all(max(mean(d, "k-NN, k tuned"), mean(d, "RBF SVM")) <= mean(d, f"psi {d}") + 0.01 for d in PAIRS),
            "consistency is slow: the tuned rule is better at this number of points",
        ),
        judged(
            "Control: an interpolating Laplace kernel (bandwidth: the median distance; of 8,000 points at most) does not beat the matching ψ by more than a point",
            "not in the paper",
            ", ".join(f"d = {d}: ψ {mean(d, f'psi {d}'):.3f}, Laplace {mean(d, 'Laplace kernel'):.3f}" for d in PAIRS),
            all(mean(d, "Laplace kernel") <= mean(d, f"psi {d}") + 0.01 for d in PAIRS),
            "a kernel whose exponent no depth has set is better at this number of points",
        ),
        judged(
            "Control: a trained MLP of width 4,096 (of 2,000 points at most) does not beat the matching ψ by more than a point",
            "not in the paper",
            ", ".join(f"d = {d}: ψ {mean(d, f'psi {d}'):.3f}, MLP {mean(d, 'MLP of width 4096'):.3f}" for d in PAIRS),
            all(mean(d, "MLP of width 4096") <= mean(d, f"psi {d}") + 0.01 for d in PAIRS),
            "a trained network of one hidden layer is better at this number of points",
        ),
        judged(
            "Control: cosines in float32 change ln of the kernel at depth 20 by more than 0.01",
            "useless beyond depth 20",
            f"{known.float32_off:.3g}",
            known.float32_off > 0.01,
            "these points are far enough apart",
        ),
    ]  # fmt: skip
    return claims
