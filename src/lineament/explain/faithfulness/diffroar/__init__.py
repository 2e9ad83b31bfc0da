"""Do input gradients highlight what matters? DiffROAR, which judges attributions by retraining, and what theory says beside it."""

from lineament.explain.faithfulness.diffroar.retraining import (
    FRACTIONS,
    DiffROAR,
    accuracy,
    diffroar,
    scores_of_inputs,
)

__all__ = ["FRACTIONS", "DiffROAR", "accuracy", "diffroar", "scores_of_inputs"]
