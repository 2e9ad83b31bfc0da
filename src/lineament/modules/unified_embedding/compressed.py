"""The older ways to make tables small as one module: a store for each feature, or the same scheme in one shared store.

Coleman et al., "Unified Embedding", NeurIPS 2023, arXiv 2305.12102, compare feature multiplexing with these, and each of these with its multiplexed form. What a scheme
computes is in :mod:`baselines`; here are the stores, the hashes, and who gets how many rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, number, one_of, require, show, suggest
from lineament.core.checks import seed as checked_seed
from lineament.modules.unified_embedding import baselines
from lineament.modules.unified_embedding.hashing import fingerprint, hashed_rows, mixed_salt, signed

Scheme = Literal[
    "collisionless", "hash", "concat", "sum", "mean", "signed", "hash-embeddings", "hashed-net", "robe", "quotient-remainder", "mixed-dimension"
]  # fmt: skip
SCHEMES = (
    "collisionless", "hash", "concat", "sum", "mean", "signed", "hash-embeddings", "hashed-net", "robe", "quotient-remainder", "mixed-dimension"
)  # fmt: skip
# Schemes that number the values instead of hashing them.
_NUMBERED = ("collisionless", "quotient-remainder", "mixed-dimension")


def split_rows(
    values: Mapping[str, int],
    rows: int,
    split: Literal["proportional", "equal"] | Mapping[str, int] | Sequence[int] = "proportional",
) -> dict[str, int]:
    """Rows of each feature's own table out of ``rows``: by its number of values, as many for each, or as given.

    Every feature has one row at least, and all rows are given out; what division leaves goes to the largest remainders.

    Args:
        values: {feature: its number of values}.
        split: or {feature: rows}, or a list of rows in the features' order, whose sum must be ``rows``.

    Raises:
        InputError: fewer rows than features, a given split that names other features or has another sum.

    >>> split_rows({"user": 900, "film": 90, "age": 10}, 100)
    {'user': 88, 'film': 10, 'age': 2}
    >>> split_rows({"user": 900, "film": 90, "age": 10}, 100, [60, 30, 10])
    {'user': 60, 'film': 30, 'age': 10}
    """
    require(len(values) > 0, "values: got no feature, expected at least one")
    for name, count in values.items():
        number(f"values[{name!r}]", count, low=1, integer=True)
    number("rows", rows, low=len(values), integer=True)
    if not isinstance(split, str):
        given = dict(split) if isinstance(split, Mapping) else dict(zip(values, split))
        wanted, got = list(values), list(split)
        require(
            set(given) == set(wanted) and len(got) == len(wanted),
            f"split: got rows of {len(got)} features ({', '.join(map(str, got[:4]))}), expected one number for each of {', '.join(wanted[:4])}",
        )
        for name, count in given.items():
            number(f"split[{name!r}]", count, low=1, integer=True)
        total = sum(given.values())
        require(total == rows, f"split: its rows make {total}, expected {rows}")
        return {name: given[name] for name in values}
    one_of("split", split, ("proportional", "equal"))
    spare = rows - len(values)
    whole = sum(values.values()) if split == "proportional" else len(values)
    exact = {name: spare * (n if split == "proportional" else 1) / whole for name, n in values.items()}
    found = {name: 1 + int(share) for name, share in exact.items()}
    left = rows - sum(found.values())
    for name in sorted(exact, key=lambda name: int(exact[name]) - exact[name])[:left]:
        found[name] += 1
    return found


class CompressedEmbedding(nn.Module):
    """Embeddings of several features by an older scheme, in as many numbers as ``rows`` rows of ``width``.

    ``{feature: ids [batch]} -> [batch, features * width]``, in the order of ``values``. Shared stores hash with each feature's salt, so that "hash" in one store is
    :class:`~lineament.modules.UnifiedEmbedding` with one look-up, and "concat" with several sub-tables.

    Args:
        values: {feature: its number of values}; schemes that number values take ids from 0 up to it, the others any.
        rows: of all features together; "collisionless" takes none, and has a row for every value.
        width: of each feature's embedding.
        scheme: "hash" (one row), "concat", "sum", "mean", "signed" (``lookups`` rows joined or combined), "hash-embeddings" (weights of each value and look-up in an importance table
            beside the rows, one row of it a value), "hashed-net" (every coordinate its own hashed entry, signed), "robe" (``lookups`` blocks of consecutive entries of an array),
            "quotient-remainder" (two tables, multiplied), "mixed-dimension" (a row for every value, as narrow as the budget asks for, and a projection).
        shared: one store for all features in place of one each.
        split: of the rows among stores, see :func:`split_rows`.
        lookups: rows or blocks of a value, which divide the width for "concat" and "robe".
        seed: of the hashes and weights.

    Raises:
        InputError: an unknown scheme, rows that are too few for it, ids that are not whole or out of range.

    >>> layer = CompressedEmbedding({"user": 900, "film": 90}, 100, 16, scheme="robe", shared=True)
    >>> layer({"user": torch.tensor([7, 899]), "film": torch.tensor([3, 3])}).shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([2, 32]), 1600)
    """

    def __init__(
        self,
        values: Mapping[str, int],
        rows: int | None,
        width: int,
        *,
        scheme: Scheme = "hash",
        shared: bool = False,
        split: Literal["proportional", "equal"] | Mapping[str, int] | Sequence[int] = "proportional",
        lookups: int = 2,
        seed: int = 0,
    ):
        super().__init__()
        self.values, self.width, self.shared = (
            dict(values),
            number("width", width, low=1, integer=True),
            shared,
        )
        self.scheme: str = one_of("scheme", scheme, SCHEMES)
        self.lookups, self.seed = number("lookups", lookups, low=1, integer=True), checked_seed("seed", seed)
        require(
            scheme not in ("concat", "robe") or width % lookups == 0,
            f"lookups: got {lookups}, expected a divisor of the width {width} for {scheme}",
        )
        if scheme == "collisionless":
            require(rows is None, f"rows: got {rows}, expected None: a row for every value has no collisions")
            own = {name: number(f"values[{name!r}]", n, low=1, integer=True) for name, n in values.items()}
        elif rows is None:
            raise InputError(f"rows: got None, expected how many {scheme} has")
        else:
            own = split_rows(values, rows, split)
        self.rows = {"": sum(own.values())} if shared else own
        counts = {"": sum(self.values.values())} if shared else self.values
        starts = torch.tensor([0, *list(self.values.values())[:-1]]).cumsum(0).tolist()
        # Shared stores that number values number those of one feature behind those of another.
        self.starts = dict(zip(self.values, starts)) if shared else dict.fromkeys(self.values, 0)
        generator = torch.Generator().manual_seed(self.seed)
        self.stores = nn.ModuleList()
        for name, count in self.rows.items():
            store = nn.ParameterDict()
            for key, size in self._sizes(name or "all features", counts[name], count).items():
                fresh = torch.empty(size).uniform_(-0.05, 0.05, generator=generator)
                if key in ("importance", "quotients", "projection"):
                    # Factors: weights of one, and a projection that keeps lengths.
                    fresh = torch.ones(size) + fresh if key != "projection" else fresh * 20 / size[1] ** 0.5
                store[key] = nn.Parameter(fresh)
            self.stores.append(store)
        self._place = dict.fromkeys(self.values, 0) if shared else {n: k for k, n in enumerate(self.values)}
        self._salts = {
            name: [
                signed(mixed_salt(mixed_salt(mixed_salt(mixed_salt(self.seed) ^ named) ^ j)))
                for j in range(2 * max(width, self.lookups))
            ]
            for name in self.values
            for named in (int(fingerprint([name])[0]) & ((1 << 64) - 1),)
        }

    def _sizes(self, name: str, count: int, rows: int) -> dict[str, tuple[int, ...]]:
        """The tensors of a store of ``count`` values in so many rows."""
        d, k = self.width, self.lookups
        if self.scheme in ("collisionless", "hash", "sum", "mean", "signed"):
            return {"table": (rows, d)}
        if self.scheme == "concat":
            return {"table": (k, rows, d // k)}
        if self.scheme == "hash-embeddings":
            return {"table": (rows, d), "importance": (count, k)}
        if self.scheme in ("hashed-net", "robe"):
            return {"array": (rows * d,)}
        if self.scheme == "quotient-remainder":
            c = next((c for c in range(rows, 0, -1) if c + -(-count // c) <= rows), 0)
            require(
                c > 0,
                f"rows: {rows} for {count} values of {name} are too few for quotients and remainders, which take about {2 * count**0.5:.0f}",
            )
            return {"quotients": (-(-count // c), d), "remainders": (c, d)}
        small = min(d, rows * d // (count + d))
        require(
            small > 0,
            f"rows: {rows} for {count} values of {name} leave no number for each; mixed-dimension takes {-(-(count + d) // d)} or more",
        )
        return {"table": (count, small), "projection": (d, small)}

    def _hashed(self, name: str, ids: Tensor, count: int, rows: int, *, start: int = 0) -> Tensor:
        """[n, count] places among so many, each by a hash of its own."""
        salts = torch.tensor(self._salts[name][start : start + count], device=ids.device)
        return hashed_rows(ids[:, None].expand(-1, count).contiguous(), salts, rows)

    def embedded(self, name: str, ids: Tensor) -> Tensor:
        """A feature's embeddings [batch, width] of ids [batch]."""
        require(name in self.values, f"inputs: there is no feature {name!r}{suggest(name, self.values)}")
        require(
            ids.ndim == 1 and not ids.is_floating_point() and ids.dtype != torch.bool,
            f"inputs: got {show(ids)} for {name!r}, expected whole ids [batch]",
        )
        # By its key: a ParameterDict has methods of its own, values() among them.
        store: Any = self.stores[self._place[name]]
        ids, k, d = ids.long(), self.lookups, self.width
        if self.scheme in _NUMBERED:
            low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
            require(
                low >= 0 and high < self.values[name],
                f"inputs: ids of {name!r} reach from {low} to {high}, expected 0 to {self.values[name] - 1}: {self.scheme} numbers its values",
            )
            ids = ids + self.starts[name]
        if self.scheme == "collisionless":
            return store["table"][ids]
        if self.scheme == "quotient-remainder":
            return baselines.quotient_remainder(store["quotients"], store["remainders"], ids)
        if self.scheme == "mixed-dimension":
            return baselines.mixed_dimension(store["table"], ids, store["projection"])
        if self.scheme == "hashed-net":
            at = self._hashed(name, ids, d, len(store["array"]))
            signs = 2 * self._hashed(name, ids, d, 2, start=d).to(store["array"].dtype) - 1
            return baselines.hashed_net(store["array"], at, signs)
        if self.scheme == "robe":
            return baselines.robe(store["array"], self._hashed(name, ids, k, len(store["array"])), d // k)
        rows = self._hashed(name, ids, 1 if self.scheme == "hash" else k, store["table"].shape[-2])
        if self.scheme == "hash-embeddings":
            own = self._hashed(name, ids, 1, len(store["importance"]), start=k)[:, 0]
            return baselines.hash_embeddings(store["table"], rows, store["importance"][own])
        signs = 2 * self._hashed(name, ids, k, 2, start=k).to(store["table"].dtype) - 1 if self.scheme == "signed" else None  # fmt: skip
        how: Any = {"hash": "concat", "signed": "sum"}.get(self.scheme, self.scheme)
        return baselines.multi_hash(store["table"], rows, how, signs)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        missing = next((name for name in self.values if name not in inputs), None)
        require(missing is None, f"inputs: feature {missing!r} is missing")
        other = next((name for name in inputs if name not in self.values), None)
        require(other is None, f"inputs: there is no feature {other!r}{suggest(other or '', self.values)}")
        return torch.cat([self.embedded(name, inputs[name]) for name in self.values], 1)
