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
from lineament.privacy.generators import ada_names
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


# Names and shapes as the two codes define them (their `networks.py` and `model.py`), for pictures of 16 x 16 with 12, 8 and 6 channels, codes of 6 entries and 3 mapping layers.
ADA = [
    "synthesis.b4.conv1",
    "synthesis.b8.conv0",
    "synthesis.b8.conv1",
    "synthesis.b16.conv0",
    "synthesis.b16.conv1",
]
ROSINALITY = ["conv1", "convs.0", "convs.1", "convs.2", "convs.3"]
INPUTS, OUTPUTS, SIDES = (12, 12, 8, 8, 6), (12, 8, 8, 6, 6), (4, 8, 8, 16, 16)


def published_file(layout: str) -> dict[str, torch.Tensor]:
    """A file of random weights under the names of one code, with the buffers that lie in it beside them."""
    ada, blur, found = layout == "ada", torch.outer(*2 * [torch.tensor([1.0, 3, 3, 1])]) / 64, {}
    for k in range(3):
        name = f"mapping.fc{k}" if ada else f"style.{k + 1}"
        found |= {f"{name}.weight": 100 * torch.randn(6, 6), f"{name}.bias": 10 * torch.randn(6)}
    one = () if ada else (1,)
    found["synthesis.b4.const" if ada else "input.input"] = torch.randn(*one, 12, 4, 4)
    for k, (a, b, side) in enumerate(zip(INPUTS, OUTPUTS, SIDES)):
        name = ADA[k] if ada else ROSINALITY[k]
        inner, style = (name, f"{name}.affine") if ada else (f"{name}.conv", f"{name}.conv.modulation")
        found |= {f"{inner}.weight": torch.randn(*one, b, a, 3, 3), f"{style}.weight": torch.randn(a, 6), f"{style}.bias": 1 + torch.randn(a)}  # fmt: skip
        found[f"{name}.bias" if ada else f"{name}.activate.bias"] = torch.randn(b)
        found[f"{name}.noise_strength" if ada else f"{name}.noise.weight"] = torch.full(one, 0.3)
        found[f"{name}.noise_const" if ada else f"noises.noise_{k}"] = torch.randn(*((side, side) if ada else (1, 1, side, side)))  # fmt: skip
        if ada:
            found[f"{name}.resample_filter"] = blur.clone()
        elif k in (1, 3):
            found |= {f"{name}.conv.blur.kernel": 4 * blur, f"to_rgbs.{k // 2}.upsample.kernel": 4 * blur}
    for k, width in enumerate((12, 8, 6)):
        name = f"synthesis.b{4 * 2**k}.torgb" if ada else "to_rgb1" if k == 0 else f"to_rgbs.{k - 1}"
        inner, style = (name, f"{name}.affine") if ada else (f"{name}.conv", f"{name}.conv.modulation")
        found |= {f"{inner}.weight": torch.randn(*one, 3, width, 1, 1), f"{style}.weight": torch.randn(width, 6), f"{style}.bias": 1 + torch.randn(width)}  # fmt: skip
        found[f"{name}.bias"] = torch.randn(*((3,) if ada else (1, 3, 1, 1)))
    return {**found, "mapping.w_avg": torch.zeros(6)} if ada else found


def published_picture(
    file: dict[str, torch.Tensor], layout: str, w: torch.Tensor, noise: list[torch.Tensor]
) -> torch.Tensor:
    """One sample's picture of styles [6, 6], place by place: its own weights, zeros between pixels, the filter, colours doubled and added up."""
    ada = layout == "ada"
    bell = torch.tensor([1.0, 3.0, 3.0, 1.0])
    kernel = torch.outer(bell, bell) / 16

    def modulated(x, name, style, size, demodulate):
        inner, affine = (name, f"{name}.affine") if ada else (f"{name}.conv", f"{name}.conv.modulation")
        weight = file[f"{inner}.weight"].reshape(-1, x.shape[1], size, size) / math.sqrt(x.shape[1] * size**2)
        scale = file[f"{affine}.weight"] @ style / math.sqrt(6) + file[f"{affine}.bias"]
        weight = weight * scale[None, :, None, None]
        return (
            weight * (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).rsqrt() if demodulate else weight
        )

    def filtered(x, pad):
        return F.conv2d(F.pad(x, pad).transpose(0, 1), kernel[None, None]).transpose(0, 1)

    x, rgb = file["synthesis.b4.const" if ada else "input.input"].reshape(1, 12, 4, 4), None
    for k in range(5):
        name = ADA[k] if ada else ROSINALITY[k]
        weight = modulated(x, name, w[k], 3, True)
        if k in (1, 3):
            x = filtered(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), (1, 1, 1, 1))
        else:
            x = F.conv2d(x, weight, padding=1)
        x = x + 0.3 * noise[k] + file[f"{name}.bias" if ada else f"{name}.activate.bias"][:, None, None]
        x = F.leaky_relu(x, 0.2) * math.sqrt(2)
        if k in (0, 2, 4):
            name = f"synthesis.b{SIDES[k]}.torgb" if ada else ("to_rgb1", "to_rgbs.0", "to_rgbs.1")[k // 2]
            own = F.conv2d(x, modulated(x, name, w[k + 1], 1, False)) + file[f"{name}.bias"].reshape(
                1, 3, 1, 1
            )
            if rgb is not None:
                wide = torch.zeros(1, 3, *own.shape[2:])
                wide[:, :, ::2, ::2] = rgb
                own = own + filtered(wide, (2, 1, 2, 1))
            rgb = own
    assert rgb is not None
    return rgb


@pytest.mark.parametrize("layout", ["ada", "rosinality"])
def test_files_of_other_codes_make_their_pictures(layout, tmp_path):
    torch.manual_seed(0)
    file = published_file(layout)
    if layout == "ada":
        save_file(file, path := tmp_path / "ada.safetensors")
    else:
        torch.save({"g_ema": file, "g": {}, "latent_avg": torch.zeros(6)}, path := tmp_path / "ros.pt")
    prior = load_prior(path, (3, 16, 16), (-torch.ones(3), torch.ones(3)))
    assert isinstance(prior, StylePrior)
    z = torch.randn(4096, 6, generator=torch.Generator().manual_seed(0))
    p = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
    for k in range(3):
        name = f"mapping.fc{k}" if layout == "ada" else f"style.{k + 1}"
        p = (p if k == 0 else F.leaky_relu(p, 0.2) * math.sqrt(2)) @ file[f"{name}.weight"].T * 0.01 / math.sqrt(6) + 0.01 * file[f"{name}.bias"]  # fmt: skip
    assert torch.allclose(prior.mean, p.mean(0), atol=1e-5) and torch.allclose(prior.deviation, p.std(0), atol=1e-5)  # fmt: skip
    code = torch.randn(2, prior.code)
    found = made_by(prior, code)
    for sample, one in zip(code, found):
        coordinates, rest = sample[:36].view(6, 6), sample[36:]
        w = F.leaky_relu(prior.mean + prior.deviation * coordinates, 0.2) * math.sqrt(2)
        noise = [part.view(1, 1, side, side) for part, side in zip(rest.split([s * s for s in SIDES]), SIDES)]
        assert torch.allclose(one, published_picture(file, layout, w, noise)[0], atol=1e-4)
    small = made_by(load_prior(path, (1, 8, 8), LIMITS), code)
    grey = torch.einsum("nchw,c->nhw", found, torch.tensor([0.299, 0.587, 0.114]))[:, None]
    assert torch.allclose(small, (F.avg_pool2d(grey, 2) + 1) / 2, atol=1e-4)


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
