"""Newton-type minimisation with any Hessian approximation and nothing to tune: gradient-normalised smoothness (arXiv 2506.13710).

The method is ``algorithm.py`` (``minimize``, Algorithm 3), with ``rules.py`` (λ from γ, when a trial is accepted) and ``solvers.py`` (the linear
solve for each of the ``forms.py`` that H comes in); ``optimizer.py`` is the same as a ``torch.optim.Optimizer``, ``in_scipy.py`` as a method
of SciPy's ``minimize``. What is minimised: ``functions.py`` (a user's functions), ``problems.py`` and ``equations.py`` (the paper's), ``network.py`` (the
risk of an ``nn.Module``). ``theory.py`` measures γ(x) and knows its bounds; ``linear_algebra.py`` has the metric B and the dense arithmetic.
"""
