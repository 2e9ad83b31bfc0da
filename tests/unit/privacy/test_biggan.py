"""BigGAN-deep as a prior against modules that are written out, with torch's own spectral norms, under the names of the published file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import spectral_norm

from lineament.core.checks import InputError
from lineament.privacy import Mapped, Message, Search, load_prior, reconstruct
from lineament.privacy.biggan import BigGANPrior

LAYERS = [(32, 32, False), (32, 16, True), None, (16, 16, False), (16, 8, True)]
LIMITS = (torch.zeros(3), torch.ones(3))


class Norm(nn.Module):
    def __init__(self, channels: int, condition: int | None):
        super().__init__()
        self.register_buffer("running_means", torch.randn(5, channels) * 0.1)
        self.register_buffer("running_vars", torch.rand(5, channels) + 0.5)
        if condition is None:
            self.weight, self.bias = nn.Parameter(torch.rand(channels)), nn.Parameter(torch.randn(channels))
        else:
            self.scale, self.offset = (
                spectral_norm(nn.Linear(condition, channels, bias=False)) for _ in "ab"
            )

    def forward(self, x, c=None, row=4):
        mean, var = self.running_means[row], self.running_vars[row]
        if c is None:
            return F.batch_norm(x, mean, var, self.weight, self.bias, eps=1e-4)
        return F.batch_norm(x, mean, var, eps=1e-4) * (1 + self.scale(c)[..., None, None]) + self.offset(c)[..., None, None]  # fmt: skip


class Bottleneck(nn.Module):
    def __init__(self, before: int, after: int, up: bool, condition: int):
        super().__init__()
        self.after, self.up = after, up
        middle = before // 4
        for j, (a, b, k) in enumerate([(before, middle, 1), (middle, middle, 3), (middle, middle, 3), (middle, after, 1)]):  # fmt: skip
            self.add_module(f"bn_{j}", Norm(a, condition))
            self.add_module(f"conv_{j}", spectral_norm(nn.Conv2d(a, b, k, padding=k // 2)))

    def forward(self, x, c, row):
        larger = nn.Upsample(scale_factor=2) if self.up else nn.Identity()
        y = self.conv_0(self.bn_0(x, c, row).relu())
        y = self.conv_1(larger(self.bn_1(y, c, row).relu()))
        y = self.conv_3(self.bn_3(self.conv_2(self.bn_2(y, c, row).relu()), c, row).relu())
        return y + larger(x[:, : self.after])


class Attention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        for name, a, b in (("theta", channels, channels // 8), ("phi", channels, channels // 8), ("g", channels, channels // 2), ("o_conv", channels // 2, channels)):  # fmt: skip
            self.add_module(f"snconv1x1_{name}", spectral_norm(nn.Conv2d(a, b, 1, bias=False)))
        self.gamma = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x, c, row):
        pooled = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(2))
        looks = (self.snconv1x1_theta(x).flatten(2).mT @ pooled(self.snconv1x1_phi(x))).softmax(-1)
        seen = (pooled(self.snconv1x1_g(x)) @ looks.mT).view(len(x), -1, *x.shape[2:])
        return x + self.gamma * self.snconv1x1_o_conv(seen)


class Published(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.Linear(10, 4, bias=False)
        self.generator = nn.Module()
        self.generator.gen_z = spectral_norm(nn.Linear(8, 16 * 32))
        self.generator.layers = nn.ModuleList(Attention(16) if one is None else Bottleneck(*one, 8) for one in LAYERS)  # fmt: skip
        self.generator.bn = Norm(8, None)
        self.generator.conv_to_rgb = spectral_norm(nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, z, labels, row=4):
        c = torch.cat([z, self.embeddings(F.one_hot(labels, 10).to(z))], 1)
        x = self.generator.gen_z(c).view(-1, 4, 4, 32).permute(0, 3, 1, 2)
        for layer in self.generator.layers:
            x = layer(x, c, row)
        return self.generator.conv_to_rgb(self.generator.bn(x, row=row).relu())[:, :3].tanh()


@pytest.fixture
def published() -> Published:
    torch.manual_seed(0)
    made = Published()
    for _ in range(30):  # power iterations
        made(torch.randn(2, 4), torch.tensor([1, 2]))
    return made.eval()


def made_by(prior, code, labels):
    for block in prior.blocks(code, labels):
        code = block(code)
    return prior.render(code)


def test_it_makes_the_published_pictures(published, tmp_path):
    z, labels = torch.randn(3, 4), torch.tensor([1, 7, 9])
    state = published.state_dict()
    with torch.no_grad():
        wanted = published(z, labels)
        prior = BigGANPrior(state, lambda made: made)
        assert (prior.code, prior.side, len(prior.blocks(z, labels))) == (4, 16, 5)
        assert torch.allclose(made_by(prior, z, labels), wanted, atol=1e-5)
        assert float((wanted - published(z, labels.flip(0))).abs().max()) > 1e-3
        half = BigGANPrior(state, lambda made: made, truncation=0.5)
        assert torch.allclose(made_by(half, z, labels), published(z, labels, row=2), atol=1e-5)
        mapped = BigGANPrior(state, lambda made: made, classes=[7, 1, 9])
        assert torch.allclose(made_by(mapped, z, torch.tensor([1, 0, 2])), wanted, atol=1e-5)
        torch.save(state, tmp_path / "biggan.pt")
        save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "biggan.safetensors")
        for name in ("biggan.pt", "biggan.safetensors"):
            found = made_by(load_prior(tmp_path / name, (3, 8, 8), LIMITS), z, labels)
            assert torch.allclose(found, (F.avg_pool2d(wanted, 2) + 1) / 2, atol=1e-5)


def test_statistics_between_two_truncations_lie_between_them(published):
    state = published.state_dict()
    told = BigGANPrior(state, lambda made: made, truncation=0.3).own["generator.bn.mean"]
    one, two = state["generator.bn.running_means"][1:3]
    assert torch.allclose(told, 0.8 * one + 0.2 * two, atol=1e-6)


def test_it_is_searched_with_code_and_class_frozen_behind_the_first_stage(published):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(196, 5))
    x, y = torch.rand(2, 3, 16, 16), torch.tensor([2, 3])
    prior = BigGANPrior(published.state_dict(), lambda made: (made + 1) / 2)
    told = [Message.of(net, x[k : k + 1], y[k : k + 1]) for k in range(2)]
    how = Search(steps=4, restarts=1, layers=3, patience=None)
    found = reconstruct(net, told, y[:, None], (3, 16, 16), prior=prior, search=how, bounds=LIMITS)
    assert found.stage_pictures.shape[:2] == (2, 4) and bool((found.scores <= found.stage_scores[:, 0]).all())


def test_classes_of_the_generator_are_found_where_they_are_not_the_models(published):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(294, 2))
    prior = BigGANPrior(published.state_dict(), lambda made: (made + 1) / 2)
    z, true = torch.randn(2, 4), torch.tensor([7, 1])
    with torch.no_grad():
        x = (made_by(prior, z, true) + 0).clamp(0, 1)
        centres = torch.stack(
            [made_by(prior, torch.zeros(1, 4), torch.tensor([k])).flatten() for k in range(10)]
        )
    y = torch.tensor([0, 1])  # of the model, which has two classes
    told = [Message.of(net, x[k : k + 1], y[k : k + 1]) for k in range(2)]
    mapped = Mapped(prior, lambda v: -torch.cdist(v.flatten(1), centres), steps=3)
    how = {"search": Search(steps=4, restarts=1, layers=2), "bounds": LIMITS, "seed": 3}
    found = reconstruct(net, told, y[:, None], (3, 16, 16), prior=mapped, **how)
    coarse = reconstruct(
        net, told, y[:, None], (3, 16, 16), prior=_Told(prior, mapped.drawn(2, seed=3)), **{**how, "search": Search(steps=3, restarts=1, layers=2)}
    )  # fmt: skip
    assert found.classes is not None and torch.equal(found.classes[:, 0], mapped.named(coarse.pictures[:, 0]))
    assert found.steps == coarse.steps + 4 * 3
    again = reconstruct(net, told, y[:, None], (3, 16, 16), prior=_Told(prior, found.classes[:, 0]), **how)
    assert torch.equal(found.pictures, again.pictures)
    one = reconstruct(net, told[:1], y[:1, None], (3, 16, 16), prior=mapped, attack="ig", **how)
    assert one.classes is None  # pixels ask no generator
    with pytest.raises(InputError, match="classifier: gave"):
        reconstruct(net, told, y[:, None], (3, 16, 16), prior=Mapped(prior, lambda v: v), **how)


class _Told:
    """A prior that is told its classes, whatever the labels are."""

    def __init__(self, prior: BigGANPrior, classes: torch.Tensor):
        self.prior, self.classes, self.code, self.render = prior, classes, prior.code, prior.render

    def blocks(self, code, targets):
        return self.prior.blocks(code, self.classes[: len(code)])


def test_what_does_not_fit_is_named(published):
    state = published.state_dict()
    prior = BigGANPrior(state, lambda made: made)
    with pytest.raises(InputError, match="go from 3 to 12, but the generator has classes 0 to 9"):
        prior.blocks(torch.zeros(2, 4), torch.tensor([3, 12]))
    with pytest.raises(InputError, match="truncation"):
        BigGANPrior(state, lambda made: made, truncation=0.0)
    with pytest.raises(InputError, match="weight_u' is missing"):
        BigGANPrior({k: v for k, v in state.items() if k != "generator.gen_z.weight_u"}, lambda made: made)
