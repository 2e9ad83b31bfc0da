"""Whom or what does a rebuilt picture show? It is looked for among other pictures, by features in which people or classes differ.

Features are Fisherfaces (Belhumeur, Hespanha, Kriegman 1997): principal components of the public pictures, and linear discriminants of their groups; or an encoder of one's
own. A picture is *identified* where its guess is nearest to it among all pictures, and its person where the nearest *other* picture is of the same group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lineament.core.checks import one_of, require, show
from lineament.core.results import Readable

Encoder = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Judge:
    """How guesses are judged beside their pixels.

    Attributes:
        order: which guess of a batch is whose: ``"mse"``, the assignment of least squared error, or ``"labels"``, as published: both sorted by their labels, true
            ones and those of the search.
        encoder: pictures as the model takes them to features [n, d]; by default those of the public pictures.
        groups: of the audited pictures [n], for instance the person; public_groups: of the public ones.
        gallery: other pictures of the same groups, with theirs; no prior may know them.

    >>> Judge().order
    'mse'
    """

    order: str = "mse"
    encoder: Encoder | None = None
    groups: Tensor | None = None
    public_groups: Tensor | None = None
    gallery: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        one_of("order", self.order, ("mse", "labels"))
        require(
            self.gallery is None or self.groups is not None,
            "gallery: got pictures to find people among, expected groups of the audited pictures, too",
        )


@dataclass(frozen=True)
class Identified(Readable):
    """Ranks of the right answer for each guess, 1 the best: ``picture`` among ``field`` pictures; ``person``: of the nearest other picture of the same group among
    ``gallery``, where ``chance`` of them are of it on average; None without groups. ``control``: the person's ranks for guesses from another message."""

    picture: Tensor
    field: int
    person: Tensor | None = None
    gallery: int = 0
    chance: float = 0.0
    control: Tensor | None = None

    @property
    def rank1(self) -> float:
        """Share of guesses whose picture comes first."""
        return float((self.picture == 1).double().mean())

    @property
    def reciprocal_rank(self) -> float:
        """Mean of 1 / rank of the picture."""
        return float((1 / self.picture).mean())

    @property
    def person_rank1(self) -> float | None:
        """Share of guesses whose nearest other picture is of the same person."""
        return None if self.person is None else float((self.person == 1).double().mean())

    @property
    def person_reciprocal_rank(self) -> float | None:
        """Mean of 1 / rank of the person."""
        return None if self.person is None else float((1 / self.person).mean())


def fisher_features(public: Tensor, groups: Tensor | None = None, *, variance: float = 0.95) -> Encoder:
    """Features of pictures, learned of public ones: the discriminants of their groups in the principal components, or without groups the components with ``variance`` of all.

    >>> x = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    >>> fisher_features(x, torch.arange(20) % 4)(x[:3]).shape
    torch.Size([3, 3])
    """
    from sklearn.decomposition import PCA
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.pipeline import make_pipeline

    rows = public.flatten(1).double().cpu().numpy()
    of = np.zeros(len(rows), int) if groups is None else groups.cpu().numpy()
    _, place, counts = np.unique(of, return_inverse=True, return_counts=True)
    several = counts[place] > 1  # one picture alone says nothing of the scatter within its group
    people = int((counts > 1).sum())
    if people < 2:
        found = make_pipeline(PCA(variance, svd_solver="full")).fit(rows)
    else:  # as many components as leave the scatter within groups of full rank
        components = PCA(max(1, min(int(several.sum()) - people, rows.shape[1])), svd_solver="full")
        discriminants = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto")
        found = make_pipeline(components, discriminants).fit(rows[several], of[several])

    def features(x: Tensor) -> Tensor:
        told = found.transform(x.flatten(1).double().cpu().numpy())
        return torch.from_numpy(np.ascontiguousarray(told)).to(x)

    return features


def identified(
    guesses: Tensor, truth: Tensor, public: Tensor, judge: Judge, *, control: Tensor | None = None
) -> Identified:
    """Ranks of guesses [n, ...] of the pictures ``truth`` [n, ...]; all normalised alike.

    Args:
        public: further pictures among which the true one is looked for. control: guesses from other messages, for the person.

    Raises:
        InputError: not as many groups as pictures; a person without another picture.

    >>> x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    >>> identified(x[:2], x[:2], x[2:], Judge()).picture.tolist()
    [1, 1]
    """
    for name, groups, pictures in (("groups", judge.groups, truth), ("public_groups", judge.public_groups, public)):  # fmt: skip
        require(
            groups is None or groups.shape == (len(pictures),),
            f"{name}: got {show(groups)}, expected one for each of {len(pictures)} pictures",
        )
    encoder = judge.encoder or fisher_features(public, judge.public_groups)
    with torch.no_grad():
        asked, own, others = (encoder(x).flatten(1) for x in (guesses, truth, public))
        far = torch.cdist(asked, torch.cat([own, others]))
        at = torch.arange(len(truth), device=far.device)
        picture = (far < far[at, at][:, None]).sum(1) + 1
        if judge.groups is None or judge.gallery is None:
            return Identified(picture, far.shape[1])
        shown, of = judge.gallery
        same = of.to(judge.groups)[None] == judge.groups[:, None]
        require(
            bool(same.any(1).all()),
            f"gallery: it has no picture of the groups {judge.groups[~same.any(1)].unique().tolist()[:5]}; expected another one of each",
        )
        known = encoder(shown).flatten(1)

        def ranks(features: Tensor) -> Tensor:
            away = torch.cdist(features, known)
            nearest = torch.where(same.to(away.device), away, torch.inf).amin(1)
            return (away < nearest[:, None]).sum(1) + 1

        return Identified(
            picture, far.shape[1], ranks(asked), len(shown), float(same.double().mean()),
            None if control is None else ranks(encoder(control).flatten(1)),
        )  # fmt: skip
