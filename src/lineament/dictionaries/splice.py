"""A model that goes on from what a dictionary keeps of an activation, or with its features changed and the dictionary's error left where it was.

An activation is x = x' + e, the reconstruction and the error. Without e one measures what the dictionary keeps; with e every other computation is as
before, so that what changes comes from the features alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, require, show, suggest
from lineament.core.codes import Codes
from lineament.core.models import unwrapped
from lineament.core.sites.hooks import replace
from lineament.core.sites.naming import Site, resolve

Change = Callable[[Codes], Codes]


@contextmanager
def splice(
    model: nn.Module,
    dictionaries: Any,
    *,
    change: Change | None = None,
    keep_error: bool = False,
    where: Tensor | None = None,
) -> Iterator[None]:
    """Let the reconstruction of what passes go on in its place, while the block runs.

    Gradients flow through the dictionaries.

    Args:
        dictionaries: a dictionary with a ``site``, several, or {site: dictionary}.
        change: a function of the :class:`~lineament.core.codes.Codes` at a site that returns those to decode.
        keep_error: x + (decode(change(f)) - decode(f)) goes on, so that the dictionary's error stays.
        where: a mask (batch, positions), or of whatever shape the site has beside its features; elsewhere x goes on.

    Raises:
        InputError: an unknown site, none, or a dictionary of another width than the site.

    >>> from lineament.dictionaries import ReLU
    >>> sae = ReLU(2, 2, site="0")
    >>> with torch.no_grad():
    ...     _ = sae.W_enc.copy_(torch.eye(2)); _ = sae.W_dec.copy_(torch.eye(2))
    >>> net = nn.Sequential(nn.Identity(), nn.Identity())
    >>> with torch.no_grad(), splice(net, sae):
    ...     net(torch.tensor([[3.0, -1.0]])).tolist()
    [[3.0, 0.0]]
    >>> with torch.no_grad(), splice(net, sae, keep_error=True, change=lambda f: f):
    ...     net(torch.tensor([[3.0, -1.0]])).tolist()
    [[3.0, -1.0]]
    """
    places = [(site_in(model, each, name), each) for name, each in _named(dictionaries)]

    def function(site: Site, dictionary: Any) -> Callable[[Tensor], Tensor]:
        def see(value: Tensor) -> Tensor:
            x = features_last(value, site)
            return features_back(_replaced(dictionary, x, change, keep_error, where), value, site)

        return see

    with ExitStack() as stack:
        for site, dictionary in places:
            stack.enter_context(replace(model, {site: function(site, dictionary)}))
        yield


def _replaced(
    dictionary: Any, x: Tensor, change: Change | None, keep_error: bool, where: Tensor | None
) -> Tensor:
    if keep_error and change is None:
        return x
    codes = dictionary.codes(x)
    new = codes if change is None else change(codes)
    if keep_error:
        out = x + (dictionary.decode(new) - dictionary.decode(codes)).to(x.dtype)
    else:
        out = dictionary.decode(new).to(x.dtype)
    if where is None:
        return out
    require(
        where.shape == x.shape[:-1],
        f"where: got {show(where)}, expected the site's shape without its features, {tuple(x.shape[:-1])}",
    )
    return torch.where(where.to(x.device)[..., None].bool(), out, x)


def site_in(model: nn.Module, dictionary: Any, site: str | None = None) -> Site:
    """Where a dictionary sits in a model. A name without the model's own prefix ("layers.3" for "model.layers.3") is found too.

    Raises:
        InputError: no site, an unknown one, or one that names several places.

    >>> class Inner:
    ...     site = "1"
    >>> site_in(nn.ModuleDict({"model": nn.Sequential(nn.ReLU(), nn.ReLU())}), Inner()).name
    'model.1'
    """
    name = site if site is not None else getattr(dictionary, "site", None)
    if name is None:
        raise InputError(
            f"site: the dictionary ({type(dictionary).__name__}) does not say where it sits; expected dictionary.site = 'layers.3', say"
        )
    plain, colon, side = name.partition(":")
    known = dict(unwrapped(model).named_modules())
    if plain and plain not in known:
        ends = [each for each in known if each.endswith(f".{plain}")]
        name = f"{ends[0]}{colon}{side}" if len(ends) == 1 else name
    found = resolve(model, name)
    if len(found) != 1:
        raise InputError(f"site: {name!r} names {len(found)} places, expected one{suggest(name, found)}")
    return next(iter(found.values()))


def features_last(value: Tensor, site: Site) -> Tensor:
    """What passes at a site as (..., features): of a convolution's maps a row for each position, of heads all their values side by side."""
    if site.view is not None:
        return value if site.view.only is not None else value.flatten(-2)
    return value.movedim(1, -1) if value.ndim >= 4 else value


def features_back(x: Tensor, like: Tensor, site: Site) -> Tensor:
    """What :func:`features_last` made, in the form in which it passed."""
    if site.view is not None:
        return x.reshape(like.shape)
    return x.movedim(-1, 1) if like.ndim >= 4 else x


def _named(dictionaries: Any) -> list[tuple[str | None, Any]]:
    if isinstance(dictionaries, Mapping):
        return list(dictionaries.items())
    several = isinstance(dictionaries, (list, tuple))
    return [(None, each) for each in (dictionaries if several else [dictionaries])]
