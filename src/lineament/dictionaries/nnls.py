"""Non-negative codes of activations in given atoms: argmin_{z >= 0} ½‖x - z D‖² + ½ λ‖z‖² + s Σ z, row by row.

HALS goes over the atoms one after the other, in blocks: one matrix product brings a block of gradients up to date, and the updates inside it touch
what fits into the cache; of up to 256 atoms, the code whose support the passes have found is solved for exactly (in float64 where the atoms are nearly dependent). FISTA (Beck and Teboulle 2009, with restarts) moves all codes at once, and needs no atoms-by-atoms matrix where there are more
atoms than twice the width. Each row stops by itself, so that its code does not depend on which rows are coded with it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks
from lineament.core.checks import require
from lineament.core.models import is_half

_SAMPLES, _ATOMS = 4096, 32  # of one block of a pass
_ROWS = 2048  # coded at once
_PIVOTS = 6
_SMALL, _EXACT = (
    64,
    256,
)  # atoms up to which systems, one a row, are solved: soon, and of rows that passes do not settle
_SYSTEMS = 2**24  # numbers in the systems that are solved at once
METHODS = ("hals", "fista")


def sweep(
    codes: Float[Tensor, "atoms samples"],
    products: Float[Tensor, "atoms samples"],
    gram: Float[Tensor, "atoms atoms"],
    ridge: float = 0.0,
) -> Float[Tensor, "atoms samples"]:
    """One pass of HALS over all atoms, in place: z_j <- max(0, z_j + (b_j - Σ_i z_i G_ij - λ z_j) / (G_jj + λ)), with b = D xᵀ and G = D Dᵀ.

    >>> sweep(torch.zeros(1, 2), torch.tensor([[2.0, -1.0]]), torch.tensor([[4.0]])).tolist()
    [[0.5, 0.0]]
    """
    steps = gram.diagonal() + ridge
    moves = (steps > 0).tolist()  # an atom of 0, or of codes that are 0, stays as it is
    inverse = torch.where(steps > 0, 1 / steps.clamp(min=1e-30), 0)[:, None]
    # z_j <- max(0, (b_j - Σ_{i ≠ j} z_i G_ij) / (G_jj + λ)): of a block one product brings in all codes but those that it changes on the way.
    weights = gram * inverse
    weights.fill_diagonal_(0)
    for first in range(0, codes.shape[1], _SAMPLES):
        z = codes[:, first : first + _SAMPLES]
        b = products[:, first : first + _SAMPLES]
        for start in range(0, len(codes), _ATOMS):
            block = slice(start, start + _ATOMS)
            before, own = weights[block].clone(), weights[block, block]
            before[:, block] = own.triu()
            left = torch.addmm(b[block] * inverse[block], before, z, alpha=-1)
            for at in range(len(left)):
                if moves[start + at]:
                    done = z[start : start + at].T
                    z[start + at] = torch.addmv(left[at], done, own[at, :at], alpha=-1).clamp_(min=0)
    return codes


def nnls(
    x: Float[Tensor, "samples width"],
    atoms: Float[Tensor, "atoms width"],
    *,
    method: str = "hals",
    ridge: float = 0.0,
    sparsity: float = 0.0,
    tolerance: float | None = None,
    steps: int = 10_000,
    start: Float[Tensor, "samples atoms"] | None = None,
) -> Float[Tensor, "samples atoms"]:
    """Codes of each row: argmin_{z >= 0} ½‖x - z D‖² + ½ λ‖z‖² + s Σ z.

    With more atoms than numbers in a row the code is not unique (the reconstruction is) unless ``ridge`` is above 0; the
    solver starts at 0 unless told otherwise, so that the answer is at least always the same.

    Args:
        x: rows; atoms: directions, of any sign.
        method: ``"hals"`` or ``"fista"``.
        ridge: λ; sparsity: s.
        tolerance: a row ends when no code moves by more than this times its largest in one pass (FISTA: when the duality gap is below its square
            times ½‖x‖² where atoms are non-negative or ``ridge`` is above 0); by default the rounding of the dtype to the power 2/3.
        steps: passes at most.
        start: codes to begin with, >= 0, where close ones are known (``"hals"``).

    Raises:
        InputError: shapes that do not match, NaN.

    >>> nnls(torch.tensor([[1.0, 2.0], [-1.0, 1.0]]), torch.eye(2)).round(decimals=4).abs().tolist()
    [[1.0, 2.0], [0.0, 1.0]]
    """
    x = checks.tensor("x", x, shape=("samples", "width"), floating=True, empty=True).detach()
    atoms = checks.tensor("atoms", atoms, shape=("atoms", x.shape[1]), floating=True).detach().to(x)
    checks.one_of("method", method, METHODS)
    if is_half(x.dtype):
        found = nnls(x.float(), atoms, method=method, ridge=ridge, sparsity=sparsity, tolerance=tolerance, steps=steps, start=start)  # fmt: skip
        return found.to(x.dtype)
    for name, value in (("ridge", ridge), ("sparsity", sparsity)):
        checks.number(name, value, low=0)
    close = _close(x) if tolerance is None else tolerance
    checks.number("tolerance", close, low=0)
    if start is not None:
        require(
            method == "hals", f"start: got codes for method {method!r}, which begins at 0; expected 'hals'"
        )
        start = checks.tensor("start", start, shape=(len(x), len(atoms)), floating=True, empty=True).to(x)
    parts = [
        _fista(part, atoms, ridge, sparsity, close, steps)
        if method == "fista"
        else _hals(
            part,
            atoms,
            ridge,
            sparsity,
            tolerance,
            steps,
            None if start is None else start[at : at + _ROWS],
        )
        for at, part in zip(range(0, len(x), _ROWS), x.split(_ROWS))
    ]
    return torch.cat(parts) if parts else x.new_zeros(0, len(atoms))


def _hals(
    x: Tensor, atoms: Tensor, ridge: float, sparsity: float, tolerance: float | None, steps: int, start: Tensor | None
) -> Tensor:  # fmt: skip
    gram, products = atoms @ atoms.T, atoms @ x.T - sparsity
    codes = torch.zeros_like(products) if start is None else start.detach().T.clamp(min=0).contiguous()
    close = _close(x) if tolerance is None else tolerance
    rows = torch.arange(len(x), device=x.device)
    open_ = torch.ones_like(rows, dtype=torch.bool)  # rows whose minimum has not been solved for
    few, exact = len(atoms) <= _EXACT, gram
    careful = few and (x.dtype == torch.float64 or _dependent(atoms, ridge))
    if careful and x.dtype != torch.float64:
        # Their Gram matrix has the square of their condition: what is solved for is solved for in float64.
        atoms = atoms.double()
        exact = atoms @ atoms.T
    z, b = codes, products
    # Passes after which a support is good enough to be tried; of many atoms most rows settle before a system would pay.
    small = len(atoms) <= _SMALL
    first, again = (1 if start is None else 0, 4) if small else (63, 64)
    for step in range(steps):
        before = z.clone()
        sweep(z, b, gram, ridge)
        going = (z - before).abs().amax(0) > close * z.abs().amax(0)
        if few:
            now = step % again == first
            tried = ~going if careful and not now else torch.full_like(going, now)
            if bool(tried.any()):
                slopes = atoms @ x[rows[tried]].to(atoms).T - sparsity if exact is not gram else b[:, tried]
                z[:, tried], done = _solved(z[:, tried], slopes, exact, ridge)
                open_[rows[tried]] = ~done
                going[tried] &= ~done
        if bool(going.all()):
            continue
        codes[:, rows[~going]] = z[:, ~going].clone()
        rows, z, b = rows[going], z[:, going].contiguous(), b[:, going].contiguous()
        if not len(rows):
            break
    if z is not codes:
        codes[:, rows] = z
    found = codes.T.contiguous()
    if careful and tolerance is None and bool(open_.any()):
        # These move no longer, or too slowly, and are not at the minimum.
        if x.dtype != torch.float64:
            left = _hals(x[open_].double(), atoms, ridge, sparsity, None, steps, found[open_].double())
        else:
            left = _solved(found[open_].T, products[:, open_], exact, ridge, 8 * len(atoms))[0].T
        found[open_] = left.to(found)
    return found


def _dependent(atoms: Tensor, ridge: float) -> bool:
    """Whether codes in the dtype of the atoms would be off in the fourth digit or before it, by the condition of the Gram matrix."""
    wide = atoms.double()
    values = torch.linalg.eigvalsh(wide @ wide.T) + ridge
    return float(values[0]) <= float(values[-1]) * torch.finfo(atoms.dtype).eps * 2**13


def _close(x: Tensor) -> float:
    return torch.finfo(x.dtype).eps ** (2 / 3)


def _solved(z: Tensor, b: Tensor, gram: Tensor, ridge: float, single: int = 0) -> tuple[Tensor, Tensor]:
    """The columns with the exact minimum where it is found, and where it is: systems on a support that begins with the code's, and lets atoms out and in a few
    times; then one at a time, the last that is wrong, ``single`` times at most, which does not go in circles (Murty 1974).
    """
    most = max(1, _SYSTEMS // len(gram) ** 2)
    if z.shape[1] > most:
        parts = [_solved(c, p, gram, ridge, single) for c, p in zip(z.split(most, 1), b.split(most, 1))]
        return torch.cat([code for code, _ in parts], 1), torch.cat([done for _, done in parts])
    found, done = z.clone(), z.new_zeros(z.shape[1], dtype=torch.bool)
    rows, on, b = torch.arange(len(done), device=z.device), (z > 0).T, b.T.contiguous()
    eps = torch.finfo(gram.dtype).eps
    jitter = 4 * eps * float(gram.diagonal().mean())  # atoms that are nearly alike
    for pivot in range(_PIVOTS + single):
        code, failed = _on_support(on, b, gram, ridge + jitter)
        slope = torch.addmm(b, code, gram, beta=-1)
        slope = slope.add_(code, alpha=ridge) if ridge else slope
        size = b.abs().amax(1, keepdim=True) * 1e3 * eps
        out, into = on & (code < 0), ~on & (slope < -size)
        if pivot >= _PIVOTS:
            wrong = out | into
            alone = wrong & (wrong.flip(1).cumsum(1).flip(1) == 1)
            out, into = out & alone, into & alone
        exact = (failed == 0) & ~(out | into).any(1) & (~on | (slope.abs() <= size)).all(1)
        found[:, rows[exact]] = code[exact].T.to(found)
        done[rows[exact]] = True
        rows, b, on = rows[~exact], b[~exact], ((on & ~out) | into)[~exact]
        if not len(rows):
            break
    return found, done


def _on_support(on: Tensor, b: Tensor, gram: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Each row's code of any sign on its support, 0 elsewhere, and what Cholesky says of its system; the systems are as large as the largest support."""
    size, atoms = max(1, int(on.sum(1).max())), on.shape[1]
    if 4 * size > 3 * atoms:
        there, right = on.to(gram), b
        system = (gram * there[:, :, None]).mul_(there[:, None, :])
        places = None
    else:
        places = on.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :size]
        there, right = on.gather(1, places).to(gram), b.gather(1, places)
        system = gram[places[:, :, None], places[:, None, :]].mul_(there[:, :, None]).mul_(there[:, None, :])
    system.diagonal(dim1=1, dim2=2).add_(torch.where(there > 0, ridge, 1.0))
    factor, failed = torch.linalg.cholesky_ex(system)
    code = torch.cholesky_solve((right * there)[..., None], factor)[..., 0] * there
    return (code if places is None else torch.zeros_like(b).scatter_(1, places, code)), failed


