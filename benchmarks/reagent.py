"""ReAGent beside inseq's, at equal numbers of model evaluations, and beside the bare forwards it cannot do without.

The model is a GPT-2 with random weights. inseq replaces tokens by others of the same part of speech, which needs a tagger's data; here its table
holds one class, so that both sides draw uniformly. The target is an improbable token, so that no probe stops and both sides do all steps: each
asks for 2 x steps x probes sequences.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lineament.bench import Row, compare, quick
from lineament.explain.tokens.continuations import explain_continuation
from lineament.explain.tokens.options import ReagentOptions
from lineament.explain.tokens.recursion import reagent

SLUG = "reagent"
# The paper's prompts have 43 tokens on average.
WORDS, TOKENS = 50257, 43
PROBES, STEPS = (4, 4) if quick() else (16, 8)


def network(layers: int = 4, width: int = 256) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=WORDS, n_layer=layers, n_embd=width, n_head=width // 64, bos_token_id=WORDS - 1, eos_token_id=WORDS - 1
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def words() -> Any:
    """A tokenizer of as many words as GPT-2 has tokens, made here because none can be downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    kind = Tokenizer(
        models.WordLevel({**{f"w{i}": i for i in range(WORDS - 1)}, end: WORDS - 1}, unk_token=end)
    )
    kind.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=kind, bos_token=end, eos_token=end, unk_token=end, pad_token=end
    )


def ours(model: Any, ids: Any, target: int, probes: int = PROBES, steps: int = STEPS) -> Callable[[], Any]:
    def run() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = ReagentOptions(max_steps=steps, keep=5)
            return reagent(model, ids, target=target, probes=probes, options=options)

    return run


def evaluated_rows(model: Any, ids: Any, target: int, probes: int, steps: int) -> list[torch.Tensor]:
    """The ids of each forward of :func:`ours`."""
    seen: list[torch.Tensor] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    try:
        ours(model, ids, target, probes, steps)()
    finally:
        handle.remove()

    return seen


def bare(
    model: Any, ids: Any, target: int, probes: int = PROBES, steps: int = STEPS
) -> tuple[Callable[[], Any], int]:
    """The forwards of :func:`ours`, run again with nothing around them."""
    seen = evaluated_rows(model, ids, target, probes, steps)

    def run() -> None:
        with torch.inference_mode():
            for rows in seen:
                model(input_ids=rows, use_cache=False, logits_to_keep=1)

    return run, sum(len(rows) for rows in seen)


def products(forwards: list[torch.Tensor], layers: int = 12, width: int = 768) -> Callable[[], Any]:
    """The matrix products of these forwards of GPT-2, with the vocabulary's at the last position only, and nothing else."""
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    weights = [[torch.randn(shape) for shape in shapes] for _ in range(layers)]
    head = torch.randn(width, WORDS)

    def run() -> None:
        with torch.inference_mode():
            for rows in forwards:
                inputs = {n: torch.randn(rows.numel(), n) for n in (width, 4 * width)}
                for layer in weights:
                    for weight in layer:
                        inputs[len(weight)] @ weight
                inputs[width][: len(rows)] @ head

    return run


def inseqs(
    model: Any, tokenizer: Any, text: str, target: str, probes: int = PROBES, steps: int = STEPS
) -> Callable[[], Any] | None:
    try:
        import inseq
        from inseq.attr.feat.ops.reagent_core.token_sampler import POSTagTokenSampler
    except ImportError:
        return None
    original = POSTagTokenSampler.build_pos_mapping_from_vocab
    POSTagTokenSampler.build_pos_mapping_from_vocab = staticmethod(
        lambda *a, **k: {"word": list(range(WORDS))}
    )
    try:
        options = {
            "keep_top_n": 5,
            "stopping_condition_top_k": 3,
            "max_probe_steps": steps,
            "num_probes": probes,
        }
        wrapped = inseq.load_model(model, "reagent", tokenizer=tokenizer, **options)
    finally:
        POSTagTokenSampler.build_pos_mapping_from_vocab = original

    def run() -> Any:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return wrapped.attribute(text, f"{text} {target}", show_progress=False, pretty_progress=False)

    return run


def rows(repeats: int = 5) -> Iterator[Row]:
    tokenizer = words()
    model = network()
    ids = torch.randint(WORDS - 1, (TOKENS,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        target = int(model(ids[None], logits_to_keep=1).logits[0, -1, :-1].argmin())
    text = " ".join(f"w{i}" for i in ids.tolist())
    name = f"4 layers of width 256, {TOKENS} tokens, {PROBES} probes, {STEPS} steps"
    forwards, evaluated = bare(model, ids, target)
    yield compare(
        SLUG,
        f"one token explained, GPT-2 with {name}",
        ours(model, ids, target),
        "inseq reagent",
        inseqs(model, tokenizer, text, f"w{target}"),
        target=4.0,
        repeats=repeats,
        note=f"ours asks for {evaluated} sequences, inseq for {2 * STEPS * PROBES} and one batch of {PROBES} for the prompt",
    )
    yield compare(
        SLUG,
        "the same beside its own forwards",
        ours(model, ids, target),
        "bare batched forwards",
        forwards,
        target=1 / 1.2,
        repeats=repeats,
        note="the limit is 1: the rest is drawing, and reading probabilities and ranks off 50257 logits a row",
    )
    large, few = network(*((2, 256) if quick() else (12, 768))), 3
    size = f"{large.config.n_layer} layers of width {large.config.n_embd}"
    yield compare(
        SLUG,
        f"the same, {size}, 5 probes, {few} steps",
        ours(large, ids, target, 5, few),
        "inseq reagent",
        inseqs(large, tokenizer, text, f"w{target}", 5, few),
        target=4.0,
        repeats=min(repeats, 3),
        note="what is saved are the logits of all positions but the last; at this size the layers cost more than they do",
    )
    run, _ = bare(large, ids, target, 5, few)
    yield compare(
        SLUG,
        "the same beside its own forwards",
        ours(large, ids, target, 5, few),
        "bare batched forwards",
        run,
        target=1 / 1.2,
        repeats=min(repeats, 3),
        note="where this is 1 nothing around the model is left to save",
    )
    yield compare(
        SLUG,
        "the matrix products of those forwards alone",
        products(evaluated_rows(large, ids, target, 5, few)),
        "inseq reagent",
        inseqs(large, tokenizer, text, f"w{target}", 5, few),
        repeats=min(repeats, 3),
        note="no way of asking for the same forwards can be faster than this",
    )
    made = torch.randint(WORDS - 1, (10,), generator=torch.Generator().manual_seed(1)).tolist()
    options: dict[str, Any] = {"probes": 3, "options": ReagentOptions(max_steps=STEPS)}

    def quietly(function: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return function()

        return run

    def one_by_one() -> None:
        for i in range(10):
            prompt = torch.cat([ids, torch.tensor(made[:i], dtype=torch.long)])
            reagent(model, prompt, target=made[i], **options)

    yield compare(
        SLUG,
        "a continuation of 10 tokens, explained together",
        quietly(lambda: explain_continuation(model, ids, made, **options)),
        "one token after the other",
        quietly(one_by_one),
        repeats=repeats,
        note="both are ours; lengths differ, so that the joint forwards carry some padding",
    )


if __name__ == "__main__":
    for row in rows(3):
        print(row)
