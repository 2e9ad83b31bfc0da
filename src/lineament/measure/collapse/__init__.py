"""Neural collapse: metrics, the unconstrained-features model, and perturbation theory around it."""
