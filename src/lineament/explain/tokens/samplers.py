"""What a token is replaced by: uniform, a corpus' frequencies, the same part of speech, the model's own guess, another model's, or a function's.

A sampler proposes one token for every position of rows of ids; the method decides which proposals are used. None ever proposes a special token.
Whether a replacement is plausible decides what "important" means: a uniform one asks what happens when the token is noise, a masked language
model's (:mod:`lineament.explain.tokens.infill`) what happens when it says something else.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lineament.core import checks
from lineament.core.files import write_json
from lineament.explain.tokens.next_token import NextToken

_tables: dict[tuple[str, str], list[str]] = {}


class Sampler(Protocol):
    """``joint`` says whether what is proposed depends on which positions are replaced."""

    joint: bool

    def __call__(
        self,
        ids: Int[Tensor, "rows tokens"],
        mask: Bool[Tensor, "rows tokens"] | None,
        generator: torch.Generator,
    ) -> Int[Tensor, "rows tokens"]: ...


class Weighted:
    """Independent draws from one distribution over the vocabulary."""

    joint = False

    def __init__(self, weights: Float[Tensor, "vocabulary"]):
        self.weights = weights
        self.allowed = weights.nonzero()[:, 0]
        checks.require(
            len(self.allowed) > 0, "sampler: no token of the vocabulary can be drawn, expected at least one"
        )
        chances = weights[self.allowed].double()
        # Most often all weights are equal, and then no search is needed.
        self._uniform = bool((chances == chances[0]).all())
        self._cumulated = (chances / chances.sum()).cumsum(0)

    def __call__(self, ids: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        if self._uniform:
            return self.allowed[torch.randint(len(self.allowed), ids.shape, generator=generator)]
        u = torch.rand(ids.shape, generator=generator, dtype=torch.float64)
        return self.allowed[torch.searchsorted(self._cumulated, u).clamp_max(len(self.allowed) - 1)]


def uniform(face: NextToken, vocabulary: int) -> Weighted:
    """Every token of the vocabulary alike, without special ones.

    Ids that the model scores but the tokenizer does not have (embeddings are padded to round sizes) are left out.
    """
    return Weighted(_ordinary(face.tokenizer, vocabulary, face.special).double())


class UnigramSampler(Weighted):
    """Tokens as often as a corpus has them.

    Args:
        tokenizer: the explained model's.
        texts: the corpus; a list of texts, or of lists of ids.

    Raises:
        InputError: no text, or nothing but special tokens in it.

    >>> sampler = UnigramSampler(None, [[1, 1, 1, 2]])
    >>> sampler.weights.tolist()
    [0.0, 3.0, 1.0]
    """

    def __init__(self, tokenizer: Any, texts: Iterable[Any]):
        counts: dict[int, int] = {}
        special = set(getattr(tokenizer, "all_special_ids", None) or ())
        for text in [texts] if isinstance(texts, str) else texts:
            found: Any = text
            if isinstance(text, str):
                checks.require(tokenizer is not None, "texts: got text and no tokenizer; give ids")
                found = tokenizer(text, add_special_tokens=False)["input_ids"]
            for i in found:
                counts[int(i)] = counts.get(int(i), 0) + 1
        ordinary = {i: n for i, n in counts.items() if i not in special}
        checks.require(bool(ordinary), "texts: got no token that is not special, expected a corpus")
        weights = torch.zeros(max(ordinary) + 1)
        weights[list(ordinary)] = torch.tensor([float(n) for n in ordinary.values()])
        super().__init__(weights)


class PosSampler:
    """Tokens of the same part of speech, as every result the authors published.

    A vocabulary entry has the tag of its decoded text, alone. The table is made once and kept for each tokenizer and tagger.

    Args:
        tokenizer: the explained model's.
        tag: from a list of words to their tags; ``None`` takes NLTK's perceptron tagger.
        cache: a folder in which the table is kept between processes.

    Raises:
        InputError: ``tag=None`` and NLTK or its tagger's data are not installed; another number of tags than words.

    >>> class Tokenizer:
    ...     all_special_ids, name_or_path = [0], "toy"
    ...     def __len__(self): return 5
    ...     def get_vocab(self): return {str(i): i for i in range(5)}
    ...     def decode(self, ids): return ["<s>", "cat", "dog", "runs", "sits"][ids[0]]
    >>> sampler = PosSampler(Tokenizer(), tag=lambda words: ["verb" if w.endswith("s") else "noun" for w in words])
    >>> drawn = sampler(torch.tensor([[1, 3]] * 50), None, torch.Generator().manual_seed(0))
    >>> sorted(set(drawn[:, 0].tolist())), sorted(set(drawn[:, 1].tolist()))
    ([1, 2], [3, 4])
    """

    joint = False

    def __init__(
        self,
        tokenizer: Any,
        tag: Callable[[list[str]], Sequence[str]] | None = None,
        *,
        cache: str | Path | None = None,
    ):
        checks.require(tokenizer is not None, "PosSampler: got no tokenizer; it tags the tokenizer's words")
        size = len(tokenizer)
        tags = _tags(tokenizer, _nltk_tags if tag is None else tag, cache)
        ordinary = _ordinary(tokenizer, size, frozenset())
        names = sorted(set(tags))
        self._class = torch.tensor([names.index(t) for t in tags])
        members = [(self._class.eq(c) & ordinary).nonzero()[:, 0] for c in range(len(names))]
        self._members = torch.cat(members)
        self._sizes = torch.tensor([len(m) for m in members])
        self._starts = self._sizes.cumsum(0) - self._sizes
        self.tags = tuple(tags)

    def __call__(self, ids: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        if int(ids.max()) >= len(self._class):
            raise checks.InputError(
                f"sampler: got id {int(ids.max())}, expected ids from 0 to {len(self._class) - 1}; was PosSampler made with this model's tokenizer?"
            )
        kind = self._class[ids]
        u = torch.rand(ids.shape, generator=generator, dtype=torch.float64)
        sizes = self._sizes[kind]
        # A class of special tokens only has nothing to offer; such a position keeps its token.
        at = (self._starts[kind] + (u * sizes).long()).clamp_max(len(self._members) - 1)
        return torch.where(sizes > 0, self._members[at], ids)


class InferentialSampler:
    """Position t gets the model's own most probable token after the tokens before t; the first keeps its token.

    Nothing is drawn, and what is proposed depends on the prompt alone, so that it is computed once a prompt.
    """

    joint = False

    def __init__(self, model: Any, tokenizer: Any = None):
        self.face = NextToken.of(model, tokenizer)
        self._made: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, ids: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        key = tuple(ids[0].tolist())
        if key not in self._made:
            self._made[key] = self._guesses(ids[0])
        return self._made[key].expand(len(ids), -1)

    def _guesses(self, ids: Tensor) -> Tensor:
        checks.require(
            not self.face.encoder_decoder,
            "sampler 'inferential': it is for causal models; choose another for an encoder-decoder",
        )
        banned = torch.tensor(sorted(self.face.special), dtype=torch.long)

        def then(scores: Tensor, index: Tensor) -> Tensor:
            scores = scores.clone()
            scores[:, banned[banned < scores.shape[1]].to(scores.device)] = -torch.inf
            return scores.argmax(1)

        # Rows of every length: what a cache of the prompt's start would hold is not asked for here.
        face = NextToken(self.face.model, self.face.tokenizer)
        with face.ready():
            rest = face.logits([ids[None, :t] for t in range(1, len(ids))], then=then).cpu()
        return torch.cat([ids[:1], rest])


class _Function:
    """A user's function, called with the names it has of ``ids``, ``mask`` and ``generator``."""

    def __init__(self, function: Callable[..., Any]):
        names = inspect.signature(function).parameters
        self.function, self.joint = function, "mask" in names
        self._extra = [name for name in ("mask", "generator") if name in names]

    def __call__(self, ids: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        given = {"mask": mask, "generator": generator}
        found = self.function(ids.clone(), **{name: given[name] for name in self._extra})
        good = isinstance(found, Tensor) and found.shape == ids.shape and not found.is_floating_point()
        checks.require(
            good,
            f"sampler: the function returned {checks.show(found)}, expected integer ids of shape {tuple(ids.shape)}",
        )
        return found.long().cpu()


def sampler_for(sampler: Any, face: NextToken, vocabulary: int) -> Sampler:
    """A sampler from its name, itself, or a function.

    Raises:
        InputError: an unknown name, or one that has to be made with what it needs.
    """
    if sampler == "uniform":
        return uniform(face, vocabulary)
    if sampler == "inferential":
        return InferentialSampler(face)
    if sampler == "pos":
        return PosSampler(face.tokenizer)
    made = {"unigram": "UnigramSampler(tokenizer, texts)", "mlm": "MlmSampler(mlm, mlm_tokenizer, tokenizer)", "inferential-m": "OtherModelSampler(other, other_tokenizer, tokenizer)"}  # fmt: skip
    if isinstance(sampler, str):
        checks.require(
            sampler not in made, f"sampler: {sampler!r} needs more than its name; give {made.get(sampler)}"
        )
        checks.one_of("sampler", sampler, ("uniform", "inferential", "pos", *made))
    checks.require(
        callable(sampler),
        f"sampler: got {checks.show(sampler)}, expected a name, a sampler or a function of ids",
    )
    made_one: Any = sampler
    return made_one if isinstance(getattr(made_one, "joint", None), bool) else _Function(made_one)


def _ordinary(tokenizer: Any, vocabulary: int, special: frozenset[int]) -> Tensor:
    """Which ids may be proposed: those the tokenizer knows, without special ones."""
    allowed = torch.ones(vocabulary, dtype=torch.bool)
    if tokenizer is not None:
        allowed[len(tokenizer) :] = False
        special = special | set(getattr(tokenizer, "all_special_ids", None) or ())
    allowed[[i for i in special if 0 <= i < vocabulary]] = False
    return allowed


def _tags(tokenizer: Any, tag: Callable[[list[str]], Sequence[str]], cache: str | Path | None) -> list[str]:
    """One tag for each vocabulary entry, from the process's table, the folder's, or the tagger."""
    vocab = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]))
    name = str(getattr(tokenizer, "name_or_path", ""))
    tagger = f"{getattr(tag, '__module__', '')}.{getattr(tag, '__qualname__', repr(tag))}"
    key = (hashlib.sha256(f"{name}\n{vocab}".encode()).hexdigest(), tagger)
    # Two functions of one name are two taggers.
    kept = "<lambda>" not in tagger and "<locals>" not in tagger
    if kept and key in _tables:
        return _tables[key]
    path = (
        None
        if cache is None
        else Path(cache) / f"pos-{hashlib.sha256(''.join(key).encode()).hexdigest()[:16]}.json"
    )
    if path is not None and path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise checks.InputError(
                f"cache: {str(path)!r} is no table of tags ({error}); remove it"
            ) from error
    else:
        words = [tokenizer.decode([i]).strip() for i in range(len(tokenizer))]
        found = [str(t) for t in tag(words)]
    checks.require(
        isinstance(found, list) and len(found) == len(tokenizer),
        f"tag: got {len(found)} tags for {len(tokenizer)} words, expected one each",
    )
    if kept:
        _tables[key] = found
    if path is not None and not path.is_file():
        write_json(path, found)
    return found


def _nltk_tags(words: list[str]) -> list[str]:
    """The perceptron tagger's tag of each word alone."""
    checks.require(
        importlib.util.find_spec("nltk") is not None,
        "sampler 'pos': NLTK is not installed; pip install nltk and nltk.download('averaged_perceptron_tagger_eng'), or give "
        "PosSampler(tokenizer, tag=function)",
    )
    nltk: Any = importlib.import_module("nltk")
    try:
        return [tag for sentence in nltk.pos_tag_sents([[w or " "] for w in words]) for _, tag in sentence]
    except LookupError as error:
        raise checks.InputError(
            "sampler 'pos': NLTK is installed without its tagger's data; run nltk.download('averaged_perceptron_tagger_eng') where "
            "there is a network, or give PosSampler(tokenizer, tag=function)"
        ) from error
