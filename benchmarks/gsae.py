"""The TopK step, the gradient's extra cost, the harvest, evaluation and codes against what they are made of, and against peers where they are installed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from lineament.bench import Row, compare, quick
from lineament.dictionaries.autoencoders import Neurons, TopK
from lineament.dictionaries.evaluation import evaluate
from lineament.dictionaries.examples import max_examples
from lineament.dictionaries.factorisations import nmf
from lineament.dictionaries.harvest import harvest
from lineament.dictionaries.nnls import nnls
from lineament.dictionaries.selection import Selection
from lineament.dictionaries.steering import Steer, steer
from lineament.dictionaries.topk.step import Adam, gradients
from lineament.dictionaries.trainer import initialise
from lineament.recipes.kit.networks import gpt2

SLUG = "gsae"


def rows(repeats: int = 5) -> Iterator[Row]:
    yield from step_rows(repeats)
    yield from model_rows(repeats)
    yield from factorisation_rows(repeats)


def step_rows(repeats: int) -> Iterator[Row]:
    d, width, k, batch = (256, 4096, 32, 128) if quick() else (768, 24_576, 32, 512)
    what = f"d = {d}, M = {width:,}, k = {k}, B = {batch}"
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, batch, d, generator=generator)
    sae = TopK(d, width, k=k)
    initialise(sae, x)
    step = _step(copy.deepcopy(sae), x)
    aware = _step(copy.deepcopy(sae), x, g)
    limit = (
        "one GEMM of 2 B d M for the plain step's five, and a pass over encoder, decoder and Adam's moments"
    )
    peers = {
        "the same equations with dense tensors and autograd": (_dense, 4.0),
        "dictionary_learning's TopKTrainer": (_dictionary_learning, 4.0),
        "SAELens' TopKTrainingSAE": (_saelens, 4.0),
        "sparsify's SparseCoder": (_sparsify, 1.2),
    }
    for peer, (made, target) in peers.items():
        yield compare(
            SLUG, f"TopK step, {what}", step, peer, made(sae, x), target=target, repeats=repeats, note=limit
        )
    yield compare(
        SLUG,
        f"gradient-aware TopK step, exact, {what}",
        aware,
        "our plain step",
        step,
        target=1 / 1.9,
        repeats=repeats,
        note="two GEMMs for one",
    )
    few = copy.deepcopy(sae)
    # The influence in units of its root mean square, as training measures it; and as in a trained dictionary few pre-activations above 0, here 4 k a row.
    root = float((g @ sae.W_dec.detach().T).square().mean().sqrt())
    few.selection = Selection(beta=1.0, influence_scale=root, candidates=8)
    with torch.no_grad():
        few.b_enc -= few.pre_activations(x[:64]).topk(4 * k, 1).values.amin(1).mean()
    yield compare(SLUG, f"gradient-aware TopK step from 8 k candidates, 4 k above 0, {what}", _step(few, x, g), "our plain step", step, target=1 / 1.2, repeats=repeats,
                  note=f"the same choice as the exact one; {_sure(few, x, g):.0%} of the rows are certified, the others scored in full; at the start of a training none")  # fmt: skip
    with torch.no_grad():
        yield compare(
            SLUG, f"codes, {what}", lambda: sae.codes(x), "the encoder's GEMM alone", lambda: torch.addmm(sae.b_enc, x, sae.W_enc.T),
            target=0.5, repeats=repeats, note="selection reads the pre-activations once more",
        )  # fmt: skip


def _step(sae: TopK, x: torch.Tensor, g: torch.Tensor | None = None) -> Callable[[], Any]:
    adam = Adam({name: p.detach() for name, p in sae.named_parameters()}, unit=("W_dec",))

    @torch.no_grad()
    def step() -> None:
        codes = sae.chosen(sae.rows(x), g)
        adam.step(gradients(sae, x, codes, variance=float(sae.d))[0], 1e-4)

    return step


@torch.no_grad()
def _sure(sae: TopK, x: torch.Tensor, g: torch.Tensor) -> float:
    """The share of rows in which no other latent than the candidates can be among the k best, by the bound."""
    chosen = sae.selection
    h = sae.rows(x)
    z = torch.addmm(sae.b_enc, h, sae.W_enc.T)
    least = z.topk(chosen.candidates * sae.k, -1).values.amin(1)
    bound = least * (1 + chosen.beta * g.norm(dim=1) * sae.W_dec.norm(dim=1).max() / chosen.influence_scale)
    best = chosen.scores(z, g @ sae.W_dec.T).topk(sae.k, -1).values.amin(1)
    return float((torch.maximum(least, bound) <= best).float().mean())


def _dense(start: TopK, x: torch.Tensor) -> Callable[[], Any]:
    """As a dense trainer computes it: all codes as a [B, M] tensor, autograd, the gradient projected, Adam, atoms renormalised."""
    sae = copy.deepcopy(start)
    adam = torch.optim.Adam(sae.parameters(), lr=1e-4)

    def step() -> None:
        post = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()
        values, places = post.topk(sae.k, sorted=False)
        codes = torch.zeros_like(post).scatter(-1, places, values)
        (x - (codes @ sae.W_dec + sae.b_dec)).square().sum(-1).mean().backward()
        with torch.no_grad():
            assert sae.W_dec.grad is not None
            sae.W_dec.grad -= (sae.W_dec.grad * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
            adam.step()
            adam.zero_grad()
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)

    return step


def _dictionary_learning(sae: TopK, x: torch.Tensor) -> Callable[[], Any] | None:
    try:
        from dictionary_learning.trainers.top_k import TopKTrainer  # pyright: ignore
    except ImportError:
        return None
    trainer = TopKTrainer(
        steps=10**6,
        activation_dim=sae.d,
        dict_size=sae.width,
        k=sae.k,
        layer=0,
        lm_name="",
        warmup_steps=1,
        decay_start=10**6 - 1,
        device="cpu",
    )
    return lambda: trainer.update(1, x)


def _saelens(sae: TopK, x: torch.Tensor) -> Callable[[], Any] | None:
    try:
        from sae_lens.saes.sae import TrainStepInput  # pyright: ignore
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig  # pyright: ignore
    except ImportError:
        return None
    theirs = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=sae.d, d_sae=sae.width, k=sae.k, device="cpu"))
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-4)

    def step() -> None:
        given = TrainStepInput(x, {}, None, 0, False)
        theirs.training_forward_pass(given).loss.backward()
        adam.step()
        adam.zero_grad()

    return step


def _sparsify(sae: TopK, x: torch.Tensor) -> Callable[[], Any] | None:
    try:
        from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore
    except ImportError:
        return None
    coder = SparseCoder(sae.d, SparseCoderConfig(num_latents=sae.width, k=sae.k))
    adam = torch.optim.Adam(coder.parameters(), lr=1e-4)

    def step() -> None:
        coder.set_decoder_norm_to_unit_norm()
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()

    return step


def model_rows(repeats: int) -> Iterator[Row]:
    # Otherwise the shape of GPT-2 small: how much a layer, the head and the comparison of logits take of a forward hangs on the width and the vocabulary.
    layers, width, vocabulary, length, count = (6, 64, 2000, 64, 8) if quick() else (12, 768, 50_257, 128, 4)
    model = gpt2(vocabulary, length, width=width, layers=layers, heads=width // 64, seed=0, attention="sdpa")
    site = f"transformer.h.{layers * 7 // 12 - 1}"
    ids = torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
    index = torch.arange(count)
    shape = f"a GPT-2 of {layers} layers, width {width}, {count} x {length} tokens, the stream after layer {layers * 7 // 12}"

    def forward() -> None:
        with torch.no_grad():
            model(ids)

    plain, sloped = (harvest(model, ids, site=site, gradient=gradient) for gradient in (None, "labels"))
    for each in (plain, sloped):
        each.rows_of(index[:1])
    yield compare(SLUG, f"harvest with gradients, {shape}", lambda: sloped.rows_of(index), "the bare forward", forward, target=1 / 1.7, repeats=repeats,
                  note="a forward, and a backward through the layers above and the head: 1.6 for GPT-2's shape")  # fmt: skip
    yield compare(SLUG, f"harvest without gradients, {shape}", lambda: plain.rows_of(index), "the bare forward", forward, target=1.5, repeats=repeats,
                  note="the layers below the site alone: 2.5 for GPT-2's shape")  # fmt: skip
    dictionary = Neurons(width, k=16, site=site)
    yield compare(SLUG, f"evaluation with two ablations and a random error, {shape}", lambda: evaluate(model, dictionary, ids, mode="activation"),
                  "the bare forward", forward, target=1 / 2.5, repeats=repeats,
                  note="five runs above the site, one below: 1 + 4 x 0.6 = 3.4 forwards; two runs above it would be 2.2")  # fmt: skip

    wide = TopK(width, 8 * width, k=16, site=site)
    initialise(wide, next(harvest(model, ids, site=site).batches(1024)).x)
    units = SimpleNamespace(typical_norm=float(width**0.5), maxima=torch.ones(8 * width))
    for what, edit, target in (("add", {"add": 4.0}, 1 / 1.05), ("clamp", {"clamp": 2.0}, 1 / 1.2)):
        yield compare(SLUG, f"generate 16 tokens with {what}, {shape}", _generate(model, ids[:, :16], Steer(wide, 5, **edit), units), "generate alone", _generate(model, ids[:, :16]),
                      target=target, repeats=repeats, note="one row of the encoder for the token, and d additions")  # fmt: skip

    def read() -> None:
        # Without the first sequences that a harvest reads to see how many fill its buffer.
        wide.codes(plain.rows_of(index).x)

    yield compare(SLUG, f"examples of all {8 * width:,} features, {shape}", lambda: max_examples(model, wide, ids), "harvest and encode", read, target=1 / 1.3,
                  repeats=repeats, note="one pass; the state is 20 examples, a sample and a histogram a feature")  # fmt: skip


def _generate(
    model: Any, ids: torch.Tensor, edit: Steer | None = None, units: Any = None
) -> Callable[[], Any]:
    def generate() -> None:
        with torch.no_grad(), nullcontext() if edit is None else steer(model, edit, units=units):
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=0
            )

    return generate


def factorisation_rows(repeats: int) -> Iterator[Row]:
    n, d, atoms = (2000, 128, 96) if quick() else (20_000, 512, 500)
    generator = torch.Generator().manual_seed(0)
    basis = torch.rand(atoms, d, generator=generator)
    x = (
        torch.rand(n, atoms, generator=generator).where(
            torch.rand(n, atoms, generator=generator) < 0.05, torch.zeros(())
        )
        @ basis
    )

    def gemms() -> None:
        gram = basis @ basis.T
        (x @ basis.T) @ gram

    yield compare(SLUG, f"one pass of codes, n = {n:,}, d = {d}, k = {atoms}", lambda: nnls(x, basis, steps=1), "its matrix products alone", gemms,
                  target=None, repeats=repeats, note="2 n k (d + k) operations")  # fmt: skip
    try:
        from sklearn.decomposition import NMF
    except ImportError:
        return
    small = x[: min(n, 4000)]

    def theirs() -> None:
        NMF(50, init="nndsvda", solver="cd", max_iter=20, tol=0).fit(small.numpy())

    yield compare(SLUG, f"NMF, 20 passes, {len(small):,} x {d}, k = 50", lambda: nmf(small, 50, iterations=20, tolerance=0.0), "scikit-learn's NMF(solver='cd')",
                  theirs, target=1.2, repeats=repeats, note="ours ends with exact codes of every row")  # fmt: skip
