"""Complexity of a model's features over data: one pass over the training samples, one over the held-out ones.

Fel et al. (NeurIPS 2024, arXiv 2407.06076). The read-outs are those of :mod:`lineament.measure.complexity.vinformation`; what a feature and a row
are, :mod:`lineament.measure.complexity.features` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lineament.core.checks import require
from lineament.measure.complexity.features import Features, Reading
from lineament.measure.complexity.readouts import ReadoutMoments
from lineament.measure.complexity.vinformation import Complexity, Residuals, kinds


def complexity(
    model: nn.Module,
    loader: Any,
    features: Features,
    *,
    sites: str | Iterable[str] | None = None,
    ridge: float | Sequence[float] = 1e-3,
    scale: bool = True,
    pool: int | str = 1,
    variance: str = "fixed",
    form: str = "ratio",
    rows: str | None = None,
    heldout: Any = 0.2,
    seed: int = 0,
) -> Complexity:
    """How hard each feature is to read linearly from each site, averaged over depth: K = 1 - mean over sites of I_V.

    Samples go to the held-out split at random (``seed``); all rows of a sample stay together. Activations are not kept, so that memory is
    free of the number of samples. Labels and features of thousands of columns cost one product a site.

    Args:
        model: any module; it is left as it was.
        loader: (inputs, targets), a Dataset, a DataLoader (read in order), a list of batches, or a path.
        features: a dictionary (read at its ``site``), a site whose units are the features, ``"labels"``, an array (samples x features) in the
            order of the data, or a function of the inputs.
        sites: where to read, in depth order, globs allowed; by default up to eight blocks and the input of the head.
        ridge: penalty of the read-outs; of several the result is that of the first, and ``others`` holds the rest, from one decomposition a site.
        scale: standardise activations, so that the penalty is relative to 1.
        pool: maps are averaged to ``pool`` x ``pool``, texts to ``pool`` parts, ``"full"`` keeps all positions.
        variance, form: see :func:`~lineament.measure.complexity.vinformation.vinformation`.
        rows: what one row is: ``"samples"`` (activations averaged over positions, then encoded), ``"max"`` (encoded at each position, then
            the maximum), ``"positions"`` (each position or token); by default positions for models that read tokens, else samples. Averaging
            hides local features: read both.
        heldout: the fraction of samples that the read-outs are judged on, or other data for that.
        seed: of the split.

    Returns:
        :class:`~lineament.measure.complexity.vinformation.Complexity`.

    Raises:
        InputError: unknown sites, NaN (which rows), as many activations as samples without a ridge, an array of other length.

    >>> import torch
    >>> x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> found = complexity(net, (x, torch.zeros(400)), x[:, :1], sites=["0:in", "0"])
    >>> bool(found.complexity < 0.01), found.samples
    (True, (324, 76))
    """
    kinds(variance, form)
    reading = Reading(model, loader, features, sites=sites, pool=pool, rows=rows, heldout=heldout, seed=seed)
    moments = ReadoutMoments()
    for look in reading.walk("train"):
        moments.update(look.activations, look.z)
    require(moments.count > 0, "loader: got no samples to fit the read-outs on, expected some")
    residuals = Residuals(moments.readouts(ridge, scale=scale))
    for look in reading.walk("heldout"):
        residuals.update(look.activations, look.z, look.samples)
    require(
        residuals.count > 0,
        f"heldout: none of the samples are held out ({moments.count} rows in all); pass more data, or a larger fraction",
    )
    found = residuals.compute(variance=variance, form=form)
    found = [replace(each, rows=reading.rows, pool=reading.pool) for each in found]
    return replace(found[0], others=tuple(found[1:]))
