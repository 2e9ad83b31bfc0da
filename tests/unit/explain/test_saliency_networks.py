"""Saliency on networks of every kind: residual, in place, functional, token, channels-last, fully convolutional, broken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lineament.core.checks import InputError
from lineament.explain.saliency.baselines import class_activation
from lineament.explain.saliency.layouts import default_site, layout
from lineament.explain.saliency.maps import combined_saliency, saliency
from lineament.explain.saliency.methods import METHODS, Method

GRADIENT = ["gradient", "linear_approx", "grad_cam", "norm_grad", "norm_grad_3x3", "norm_grad_selective"]
RULES = ["guided_backprop", "deconvnet", "excitation_backprop", "contrastive_excitation_backprop"]


class Residual(nn.Module):
    """Two residual blocks whose ReLUs and sums are written in one of several ways."""

    def __init__(self, style: str):
        super().__init__()
        self.style = style
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2))
        self.act = nn.ReLU(inplace=style == "in place")
        self.fc = nn.Linear(6, 4)

    def relu(self, x):
        if self.style == "functional":
            return F.relu(x)
        if self.style == "clamp":
            return x.clamp(min=0)
        if self.style == "method in place":
            x.relu_()
            return x
        return self.act(x)

    def forward(self, x):
        x = self.relu(self.stem(x))
        for conv, norm in zip(self.blocks, self.norms):
            y = norm(conv(x))
            if self.style in ("in place", "method in place"):
                y += x
            else:
                y = torch.add(y, x) if self.style == "functional" else y + x
            x = self.relu(y)
        return self.fc(x.mean((2, 3)))


def residual(style: str) -> nn.Module:
    torch.manual_seed(1)
    net = Residual(style).double()
    for norm in net.norms:
        norm.running_mean.uniform_(-0.3, 0.3)
        norm.running_var.uniform_(0.5, 2)
    return net


@pytest.mark.parametrize("style", ["functional", "clamp", "in place", "method in place"])
@pytest.mark.parametrize("method", [*GRADIENT, *RULES])
def test_every_spelling_of_relus_and_sums_gives_the_same_map(method, style):
    x = torch.rand(2, 2, 7, 9, dtype=torch.float64)
    sites = [":in", "stem", "norms.0"]
    expected = saliency(residual("module"), x, 1, site=sites, method=method)
    found = saliency(residual(style), x, 1, site=sites, method=method)
    for site in sites:
        torch.testing.assert_close(found[site], expected[site])
    assert any(bool((m != 0).any()) for m in expected.values())


@pytest.mark.parametrize("method", RULES)
def test_a_rule_changes_the_map_and_not_the_forward(method):
    net, x = residual("module"), torch.rand(2, 2, 7, 9, dtype=torch.float64)
    ruled = saliency(net, x, 1, site="stem", method=method)
    plain = saliency(net, x, 1, site="stem", method=Method("bias", METHODS[method].aggregate))
    assert not torch.allclose(ruled, plain)


def test_excitation_inside_a_branch_gets_the_branchs_share_only():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)

        def forward(self, x):
            return (self.left(x) + self.right(x)).mean((2, 3)).repeat(1, 2)

    net = Two()
    nn.init.constant_(net.left.weight, 3.0)
    nn.init.constant_(net.right.weight, 1.0)
    maps = saliency(
        net, torch.rand(2, 1, 3, 3) + 0.1, 0, site=["left", "right"], method="excitation_backprop"
    )
    torch.testing.assert_close(maps["left"].sum((1, 2, 3)), torch.full((2,), 0.75))
    torch.testing.assert_close(maps["right"].sum((1, 2, 3)), torch.full((2,), 0.25))


def test_excitation_keeps_its_mass_and_is_finite_where_a_sum_is_zero():
    net, x = residual("in place"), torch.zeros(1, 2, 5, 5, dtype=torch.float64)
    assert torch.isfinite(saliency(net, x, 1, site=":in", method="excitation_backprop")).all()


def test_excitation_refuses_what_it_has_no_rule_for():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with pytest.raises(InputError, match=r"no rule for .*gelu"):
        saliency(net, torch.rand(1, 1, 6, 6), 0, site="0", method="excitation_backprop")
    assert torch.isfinite(saliency(net, torch.rand(1, 1, 6, 6), 0, site="0")).all()


def test_cam_is_grad_cam_before_its_relu_times_the_locations():
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)]
    net, x = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), *head).double(), torch.rand(2, 2, 8, 7).double()
    cam = class_activation(net, x, 1, "1")[0]
    linear = saliency(net, x, 1, site="1", method="linear_approx", resize=False)
    torch.testing.assert_close(cam, 6 * 5 * linear)
    grad_cam = saliency(net, x, 1, site="1", method="grad_cam", resize=False)
    torch.testing.assert_close(cam.clamp_min(0), 6 * 5 * grad_cam)
    deep = nn.Sequential(*net[:4], nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with pytest.raises(InputError, match="not global average pooling and one linear"):
        saliency(deep, x, 1, site="1", method="cam")


def test_scaling_and_shifting_the_logits():
    net, x = residual("module"), torch.rand(2, 2, 7, 9, dtype=torch.float64)
    before = {m: saliency(net, x, 1, site="stem", method=m) for m in GRADIENT}
    with torch.no_grad():
        net.fc.bias += 7.0
    for m, maps in before.items():
        torch.testing.assert_close(saliency(net, x, 1, site="stem", method=m), maps)
    with torch.no_grad():
        net.fc.weight *= 3.0
    for m, maps in before.items():
        torch.testing.assert_close(saliency(net, x, 1, site="stem", method=m), 3 * maps)


def test_tiny_gradients_do_not_vanish_in_float32():
    net = residual("module").float()
    x = torch.rand(1, 2, 7, 9)
    for m in GRADIENT:
        expected = saliency(net, x, 1, site="stem", method=m)
        with torch.no_grad():
            net.fc.weight *= 2.0**-80
        small = saliency(net, x, 1, site="stem", method=m)
        with torch.no_grad():
            net.fc.weight *= 2.0**80
        torch.testing.assert_close(small * 2.0**80, expected)


def test_several_methods_and_sites_come_from_one_forward():
    net, x = residual("module"), torch.rand(2, 2, 7, 9, dtype=torch.float64)
    calls = []
    handle = net.stem.register_forward_hook(lambda *_: calls.append(1))
    found = saliency(net, x, 1, site=["stem", "norms.*"], method=GRADIENT)
    handle.remove()
    assert len(calls) == 1
    assert list(found) == GRADIENT and list(found["gradient"]) == ["stem", "norms.0", "norms.1"]
    for m in GRADIENT:
        torch.testing.assert_close(found[m]["norms.1"], saliency(net, x, 1, site="norms.1", method=m))


def test_fully_convolutional_logits_start_with_a_softmax_over_positions():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1)).double(), torch.rand(2, 1, 7, 9)
    x = x.double()
    scores = net(x)[:, 1]
    start = scores.flatten(1).softmax(1).reshape(scores.shape).detach()
    hidden = net[1](net[0](x)).detach().requires_grad_()
    (g,) = torch.autograd.grad((net[2](hidden)[:, 1] * start).sum(), hidden)
    expected = (g * hidden).sum(1, keepdim=True).detach()
    torch.testing.assert_close(saliency(net, x, 1, site="1", method="linear_approx", resize=False), expected)


def test_faults_of_sites_and_models_are_named():
    net, x = residual("module").float(), torch.rand(2, 2, 7, 9)
    shared = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU())
    twice = nn.Sequential(shared[0], shared[1], shared[0], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InputError, match="reached 2 times"):
        saliency(twice, x, 0, site="0")
    net.unused = nn.Conv2d(2, 2, 1)
    with pytest.raises(InputError, match="not reached"):
        saliency(net, x, 0, site="unused")
    with pytest.raises(InputError, match=r"needs an nn\.Conv2d.*there are: 'stem'"):
        saliency(net, x, 0, site="norms.0", method="norm_grad_proper")
    with pytest.raises(InputError, match="targets"):
        saliency(net, x, "every", site="stem")
    with torch.no_grad():
        net.fc.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"NaN or infinities.*weights"):
        saliency(net, x, 0, site="stem")


def test_a_site_without_a_path_to_the_score_gives_zeros_and_a_warning():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.aside, self.main, self.fc = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3), nn.Linear(2, 3)

        def forward(self, x):
            self.aside(x)
            return self.fc(self.main(x).mean((2, 3)))

    x = torch.rand(1, 1, 6, 6)
    for sites in (["aside"], ["aside", "main"]):
        with pytest.warns(UserWarning, match="'aside': the score does not depend on it"):
            maps = saliency(Aside(), x, 0, site=sites)
        assert bool((maps["aside"] == 0).all())


def test_a_constant_map_normalises_to_zeros_and_warns():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with pytest.warns(UserWarning, match="2 of 2 maps are constant"):
        maps = saliency(net, torch.rand(2, 1, 8, 8), 0, site="1", method="gradient", normalise=True)
    assert bool((maps == 0).all())


def test_layouts():
    x = torch.arange(2 * 6 * 3.0).reshape(2, 6, 3)
    found = layout(x, "s", (8, 12), patch=(4, 4))(x)
    assert found.shape == (2, 3, 2, 3) and torch.equal(found[0, 1].flatten(), x[0, :, 1])
    registers = torch.cat([torch.full((2, 5, 3), -1.0), x], dim=1)
    assert torch.equal(layout(registers, "s", (8, 12), patch=(4, 4))(registers), found)
    merged = torch.rand(2, 6, 3)
    assert layout(merged, "s", (16, 24), patch=(4, 4))(merged).shape == (2, 3, 2, 3)
    assert layout(registers, "s", (8, 12), grid=(2, 3))(registers).shape == (2, 3, 2, 3)
    last = torch.rand(2, 4, 6, 32)
    assert torch.equal(layout(last, "s", (32, 48))(last), last.permute(0, 3, 1, 2))
    assert layout(last, "s", (32, 48), kind="channels_first")(last) is last
    with pytest.raises(InputError, match="no grid"):
        layout(torch.rand(1, 31, 3), "s", (10, 11))
    with pytest.raises(InputError, match="at most the 6 tokens"):
        layout(x, "s", (8, 12), grid=(3, 3))


FAMILIES = {
    "resnet": ("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}),
    "bottleneck": (
        "ResNet", {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "bottleneck"}
    ),
    "convnext": ("ConvNext", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}),
    "vit": (
        "ViT", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": (32, 48), "patch_size": 8}
    ),
    "dinov2": (
        "Dinov2WithRegisters", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "num_register_tokens": 4}
    ),
    "swin": (
        "Swin", {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "image_size": 32, "patch_size": 4}
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_models_need_no_site(family):
    transformers = pytest.importorskip("transformers")
    name, settings = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(num_labels=4, **settings)
    torch.manual_seed(0)
    net = getattr(transformers, f"{name}ForImageClassification")(config)
    x = torch.rand(2, 3, 32, 48 if family not in ("dinov2", "swin") else 32)
    site = default_site(net, x)
    for method in GRADIENT:
        maps = saliency(net, x, 1, method=method)
        assert maps.shape == (2, 1, *x.shape[-2:]) and torch.isfinite(maps).all()
        assert method in ("grad_cam", "linear_approx") or bool((maps != 0).any()), site
    if name == "ResNet":
        for method in RULES:
            assert torch.isfinite(saliency(net, x, 1, site="resnet.embedder", method=method)).all()
    else:
        with pytest.raises(InputError, match="no rule for"):
            saliency(net, x, 1, site=":in", method="excitation_backprop")
        with pytest.raises(InputError, match="no ReLU ran"):
            saliency(net, x, 1, site=":in", method="guided_backprop")


def test_targets_in_every_form_and_sizes_that_cannot_be():
    net, x = residual("module").float(), torch.rand(3, 2, 7, 9)
    expected = saliency(net, x, torch.tensor([2, 2, 2]), site="stem")
    for targets in (
        2,
        np.int64(2),
        torch.tensor(2),
        [2, 2, 2],
        np.array([2, 2, 2]),
        torch.full((3,), 2, dtype=torch.int32),
    ):
        torch.testing.assert_close(saliency(net, x, targets, site="stem"), expected)
    assert saliency(net, x, 2, site="stem", resize=(4, 5)).shape == (3, 1, 4, 5)
    for targets, message in [
        (-1, "label -1"),
        (4, "label 4"),
        (True, "got True"),
        (1.5, "got 1.5"),
        ([0, 1], "shape"),
    ]:
        with pytest.raises(InputError, match=f"targets: .*{message}"):
            saliency(net, x, targets, site="stem")
    for size in ((0, 5), (4, 5, 6), "small"):
        with pytest.raises(InputError, match="resize"):
            saliency(net, x, 2, site="stem", resize=size)
    assert combined_saliency(net, x, 2, site="norms.*").shape == (3, 1, 7, 9)
