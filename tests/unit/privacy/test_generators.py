"""StyleGAN2 against its published form, as a prior, and from other codes' files."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from lineament.core.checks import InputError
from lineament.privacy import Message, Search, load_prior, reconstruct, train_prior
from lineament.privacy.generators import _rosinality_pairs, ada_names
from lineament.privacy.stylegan2 import Styled, StyleGAN2, StylePrior

LIMITS = (torch.zeros(1), torch.ones(1))


@pytest.fixture
def generator() -> StyleGAN2:
    torch.manual_seed(0)
    made = StyleGAN2(16, 3, code=6, widths=(12, 8, 6), depth=3)
    for conv in made.convs:
        conv.strength.data.fill_(0.1)  # pyright: ignore[reportCallIssue, reportArgumentType]
        conv.bias.data.normal_()  # pyright: ignore[reportCallIssue]
    return made


@pytest.mark.parametrize("doubles", [False, True])
def test_a_styled_convolution_is_one_of_each_samples_own_weights(doubles):
    torch.manual_seed(0)
    layer = Styled(5, 4, 3, doubles=doubles).double()
    x, w = torch.randn(2, 5, 8, 8).double(), torch.randn(2, 3).double()
    layer.strength.data.fill_(0.3)
    noise = torch.randn(2, 1, *(2 * [16 if doubles else 8])).double()
    bell = torch.tensor([1.0, 3.0, 3.0, 1.0]).double()
    kernel = torch.outer(bell, bell) / bell.sum() ** 2 * 4
    for k in range(2):
        own = layer.weight * layer.affine(w[k : k + 1])[0][None, :, None, None] / math.sqrt(45)
        own = own / (own.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if doubles:  # by place: zeros between pixels, the flipped kernel, then the filter
            wide = torch.zeros(1, 5, 17, 17).double()
            wide[:, :, 1:16:2, 1:16:2] = x[k]
            y = F.conv2d(F.pad(wide, (1, 1, 1, 1)), own.flip((2, 3)))
            y = F.conv2d(F.pad(y, (1, 1, 1, 1)), kernel.expand(4, 1, 4, 4), groups=4)
        else:
            y = F.conv2d(x[k : k + 1], own, padding=1)
        y = F.leaky_relu(y + 0.3 * noise[k] + layer.bias[:, None, None], 0.2) * math.sqrt(2)
        assert torch.allclose(layer(x, w, noise)[k], y[0], atol=1e-9)


def test_blocks_of_the_prior_make_the_generators_picture(generator):
    prior = StylePrior(generator)
    z = torch.randn(2, 6)
    torch.manual_seed(5)
    noise = [torch.randn(2, 1, side, side) for side in generator.sides]
    torch.manual_seed(5)
    whole = generator(z)
    p = (generator.before_last(z) - prior.mean) / prior.deviation
    value = torch.cat([*(p for _ in range(generator.styles)), *(v.flatten(1) for v in noise)], 1)
    assert value.shape[1] == prior.code == sum(size for size, _ in prior.parts(0))
    for k, block in enumerate(prior.blocks(value, None)):
        assert value.shape[1] == sum(size for size, _ in prior.parts(k))
        value = block(value)
    assert torch.allclose(value, whole, atol=1e-4)


def test_later_stages_keep_colours_spheres_and_balls(generator):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(196, 5))
    x, y = torch.rand(1, 3, 16, 16), torch.tensor([2])
    prior = StylePrior(generator, torch.sigmoid)
    seen = []
    plain = prior.blocks
    limits = (torch.zeros(3), torch.ones(3))
    prior.blocks = lambda code, targets: [
        lambda v, k=k, run=run: (seen.append((k, v.detach().clone())), run(v))[1]
        for k, run in enumerate(plain(code, targets))
    ]  # type: ignore[method-assign] # pyright: ignore[reportAttributeAccessIssue]
    how = Search(steps=6, restarts=1, radius=0.01, feature_rate=0.1, patience=None)
    found = reconstruct(
        net, [Message.of(net, x, y)], y[None], (3, 16, 16), prior=prior, search=how, bounds=limits
    )
    assert found.stage_pictures.shape == (1, 3, 1, 3, 16, 16) and float(found.scores) <= float(
        found.stage_scores[0, 0]
    )
    told = [v for k, v in seen if k == 1 and len(v) == 1]
    first, last = told[-7], told[-1]  # of the stage at 8 pixels
    moved = [
        (a - b, kind, a, b)
        for (a, b), (_, kind) in zip(
            zip(
                last.split([s for s, _ in prior.parts(1)], 1), first.split([s for s, _ in prior.parts(1)], 1)
            ),
            prior.parts(1),
        )
    ]
    for off, kind, a, b in moved:
        if kind == "fixed":
            assert not off.any()
        elif kind == "sphere":
            assert torch.allclose(a.norm(), b.norm(), rtol=1e-4)
        else:
            assert 0 < float(off.abs().sum()) <= 0.0101 * off.numel()


def test_training_makes_pictures_in_range_and_the_same_again():
    x = torch.rand(24, 1, 8, 8)
    made = [train_prior(x, kind="stylegan2", steps=2, width=8, code=4, seed=5) for _ in range(2)]
    code = torch.randn(2, made[0].code)
    pictures = []
    for prior in made:
        value = code
        for block in prior.blocks(code, None):
            value = block(value)
        pictures.append(prior.render(value))
    assert torch.equal(*pictures) and pictures[0].shape == (2, 1, 8, 8)
    assert float(x.min()) <= float(pictures[0].min()) and float(pictures[0].max()) <= float(x.max())
    with pytest.raises(InputError, match="8, 16, 32"):
        train_prior(torch.rand(8, 1, 12, 12), kind="stylegan2", steps=1)


def made_by(prior, code):
    for block in prior.blocks(code, None):
        code = block(code)
    return prior.render(code)


def rosinality_names(generator: StyleGAN2) -> dict[str, torch.Tensor]:
    """The tensors with that code's further axes and buffers."""
    own, found = generator.state_dict(), {}
    for ours, theirs in _rosinality_pairs(3, 3).items():
        value = own[ours].clone()
        if ours == "const" or (ours.endswith(".weight") and "affine" not in ours and "mapping" not in ours):
            value = value[None]
        elif ours.startswith("rgbs") and ours.endswith(".bias") and "affine" not in ours:
            value = value.view(1, 3, 1, 1)
        elif ours.endswith("strength"):
            value = value.view(1)
        found[theirs] = value
    return {**found, "noises.noise_0": torch.zeros(1, 1, 4, 4), "convs.0.conv.blur.kernel": torch.ones(4, 4)}


