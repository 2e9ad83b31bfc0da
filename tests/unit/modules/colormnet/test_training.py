"""Training on clips: what is drawn, what is learned, and that a killed training goes on."""

import copy
import dataclasses

import numpy as np
import pytest
import scipy.linalg
import torch

from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError
from lineament.modules.colormnet.clips import Clips, jittered
from lineament.modules.colormnet.configuration import ColorMNetConfig
from lineament.modules.colormnet.network import ColorMNet
from lineament.modules.colormnet.scores import (
    ColourScores,
    colour_consistency,
    frechet_distance,
    psnr_legacy,
    score_colours,
)
from lineament.modules.colormnet.training import (
    ColorTraining,
    _Training,
    clip_losses,
    references,
    train_colorizer,
)

SMALL = ColorTraining(frames=3, size=32, epochs=2, clips=2, batch_size=1, lr=1e-3, affine=(0, 0), scale=1.0)


@pytest.fixture(scope="module")
def films() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randint(0, 256, (1, 2, 2, 3), dtype=torch.uint8, generator=generator)
    picture = patches.repeat_interleave(16, 1).repeat_interleave(16, 2)
    return [picture.expand(5, -1, -1, -1).contiguous()]


@pytest.fixture(scope="module")
def model() -> ColorMNet:
    torch.manual_seed(0)
    return ColorMNet(ColorMNetConfig.tiny())


def test_memory_holds_the_first_frame_and_random_ones():
    for held in references(8, 3)[1:]:
        assert held[0] == 0 and len(set(held)) == len(held)
    assert [len(held) for held in references(8, 3)] == [0, 1, 2, 3, 3, 3, 3, 3]
    assert all(max(held, default=0) < max(t, 1) for t, held in enumerate(references(8, 3)))


def test_a_clip_moves_one_way_through_its_film():
    films = [torch.zeros(200, 4, 4, 3, dtype=torch.uint8)]
    clips, ways = Clips(films, ColorTraining()), set()
    for done, most in ((0.0, 5), (0.2, 10), (0.5, 15), (0.95, 5)):
        clips.done = done
        for _ in range(20):
            gaps = clips.places(200).diff()
            assert (gaps > 0).all() or (gaps < 0).all()
            assert gaps.abs().max() <= most
            ways.add(bool(gaps[0] > 0))
    assert ways == {True, False}
    assert clips.places(3).max() <= 2


def test_recurrent_training_remembers_the_frame_before_alone(model):
    generator = torch.Generator().manual_seed(0)
    lightness, ab = (torch.rand(1, 3, c, 32, 32, generator=generator) for c in (1, 2))
    told = dataclasses.replace(SMALL, recurrent=True, deep=0.0)
    found = _Training(model, told).train()(lightness, ab)
    deep = [True, False, False]
    torch.testing.assert_close(found, clip_losses(model, lightness, ab, deep=deep, references=[[], [0], [1]]))
    assert not torch.equal(found, clip_losses(model, lightness, ab, deep=deep, references=[[], [0], [0, 1]]))


def test_no_change_leaves_pictures_as_they_are(films):
    rgb = films[0].movedim(3, 1) / 255
    torch.testing.assert_close(jittered(rgb, 0, 0, 0), rgb)
    grey = torch.full((2, 3, 4, 4), 0.4)
    turned = jittered(grey, 0, 0.5, 0.5)
    torch.testing.assert_close(turned, grey)


def test_it_learns_and_keeps_its_statistics_and_semantics(model, films):
    model = copy.deepcopy(model).train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    told = ColorTraining(**{**vars(SMALL), "epochs": 6, "clips": 4, "jitter": (0, 0, 0), "jitter_frame": 0})
    losses = train_colorizer(model, films, options=told).curve("loss")
    assert losses[-1] < 0.8 * losses[0]
    after = model.state_dict()
    kept = [n for n in before if "running" in n or n.startswith("key_encoder.network2.")]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)
    assert not torch.equal(before["decoder.pred.weight"], after["decoder.pred.weight"])


