"""What a run of the method leaves: one record an iteration, and the result in SciPy's names."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lineament.core import checks


@dataclass(frozen=True)
class Record:
    """An iterate x_k and what led on from it; counts are cumulative, up to the arrival at x_k.

    ``gamma_start`` is γ when the iteration began, ``gamma`` the accepted one (of other rules: ‖g‖_*/λ), ``lam`` its λ and ``probes``
    the trials it took, all ``None``/0 at the last iterate. ``solves``: linear solves; ``products``: products with H;
    ``evaluations``: of f with its gradient; ``hessians``: of H.
    """

    iteration: int
    value: float
    grad_norm: float
    gamma_start: float
    gamma: float | None = None
    lam: float | None = None
    probes: int = 0
    solves: int = 0
    products: int = 0
    evaluations: int = 0
    hessians: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Minimum:
    """The result: SciPy's ``x``, ``fun``, ``jac``, ``success``, ``status``, ``message``, ``nit``, ``nfev``, ``njev``, ``nhev``; and ``nsolve``,
    ``nprod`` and the ``log``.

    ``status`` is ``"converged"`` (gradient), ``"target"`` (f - f* < eps), ``"max_iters"``, ``"precision"`` (f cannot tell the iterates apart
    any more), ``"search_failed"`` or ``"stopped"`` (by the callback). ``x`` is always the best point seen.
    """

    x: Any
    fun: float
    jac: Any
    success: bool
    status: str
    message: str
    nit: int
    nfev: int
    njev: int
    nhev: int
    nsolve: int
    nprod: int
    log: tuple[Record, ...]

    def column(self, name: str) -> list[Any]:
        """One field of the log over the iterations.

        Raises:
            InputError: an unknown field.
        """
        checks.one_of("name", name, Record.__dataclass_fields__)
        return [getattr(record, name) for record in self.log]

    def to_dict(self) -> dict[str, Any]:
        plain = {k: getattr(self, k) for k in self.__dataclass_fields__ if k not in ("x", "jac", "log")}
        x, jac = ((v if isinstance(v, Tensor) else np.asarray(v)).tolist() for v in (self.x, self.jac))
        return {**plain, "x": x, "jac": jac, "log": [asdict(record) for record in self.log]}

    def plot(self, ax: Any = None) -> Any:
        """f - (its least value) and ‖g‖_* over the iterations, on a logarithmic axis."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        values = np.array(self.column("value"))
        gap = values - values.min()
        ax.semilogy(np.where(gap > 0, gap, np.nan), label="f minus its least value")
        norms = np.array(self.column("grad_norm"))
        ax.semilogy(np.where(norms > 0, norms, np.nan), "--", label="norm of the gradient")
        ax.set(xlabel="iteration")
        ax.legend()
        return ax


MESSAGES = {
    "converged": "the norm of the gradient is below grad_tol",
    "target": "f is within eps of f_star",
    "max_iters": "max_iters iterations were made",
    "precision": "f cannot tell the iterates apart any more: differences are below its rounding",
    "search_failed": "no probe of the last search was accepted; x is the best point. Is the gradient that of f?",
    "stopped": "the callback asked to stop",
}