def test_files_of_other_codes_are_read(generator, tmp_path):
    save_file({**ada_names(generator), "mapping.w_avg": torch.zeros(6)}, tmp_path / "ada.safetensors")
    torch.save(
        {"g_ema": rosinality_names(generator), "g": {}, "latent_avg": torch.zeros(6)}, tmp_path / "ros.pt"
    )
    code = torch.randn(2, StylePrior(generator).code)
    wanted = made_by(StylePrior(generator), code)
    for name in ("ada.safetensors", "ros.pt"):
        found = made_by(load_prior(tmp_path / name, (3, 16, 16), (-torch.ones(3), torch.ones(3))), code)
        assert torch.allclose(found, wanted, atol=1e-5)
    small = made_by(load_prior(tmp_path / "ros.pt", (1, 8, 8), LIMITS), code)
    grey = torch.einsum("nchw,c->nhw", wanted, torch.tensor([0.299, 0.587, 0.114]))[:, None]
    assert torch.allclose(small, (F.avg_pool2d(grey, 2) + 1) / 2, atol=1e-5)


def test_files_that_are_no_generator_are_named_with_the_remedy(generator, tmp_path):
    (tmp_path / "ffhq.pkl").write_bytes(pickle.dumps({"G_ema": nn.Linear(1, 1)}))
    with pytest.raises(InputError, match=r"(?s)pickle of whole modules.*\['G_ema'\].*state_dict.*ffhq.pt"):
        load_prior(tmp_path / "ffhq.pkl", (3, 16, 16), LIMITS)
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"1 tensors.*mapping\.fc0\.weight"):
        load_prior(tmp_path / "other.safetensors", (3, 16, 16), LIMITS)
    told = ada_names(generator)
    save_file({**told, "mapping.embed.weight": torch.zeros(6, 10)}, tmp_path / "classes.safetensors")
    with pytest.raises(InputError, match="told a class"):
        load_prior(tmp_path / "classes.safetensors", (3, 16, 16), LIMITS)
    save_file(told, tmp_path / "small.safetensors")
    with pytest.raises(InputError, match="side 16, expected at least 32"):
        load_prior(tmp_path / "small.safetensors", (3, 32, 32), LIMITS)
    told.pop("synthesis.b8.conv0.weight")
    save_file(told, tmp_path / "part.safetensors")
    with pytest.raises(InputError, match=r"lacks synthesis\.b8\.conv0\.weight"):
        load_prior(tmp_path / "part.safetensors", (3, 16, 16), LIMITS)
