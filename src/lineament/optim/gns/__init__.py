"""Newton-type minimisation with any Hessian approximation and nothing to tune: gradient-normalised smoothness (arXiv 2506.13710).

The method is ``algorithm.py`` (``minimize``, Algorithm 3), with ``rules.py`` (λ from γ, when a trial is accepted) and ``solvers.py`` (the forms that
H comes in, and the linear solve for each); ``optimizer.py`` is the same as a ``torch.optim.Optimizer``, ``in_scipy.py`` as a method of SciPy's
``minimize``. What is minimised: ``functions.py`` (a user's functions), ``problems.py`` (the paper's), ``network.py`` (the risk of an ``nn.Module``).
``theory.py`` measures γ(x); ``linear_algebra.py`` has the metric B and the arithmetic on arrays and tensors.
"""