def test_a_killed_training_goes_on_with_the_same_bits(model, films, tmp_path):
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    train_colorizer(whole, films, options=SMALL)

    class Kill:
        def on_epoch(self, run):
            if run.epoch == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_colorizer(
            parts, films, options=SMALL, checkpoint=Checkpoint(tmp_path / "a", {}), callbacks=[Kill()]
        )
    again = copy.deepcopy(model)
    train_colorizer(again, films, options=SMALL, checkpoint=Checkpoint(tmp_path / "a", {}))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_recomputed_activations_give_the_gradients_and_take_less_memory(model):
    generator = torch.Generator().manual_seed(0)
    lightness, ab = (torch.rand(1, 4, c, 32, 32, generator=generator) - 0.5 for c in (1, 2))
    gradients, held = [], []
    for recompute in (False, True):
        kept: dict[int, int] = {}

        def keep(x: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            losses = clip_losses(model, lightness, ab, deep=[True] * 4, recompute=recompute)
        held.append(sum(kept.values()))
        named = [p for n, p in model.named_parameters() if not n.startswith("key_encoder.network2.")]
        gradients.append(torch.autograd.grad(losses.sum(), named))
    weights = sum(p.nbytes for p in model.parameters())
    assert held[1] - weights < 0.5 * (held[0] - weights)
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


def test_the_frechet_distance_is_that_of_two_normal_distributions():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(50, 6, generator=generator).double() * s + s for s in (1.0, 2.0))
    covariances = [x.T.cov().numpy() for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    plain = (a.mean(0) - b.mean(0)).square().sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(float(plain)) == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_parts_of_a_batch_are_the_batch(model, films):
    told = dataclasses.replace(
        SMALL, epochs=1, clips=2, batch_size=2, deep=0.0, jitter=(0, 0, 0), jitter_frame=0
    )
    losses = []
    for parts in (1, 2):
        done = train_colorizer(
            copy.deepcopy(model), films, options=dataclasses.replace(told, accumulate=parts)
        )
        losses.append(done.curve("loss")[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_every_frame_of_other_films_is_judged_after_each_epoch(model, films):
    found = train_colorizer(
        copy.deepcopy(model), films, options=SMALL, validation=[films[0].repeat(2, 1, 1, 1), films[0][:2]]
    )
    names = ("psnr", "psnr_legacy", "ssim", "cdc", "colourfulness", "colourfulness_absolute")
    curves = {name: found.curve(f"{name}_validation") for name in names}
    assert all(len(curve) == 2 and None not in curve for curve in curves.values())
    assert curves["psnr_legacy"][0] > curves["psnr"][0]  # here as everywhere
    worst = score_colours(model, films, metrics={"worst": lambda a, b: (a - b).abs().flatten(1).amax(1)})
    assert 0 < worst["worst"] <= 1
    with pytest.raises(InputError, match="validation: number 0 is"):
        train_colorizer(model, films, options=SMALL, validation=[films[0][0]])


@pytest.mark.parametrize(
    ("films", "options", "message"),
    [
        ([], SMALL, "films: got none"),
        ([torch.zeros(4, 8, 8, 3)], SMALL, "number 0 is a float32 tensor"),
        (
            [torch.zeros(4, 8, 8, 3, dtype=torch.uint8)],
            ColorTraining(size=40),
            "size: got 40, expected a multiple of 16",
        ),
    ],
)
def test_bad_input(model, films, options, message):
    with pytest.raises(InputError, match=message):
        train_colorizer(model, films, options=options)


def test_what_is_drawn_elsewhere_changes_no_clip(films):
    told = dataclasses.replace(SMALL, clips=4, batch_size=2)
    clips, seen = Clips(films, told), []
    for more in (0, 3):
        seen.append([])
        for batch, _ in clips:
            seen[-1].append(batch["ab"])
            torch.rand(more)
    assert all(torch.equal(a, b) for a, b in zip(*seen))
    drawn = [x for batch in seen[0] for x in batch]
    assert len(drawn) == 4 and not any(torch.equal(drawn[0], x) for x in drawn[1:])
    clips.seeds = (0, 1, 0)  # of another epoch
    assert not torch.equal(next(iter(clips))[0]["ab"], seen[0][0])


def test_scores_of_a_film_in_parts_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(256, (2, 9, 16, 12, 3), dtype=torch.uint8, generator=generator)
    whole, rest, one = ColourScores(), ColourScores(), ColourScores()
    whole.update(a, b)
    for x, y in zip(a, b):
        one.update(x, y)
    assert one.compute() == whole.compute()
    assert whole.compute()["cdc"] == pytest.approx(colour_consistency(a), rel=1e-12)
    assert whole.compute()["psnr_legacy"] == pytest.approx(psnr_legacy(a, b), rel=1e-12)
    rest.update(b[:3], a[:3])
    both, parts = (whole + rest).compute(), (whole.compute(), rest.compute())
    assert both["psnr"] == pytest.approx((9 * parts[0]["psnr"] + 3 * parts[1]["psnr"]) / 12)
    # The first frame of one film does not come after the last of another.
    pairs = [sum(max(0, n - step) for n in (9, 3)) for step in (1, 2, 4)]
    assert [(whole + rest).sums[f"pairs {step}"] for step in (1, 2, 4)] == pairs and "cdc" not in parts[1]
    with pytest.raises(InputError, match="no frame came yet"):
        ColourScores().compute()
