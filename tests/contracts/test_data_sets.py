"""What every data set keeps: one record of one form, the same for the same seed, nothing global touched."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lineament.core.checks import InputError
from lineament.data.bit_features import bit_features
from lineament.data.blockmnist import block_mnist
from lineament.data.digit_scenes import digit_scenes
from lineament.data.digits import digit_images
from lineament.data.fast_slow_patches import fast_slow_patches
from lineament.data.feature_sequences import feature_sequences
from lineament.data.footprint import footprint
from lineament.data.photographs import read_photographs
from lineament.data.pixel_digits import pixel_digits
from lineament.data.planted_cues import CUES, planted_cues
from lineament.data.samples import Samples
from lineament.data.shape_texture_colour import shape_texture_colour
from lineament.data.shortcut_digits import shortcut_digits
from lineament.data.signal_blocks import signal_blocks
from lineament.data.two_latents import two_latents

DIGITS = digit_images(count=50, seed=3)
DATA_SETS = {
    "digits": partial(digit_images, count=40),
    "digits, test": partial(digit_images, split="test"),
    "blocks": partial(block_mnist, *DIGITS.pair, null="noise"),
    "scenes": partial(digit_scenes, 5),
    "patches": partial(fast_slow_patches, 30),
    "pixels": partial(pixel_digits, train=100),
    "shortcuts": partial(shortcut_digits, "test"),
    "bits": partial(bit_features, 30),
    "sequences": partial(feature_sequences, 30, extent="far"),
    "objects": partial(shape_texture_colour, 30),
    "latents": lambda seed=0: two_latents(dims=8, nesting=(0, 1), seed=seed).draw(30, seed=seed),
    "footprints": lambda seed=0: footprint(2.0, size=16, base=3, seed=seed).draw(30, seed=seed),
    "signals": partial(signal_blocks, 30, eta=0.5),
    **{cue: partial(planted_cues, cue, "test") for cue in CUES},
    "photographs": partial(read_photographs, "npz", count=20),
}


@pytest.fixture(params=DATA_SETS)
def make(request, tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 256, (30, 6, 6, 3), dtype=np.uint8), draw.integers(0, 4, 30)
    np.savez(tmp_path / "train.npz", x=x, y=y, groups=y % 2)
    monkeypatch.setenv("LINEAMENT_DATA", str(tmp_path))
    return DATA_SETS[request.param]


def tensors(samples):
    found = {"inputs": samples.inputs, "targets": samples.targets, "index": samples.index, **samples.extras}
    return found if samples.groups is None else {**found, "groups": samples.groups}


def test_the_record_has_one_form(make):
    samples = make()
    assert isinstance(samples, Samples) and len(samples) > 0 and samples.source
    assert all(len(value) == len(samples) for value in tensors(samples).values())
    assert samples.inputs.dtype in (
        torch.uint8,
        torch.float32,
        torch.float64,
        torch.int64,
    )  # token ids are whole
    assert torch.isfinite(samples.inputs.double()).all()
    assert samples.targets.dtype == torch.int64 or samples.targets.is_floating_point()
    if samples.targets.dtype == torch.int64:
        assert samples.targets.ndim == 1 and int(samples.targets.min()) >= 0
        assert not samples.classes or int(samples.targets.max()) < len(samples.classes)
    if samples.groups is not None:
        assert samples.groups.dtype == torch.int64 and int(samples.groups.max()) < len(samples.group_names)
    assert len(samples.index.unique()) == len(samples) <= samples.total
    assert samples.to_dict()["inputs"] == list(samples.inputs.shape) and samples.plot() is not None


def test_the_same_seed_gives_the_same_samples_and_another_others(make):
    first, second, other = make(seed=1), make(seed=1), make(seed=2)
    for name, value in tensors(first).items():
        assert torch.equal(value, tensors(second)[name]), name
    assert not torch.equal(first.inputs, other.inputs)


def test_the_global_random_state_is_not_touched(make):
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    make()
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002


def test_rows_keep_what_belongs_to_them(make):
    samples = make()
    mask = torch.arange(len(samples)) % 3 == 1
    rows = mask.nonzero()[:, 0]
    for part in (samples[rows], samples[mask], samples[rows.tolist()], samples[rows.numpy()]):
        assert {k: v.tolist() for k, v in tensors(part).items()} == {
            k: v[rows].tolist() for k, v in tensors(samples).items()
        }
    assert (
        len(samples[:2]) == 2
        and samples[:2].total == samples.total
        and samples[:2].classes == samples.classes
    )
    x, y = samples[1]
    assert torch.equal(x, samples.inputs[1]) and torch.equal(y, samples.targets[1])
    batches = list(DataLoader(samples, batch_size=7))
    assert torch.equal(torch.cat([x for x, _ in batches]), samples.inputs)
    assert torch.equal(torch.cat([y for _, y in batches]), samples.targets)
    moved = samples.to("meta")
    assert all(value.is_meta for value in tensors(moved).values())


def test_a_seed_that_is_none_is_refused(make):
    with pytest.raises(InputError, match=r"seed: got 1\.5"):
        make(seed=1.5)