def _fista(x: Tensor, atoms: Tensor, ridge: float, sparsity: float, tolerance: float, steps: int) -> Tensor:
    few = len(atoms) < 2 * atoms.shape[1]
    small = atoms @ atoms.T if few else atoms.T @ atoms
    bound = float(torch.linalg.eigvalsh(small.double())[-1]) + ridge
    if bound <= 0:
        return x.new_zeros(len(x), len(atoms))
    products = x @ atoms.T - sparsity

    def slope(z: Tensor, x: Tensor, b: Tensor) -> Tensor:
        found = z @ small - b if few else (z @ atoms - x) @ atoms.T + sparsity
        return found + ridge * z if ridge else found

    codes = torch.zeros_like(products)
    rows = torch.arange(len(x), device=x.device)
    z, y = codes.clone(), codes.clone()
    t = torch.ones(len(x), 1, dtype=x.dtype, device=x.device)
    for step in range(steps):
        here, b = x[rows], products[rows]
        new = (y - slope(y, here, b) / bound).clamp_(min=0)
        moved = new - z
        # A row that went uphill starts its momentum again (O'Donoghue and Candès 2015).
        t = torch.where(((y - new) * moved).sum(1, keepdim=True) > 0, torch.ones_like(t), t)
        after = (1 + (1 + 4 * t.square()).sqrt()) / 2
        y = new + (t - 1) / after * moved
        z, t = new, after
        if step % 10 != 9:
            continue
        gap = duality_gap(here, atoms, z, ridge=ridge, sparsity=sparsity)
        known = ~gap.isnan()
        going = torch.where(
            known,
            gap > tolerance**2 * here.square().sum(1) / 2,
            moved.abs().amax(1) > tolerance * z.abs().amax(1),
        )
        # The gap of a code at the limit of its rounding falls no further.
        going &= moved.abs().amax(1) > torch.finfo(x.dtype).eps * z.abs().amax(1)
        if bool(going.all()):
            continue
        codes[rows[~going]] = z[~going]
        rows, z, y, t = rows[going], z[going], y[going], t[going]
        if not len(rows):
            return codes
    codes[rows] = z
    return codes


