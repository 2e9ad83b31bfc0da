"""Forwards that begin at a site give what the whole forward gives, and leave nothing on the model."""

import pytest
import torch
from tests.contracts.unchanged import unchanged
from torch import nn

from lineament.core.checks import InputError
from lineament.core.sites.families import hook_of_site, site_of_hook
from lineament.core.sites.hooks import replace
from lineament.core.sites.resuming import FromSite

HOOKS = ("hook_resid_pre", "hook_resid_post", "hook_mlp_out", "hook_attn_out", "attn.hook_z", "mlp.hook_post")


@pytest.mark.parametrize("family", ["gpt2", "pythia", "llama", "gemma2", "gemma3", "qwen3"])
def test_a_language_model_resumes_at_every_hook(family):
    from tests.contracts.language_models import tiny

    model, ids = tiny(family), torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    factors = torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(2).reshape(-1, 1, 1)

    def call(rows):
        return model(input_ids=rows, use_cache=False).logits

    for hook in HOOKS:
        site = site_of_hook(f"blocks.1.{hook}", model)
        assert hook_of_site(site, model) == f"blocks.1.{hook}"
        with unchanged(model), torch.no_grad(), replace(model, {site: lambda x: x * factors[: len(x)]}):
            start = FromSite(model, site, ids, call)
            with start.replayed(3):
                got = call(ids.repeat(3, 1))
            want = call(ids.repeat(3, 1))
        assert start.skipped
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_in_place_layers_and_modules_called_twice():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
            self.later, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

        def forward(self, x):
            x = self.act(self.norm(self.conv(x)))
            return self.head(self.act(self.later(x)).mean((2, 3)))

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(2, 3, 8, 8)
    with unchanged(net), torch.no_grad():
        start = FromSite(net, "later", x, net)
        with start.replayed(2):
            got = net(x.repeat(2, 1, 1, 1))
    assert start.skipped == ["conv", "norm", "act", "later"]
    torch.testing.assert_close(got, net(x).repeat(2, 1))


def test_a_site_that_is_reached_twice_is_refused():
    net = nn.Sequential(nn.Linear(2, 2))
    net.append(net[0])
    with pytest.raises(InputError, match="twice"):
        FromSite(net, "0", torch.ones(1, 2), net)


def test_hooks_without_a_site_are_refused_by_name():
    with pytest.raises(InputError, match=r"hook_scale.*hook_resid_pre"):
        site_of_hook("blocks.0.ln1.hook_scale", "gpt2-small")
    with pytest.raises(InputError, match="no known family"):
        site_of_hook("blocks.0.hook_resid_pre", "bloom-7b")
