"""The TopK step: what is kept, and which gradients reach what."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lineament.core.checks import InputError
from lineament.dictionaries.autoencoders import BatchTopK, TopK
from lineament.dictionaries.selection import SCORES, Selection
from lineament.dictionaries.topk import step
from lineament.dictionaries.topk.select import largest, rows_of_flat

D, M, ROWS = 5, 40, 9


def dictionary(kind: type[TopK] = TopK, k: int = 4, seed: int = 0, **selection: object) -> TopK:
    generator = torch.Generator().manual_seed(seed)
    sae = kind(D, M, k=k, selection=Selection(**selection)).double()  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    return sae


def rows(count: int = ROWS, seed: int = 1) -> Tensor:
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 1500), st.integers(1, 40), st.integers(0, 99))
def test_two_stages_find_what_one_finds(count: int, width: int, k: int, seed: int) -> None:
    k = min(k, width)
    values = torch.rand(count, width, generator=torch.Generator().manual_seed(seed))
    found = largest(values, k).sort(-1).values
    assert torch.equal(found, values.topk(k, -1).indices.sort(-1).values)


def test_a_row_of_equal_values_gets_k_places() -> None:
    assert len(set(largest(torch.zeros(1, 700), 5)[0].tolist())) == 5


@pytest.mark.parametrize("score", SCORES)
def test_values_are_activations_never_scores(score: str) -> None:
    sae, x, g = dictionary(score=score, beta=3.0), rows(), rows(seed=2)
    dense, z = sae.encode(x, gradient=g), sae.pre_activations(x)
    on = dense != 0
    assert torch.allclose(dense[on], z[on]) and (dense >= 0).all() and (on.sum(-1) <= 4).all()


@pytest.mark.parametrize("score", SCORES)
def test_scores_by_their_formulas(score: str) -> None:
    z, along = rows(3), rows(3, seed=2)
    influence = along.abs() / 0.7
    expected = {
        "sum": z + 2.0 * z * influence,
        "product": z * influence,
        "signed": (-z.relu() * along).relu(),
        "topk_of_l1": z / z.abs().sum(-1, keepdim=True)
        + 2.0 * z * influence / (z * influence).abs().sum(-1, keepdim=True),
    }[score]
    found = Selection(score=score, beta=2.0, influence_scale=0.7).scores(z, along.clone())
    assert torch.allclose(found, expected)
    if score == "signed":
        raising = Selection(score="signed", raising=True).scores(z, along)
        assert torch.allclose(raising, (z.relu() * along).relu())


def test_signed_keeps_only_what_lowers_the_loss() -> None:
    sae, x, g = dictionary(score="signed"), rows(), rows(seed=2)
    on = sae.encode(x, gradient=g) != 0
    assert on.any() and ((g @ sae.atoms.T)[on] < 0).all()


def test_beta_zero_and_no_gradient_are_topk() -> None:
    x, g = rows(), rows(seed=2)
    plain = dictionary().encode(x)
    assert torch.equal(dictionary(beta=0.0).encode(x, gradient=g), plain)
    g[3] = 0
    assert torch.equal(dictionary(beta=5.0).encode(x, gradient=g)[3], plain[3])
    assert torch.equal(dictionary(beta=5.0).encode(x), plain)  # encode(x) alone is activation mode


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 100), st.floats(0.0, 10))
def test_gradient_scale_and_beta_are_one_unit(c: float, beta: float) -> None:
    x, g = rows(), rows(seed=2)
    one = dictionary(beta=beta).encode(x, gradient=g)
    assert torch.equal(one, dictionary(beta=beta / c).encode(x, gradient=c * g))
    assert torch.equal(one, dictionary(beta=beta, influence_scale=c).encode(x, gradient=c * g))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999))
def test_permuted_latents_are_permuted_codes(seed: int) -> None:
    order = torch.randperm(M, generator=torch.Generator().manual_seed(seed))
    one, other = dictionary(beta=1.0), dictionary(beta=1.0)
    with torch.no_grad():
        for mine, theirs in ((other.W_enc, one.W_enc), (other.b_enc, one.b_enc), (other.W_dec, one.W_dec)):
            mine.copy_(theirs[order])
    x, g = rows(), rows(seed=2)
    assert torch.allclose(one.encode(x, gradient=g)[:, order], other.encode(x, gradient=g))


def test_all_latents_do_not_hang_on_beta() -> None:
    x, g = rows(), rows(seed=2)
    one, other = (dictionary(k=M, beta=beta) for beta in (0.0, 7.0))
    assert torch.allclose(one.decode(one.codes(x, gradient=g)), other.decode(other.codes(x, gradient=g)))


def test_product_leaves_out_the_least_effect_of_a_linear_loss() -> None:
    """With orthonormal atoms and the loss v.x, |f_i w_i.v| is the exact effect of removing a latent."""
    sae = TopK(D, D, k=2, selection=Selection(score="product")).double()
    with torch.no_grad():
        sae.W_dec.copy_(torch.linalg.qr(rows(D)).Q)
        sae.W_enc.copy_(sae.W_dec)
    x, v = rows(), rows(1, seed=3)
    full = sae.pre_activations(x).relu()
    effects = (full * (sae.atoms @ v[0])).abs()
    kept = sae.encode(x, gradient=v.expand_as(x)) != 0
    left_out = (effects * ~kept).sum(-1)
    assert torch.allclose(left_out, effects.sum(-1) - effects.topk(2, -1).values.sum(-1))


@pytest.mark.parametrize("pool", ["batch", 3, 4])
def test_pooled_rows_share_their_latents(pool: str | int) -> None:
    sae, x, g = dictionary(beta=2.0, pool=pool), rows(8), rows(8, seed=2)
    dense = sae.encode(x, gradient=g)
    z = sae.pre_activations(x)
    scores = z * (1 + 2.0 * (g @ sae.atoms.T).abs())
    size = 8 if pool == "batch" else int(pool)
    for part, values, ranks in zip(dense.split(size), z.split(size), scores.split(size)):
        best = ranks.flatten().topk(4 * len(part)).indices
        expected = torch.zeros_like(values).flatten()
        expected[best] = values.flatten()[best].relu()
        assert torch.allclose(part.flatten(), expected)


def test_pooled_chunks_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = dictionary(BatchTopK, pool="batch"), rows(20)
    whole = sae.encode(x)
    monkeypatch.setattr("lineament.dictionaries.topk.select.BYTES", 8 * M * 3)
    again = sae.encode(x)
    assert (
        torch.equal(whole != 0, again != 0)
        and torch.allclose(whole, again)
        and int((whole != 0).sum()) == 4 * 20
    )


def test_flat_places_become_rows() -> None:
    indices, values = rows_of_flat(torch.tensor([7, 2, 3]), torch.tensor([1.0, 2.0, 0.0]), 3, 4)
    assert indices.tolist() == [[2], [3], [0]] and values.tolist() == [[2.0], [1.0], [0.0]]


@pytest.mark.parametrize("subtract_bias", [True, False])
@pytest.mark.parametrize("pool", ["row", "batch"])
@pytest.mark.parametrize("dead", [0, 3, 12])
def test_the_step_equals_autograd(subtract_bias: bool, pool: str, dead: int) -> None:
    sae = dictionary(beta=1.0, pool=pool)
    sae.subtract_bias = subtract_bias
    x, g = rows(), rows(seed=2)
    gone = torch.zeros(M, dtype=torch.bool)
    gone[:dead] = True
    options = {"dead": gone, "k_aux": 5, "variance": 1.7}
    # The same equations with dense tensors and PyTorch's own operations.
    chosen = sae.encode(x, gradient=g).detach() != 0
    z = (x - sae.b_dec if subtract_bias else x) @ sae.W_enc.T + sae.b_enc
    f = z.relu() * chosen
    out = f @ sae.W_dec + sae.b_dec
    loss = (x - out).square().sum() / len(x) / 1.7
    if dead:
        held = (x - out).detach()
        places = z.detach().masked_fill(~gone, -torch.inf).topk(min(5, dead), -1).indices
        aux = torch.zeros_like(z).scatter(-1, places, z.gather(-1, places).relu()) @ sae.W_dec
        loss = loss + 0.1 * (aux - held).square().sum() / (held - held.mean(0)).square().sum()
    loss.backward()
    expected = {name: p.grad for name, p in sae.named_parameters()}
    found, told = step.gradients(sae, x, sae.codes(x, gradient=g), alpha=0.1, **options)
    assert torch.allclose(told.reconstruction + 0.1 * told.auxiliary, loss, rtol=1e-12)
    for name, grad in found.items():
        assert torch.allclose(grad, expected[name], rtol=1e-9, atol=1e-12), name
    sae.zero_grad()
    whole = step.losses(sae, x, sae.codes(x, gradient=g), **options)
    (whole.reconstruction + 0.1 * whole.auxiliary).backward()
    for name, parameter in sae.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-9, atol=1e-12), name


def test_gradients_by_finite_differences() -> None:
    indices = torch.tensor([[0, 3], [3, 1], [2, 2]])
    values = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    atoms = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, w: step.decoded(indices, v, w), (values, atoms))


def test_the_same_bits_each_run() -> None:
    sae, x = dictionary(), rows(200)
    one, other = (step.gradients(sae, x, sae.codes(x))[0] for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_unselected_latents_get_no_reconstruction_gradient() -> None:
    sae, x = dictionary(), rows()
    codes = sae.codes(x)
    found, _ = step.gradients(sae, x, codes)
    off = (codes.dense() != 0).sum(0) == 0
    assert off.any() and not found["W_enc"][off].any() and not found["b_enc"][off].any()


class TestAuxK:
    def test_nothing_dead_costs_nothing(self) -> None:
        sae, x = dictionary(), rows()
        for dead in (None, torch.zeros(M, dtype=torch.bool)):
            assert step.losses(sae, x, sae.codes(x), dead=dead).auxiliary == 0

    def test_it_has_no_bias(self) -> None:
        """A constant added to x and b_dec together changes nothing, and nor does b_dec in what the dead latents write."""
        sae, x = dictionary(), rows()
        dead = torch.arange(M) < 7
        before = step.losses(sae, x, sae.codes(x), dead=dead, k_aux=3).auxiliary
        with torch.no_grad():
            sae.b_dec.add_(3.0)
        assert torch.allclose(
            step.losses(sae, x + 3.0, sae.codes(x + 3.0), dead=dead, k_aux=3).auxiliary, before
        )

    def test_its_gradient_reaches_encoder_and_decoder_of_dead_latents_only(self) -> None:
        sae, x = dictionary(), rows()
        codes = sae.codes(x)
        dead = codes.dense().sum(0) == 0
        assert 3 < int(dead.sum()) < M
        step.losses(sae, x, codes, dead=dead, k_aux=3).auxiliary.backward()
        for grad in (sae.W_enc.grad, sae.b_enc.grad[:, None], sae.W_dec.grad):
            assert not grad[~dead].any() and grad[dead].any()

    @pytest.mark.parametrize(("k_aux", "most"), [(2, 2), (9, 4)])
    def test_at_most_so_many_dead_latents_a_row(self, k_aux: int, most: int) -> None:
        sae, x = dictionary(), rows()
        dead = torch.arange(M) < 4
        aux = step.auxiliary_codes(sae, sae.rows(x), dead, k_aux)
        assert aux.indices.shape == (ROWS, most) and (aux.indices < 4).all()

    def test_a_constant_error_gives_zero(self) -> None:
        sae = dictionary()
        x = rows(1).expand(4, -1)
        told = step.gradients(sae, x, sae.codes(x), dead=torch.arange(M) < 7, variance=1.0)
        assert told[1].auxiliary == 0 and all(g.isfinite().all() for g in told[0].values())


def test_adam_is_adam_with_atoms_of_norm_one() -> None:
    sae = dictionary()
    free = torch.nn.Parameter(sae.W_enc.detach().clone())
    theirs = torch.optim.Adam([free], lr=0.01, eps=6.25e-10)
    ours = step.Adam({"W_enc": sae.W_enc, "W_dec": sae.W_dec}, unit=("W_dec",))
    for seed in range(5):
        grads = {"W_enc": rows(M, seed=seed), "W_dec": rows(M, seed=seed + 9)}
        radial = step.without_radial_part_(grads["W_dec"].clone(), sae.atoms)
        assert (radial * sae.atoms).sum(1).abs().max() < 1e-12
        free.grad = grads["W_enc"].clone()
        theirs.step()
        ours.step(grads, 0.01)
        assert torch.allclose(sae.W_enc, free, rtol=1e-12)
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(M).double(), atol=1e-12)


class TestRefused:
    @pytest.mark.parametrize("k", [0, M + 1, 2.5])
    def test_k(self, k: object) -> None:
        with pytest.raises(InputError, match=f"k: got {k}"):
            TopK(D, M, k=k)  # pyright: ignore[reportArgumentType]

    @pytest.mark.parametrize(
        "options", [{"beta": -1.0}, {"influence_scale": 0.0}, {"score": "sums"}, {"pool": 0}]
    )
    def test_selection(self, options: dict[str, object]) -> None:
        with pytest.raises(InputError, match=next(iter(options))):
            Selection(**options)  # pyright: ignore[reportArgumentType]

    def test_gradients(self) -> None:
        sae, x = dictionary(), rows()
        with pytest.raises(InputError, match="gradient: missing"):
            sae.codes(x, mode="gradient")
        with pytest.raises(InputError, match=r"gradient: got .* expected the shape of x"):
            sae.codes(x, gradient=rows(ROWS - 1))
        with pytest.raises(InputError, match="gradient: rows 2 hold NaN"):
            bad = rows()
            bad[2, 1] = torch.nan
            sae.codes(x, gradient=bad)


@pytest.mark.parametrize("beta", [0.05, 1.0, 30.0])
def test_candidates_choose_what_all_scores_choose(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the bound fails in some rows (most of them for the largest beta), which are scored in full."""
    plain, few = (dictionary(beta=beta, candidates=n) for n in (0, 3))
    x, g = rows(60), rows(60, seed=2)
    counted = []
    scores = Selection.scores
    monkeypatch.setattr(
        Selection, "scores", lambda self, z, along: counted.append(z.shape) or scores(self, z, along)
    )
    found = few.codes(x, gradient=g)
    assert counted[0] == (60, 12), "3 k candidates"
    unsure = counted[1][0] if len(counted) > 1 else 0
    assert {0.05: unsure < 20, 1.0: 0 < unsure < 60, 30.0: unsure >= 40}[beta], unsure
    expected = plain.codes(x, gradient=g)
    assert torch.equal(found.dense() != 0, expected.dense() != 0)
    assert torch.allclose(found.dense(), expected.dense(), atol=1e-12)


@pytest.mark.parametrize("candidates", [0, 3])
def test_ranked_in_bfloat16_the_kept_values_are_exact(candidates: int) -> None:
    sae, x, g = (
        dictionary(precision="bfloat16", candidates=candidates).float(),
        rows(60).float(),
        rows(60, seed=2).float(),
    )
    z = sae.pre_activations(x).detach().relu()
    for dense in (sae.encode(x), sae.encode(x, gradient=g)):
        on = dense != 0
        assert torch.allclose(dense[on], z[on], atol=1e-6) and (on.sum(1) <= 4).all()
    full = dictionary().float().encode(x).detach()
    assert float(((sae.encode(x) != 0) == (full != 0)).float().mean()) > 0.97
    assert float(z[full != 0].sum()) == pytest.approx(float(sae.encode(x).detach().sum()), rel=0.01), (
        "nearly the best"
    )


@pytest.mark.parametrize(
    "options",
    [{"candidates": 8, "score": "product"}, {"candidates": 8, "pool": "batch"}, {"precision": "half"}, {"precision": "bfloat16", "pool": 4}],
)  # fmt: skip
def test_what_has_no_bound_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"candidates|precision"):
        Selection(**options)  # pyright: ignore[reportArgumentType]