def duality_gap(
    x: Float[Tensor, "samples width"],
    atoms: Float[Tensor, "atoms width"],
    codes: Float[Tensor, "samples atoms"],
    *,
    ridge: float = 0.0,
    sparsity: float = 0.0,
) -> Float[Tensor, " samples"]:
    """How far the objective of each row's code can be above the minimum, at most.

    With a ridge λ: ‖projected gradient‖² / 2λ. Without, for non-negative atoms: the residual minus the least constant that makes D θ <= s
    is feasible in the dual, whose value is ⟨x, θ⟩ - ½‖θ‖². NaN where neither is there.

    >>> duality_gap(torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([[1.0, 2.0]])).tolist()
    [0.0]
    """
    left = x - codes @ atoms
    over = left @ atoms.T - sparsity
    if ridge:
        slope = ridge * codes - over
        projected = torch.where(codes > 0, slope, slope.clamp(max=0))
        return projected.square().sum(1) / (2 * ridge)
    sums = atoms.sum(1)
    if bool((atoms < 0).any()) or bool((sums <= 0).any()):
        return x.new_full((len(x),), torch.nan)
    feasible = left - (over / sums).amax(1, keepdim=True).clamp(min=0)
    primal = left.square().sum(1) / 2 + sparsity * codes.sum(1)
    return (primal - (x * feasible).sum(1) + feasible.square().sum(1) / 2).clamp(min=0)


def residual(
    x: Float[Tensor, "samples width"],
    atoms: Float[Tensor, "atoms width"],
    codes: Float[Tensor, "samples atoms"],
) -> Float[Tensor, " samples"]:
    """‖x - z D‖ of each row.

    >>> residual(torch.tensor([[3.0, 4.0]]), torch.eye(2), torch.zeros(1, 2)).tolist()
    [5.0]
    """
    require(
        codes.shape == (len(x), len(atoms)),
        f"codes: got {checks.show(codes)}, expected ({len(x)}, {len(atoms)})",
    )
    return torch.linalg.vector_norm(x - codes @ atoms, dim=1)
