"""Examples of all features in one pass against what the whole matrix of codes says, windows around them, and a judge who must tell them apart."""

import pytest
import torch
from tests.contracts.unchanged import unchanged
from torch import nn

from lineament.core.checks import InputError
from lineament.dictionaries import TopK, detection_score, max_examples, windows
from lineament.dictionaries.examples import Window
from lineament.dictionaries.sequences import Sequences


def dictionary(site, d=24, width=60, k=4, seed=0):
    made = TopK(d, width, k=k, site=site)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def case():
    from tests.contracts.language_models import tiny

    model = tiny("gpt2")
    ids = torch.randint(2, 50, (40, 9), generator=torch.Generator().manual_seed(5))
    ids[:, 0] = 0  # BOS
    sae = dictionary("transformer.h.0")
    with torch.no_grad():
        x = model(ids, output_hidden_states=True).hidden_states[1]
    return model, ids, sae, x


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_one_pass_finds_what_the_whole_matrix_says(case, batch_size):
    model, ids, sae, x = case
    with unchanged(model):
        found = max_examples(model, sae, ids, top=5, sample=6, batch_size=batch_size)
    f = sae.encode(x)[:, 1:]  # without BOS
    assert found.rows == 40 * 8 and found.sequences == 40
    torch.testing.assert_close(found.density, (f != 0).double().mean((0, 1)).float())
    torch.testing.assert_close(found.maxima, f.amax((0, 1)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.tensor(found.typical_norm), x[:, 1:].norm(dim=-1).mean(), atol=1e-4, rtol=1e-5
    )
    best = f.amax(1)  # of each sequence the largest
    want = best.topk(5, 0).values.T
    torch.testing.assert_close(found.top, want, atol=1e-5, rtol=1e-5)
    assert found.histogram.sum(1).tolist() == (f != 0).sum((0, 1)).tolist()
    for feature in range(60):
        own = found.places(feature)
        assert len({place[0] for place in own}) == len(own)
        for sequence, position, value in [*own, *found.places(feature, "sample")]:
            assert position > 0 and abs(float(f[sequence, position - 1, feature]) - value) < 1e-4
        on = int((f[..., feature] != 0).sum())
        assert len(found.places(feature, "sample")) == min(6, on)
        if on > 20:
            quarter, middle, _, high = found.quantiles(feature)
            values = f[..., feature][f[..., feature] != 0]
            for share, estimate in ((0.25, quarter), (0.5, middle), (0.95, high)):
                true = float(values.quantile(share))
                assert true / 1.6 < estimate < true * 1.6


def test_what_is_drawn_at_random_is_a_fair_sample():
    net, sae = nn.Sequential(nn.Identity()), dictionary("0", d=1, width=1, k=1)
    with torch.no_grad():
        sae.W_enc.fill_(1.0), sae.b_enc.zero_(), sae.b_dec.zero_()
    x = torch.linspace(0.01, 1, 400)[:, None]
    means = [
        float(
            torch.tensor(
                [
                    p[2]
                    for p in max_examples(net, sae, x, sample=20, seed=seed, batch_size=64).places(
                        0, "sample"
                    )
                ]
            ).mean()
        )
        for seed in range(40)
    ]
    spread = 0.2886 / 20**0.5  # of the mean of 20 draws
    assert abs(sum(means) / 40 - 0.505) < 4 * spread / 40**0.5


def test_importance_is_the_gradient_at_the_atoms(case):
    model, ids, sae, x = case
    found = max_examples(model, sae, ids, gradient="max_logit", batch_size=8)
    leaf = x.clone().requires_grad_()
    hook = model.transformer.h[0].register_forward_hook(
        lambda m, i, o: (leaf, *o[1:]) if isinstance(o, tuple) else leaf
    )
    try:
        scores = model(ids).logits.amax(-1)
    finally:
        hook.remove()
    (g,) = torch.autograd.grad(scores[:, 1:].sum(), leaf)
    want = (sae.encode(x) * (g @ sae.atoms.T)).abs()[:, 1:].mean((0, 1))
    torch.testing.assert_close(found.importance, want, atol=1e-4, rtol=1e-3)


def test_windows_show_the_tokens_around(case):
    model, ids, sae, x = case
    found = max_examples(model, sae, ids, top=3, sample=2)
    f = sae.encode(x)
    feature = int(found.density.argmax())
    for which, many in windows(model, sae, ids, found, features=[feature], before=2, after=3)[
        feature
    ].items():
        assert len(many) == {"top": 3, "sample": 2}[which]
        for window in many:
            low = max(0, window.position - 2)
            assert window.tokens == tuple(ids[window.sequence, low : window.position + 4].tolist())
            torch.testing.assert_close(
                torch.tensor(window.values),
                f[window.sequence, low : window.position + 4, feature],
                atol=1e-5,
                rtol=1e-5,
            )
            assert window.values[window.centre] == pytest.approx(window.value, abs=1e-5)


def test_maps_of_images_have_positions():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 2))
    x, sae = torch.randn(9, 3, 8, 8), dictionary("0", d=6, width=8, k=2)
    found = max_examples(net, sae, (x, torch.zeros(9).long()), top=2)
    with torch.no_grad():
        f = sae.encode(net[0](x).movedim(1, -1))
    assert found.rows == 9 * 36
    torch.testing.assert_close(found.maxima, f.amax((0, 1, 2)), atol=1e-5, rtol=1e-5)
    feature = int(found.density.argmax())
    window = windows(net, sae, (x, torch.zeros(9).long()), found, features=[feature])[feature]["top"][0]
    assert window.shape == (6, 6) and not window.tokens
    torch.testing.assert_close(
        torch.tensor(window.values).view(6, 6), f[window.sequence, ..., feature], atol=1e-5, rtol=1e-5
    )


def test_no_activation_counts(case):
    model, _, sae, _ = case
    with pytest.raises(InputError, match="no activations"):
        max_examples(model, sae, torch.zeros(3, 4).long())


def snippets(own):
    return {"top": [Window(i, 0, 1.0, 0, (word, i)) for i, word in enumerate(own)], "sample": []}


def test_a_judge_that_knows_scores_one_and_one_that_guesses_a_half():
    found = {f: snippets([10 * f] * 12) for f in range(4)}

    def decode(ids):
        return " ".join(map(str, ids))

    def knows(shown, asked):
        word = shown[0].split()[0]
        return [text.split()[0] == word for text in asked]

    assert detection_score(found, knows, decode=decode) == dict.fromkeys(range(4), 1.0)
    assert detection_score(found, lambda shown, asked: [True] * len(asked), decode=decode) == dict.fromkeys(
        range(4), 0.5
    )
    with pytest.raises(InputError, match="judge: answered 1 times, expected one truth value for each of 10"):
        detection_score(found, lambda shown, asked: [True], decode=decode)


def test_data_without_an_index_are_walked(case):
    model, ids, sae, _ = case
    batches = [{"input_ids": part} for part in ids.split(11)]
    one, other = max_examples(model, sae, ids), max_examples(model, sae, batches)
    assert not Sequences(model, batches).indexed
    torch.testing.assert_close(one.top, other.top, atol=1e-5, rtol=1e-5)
