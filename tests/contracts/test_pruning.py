"""What pruning keeps on every family of networks: the network as it was, a smaller one of the same class, errors that compensation never raises."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map

from lineament import edit
from lineament.core.models import called
from lineament.edit import PruneOptions, prune
from tests.contracts.surgery_networks import FAMILIES, made
from tests.contracts.unchanged import unchanged


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned(family, tmp_path):
    net, example = made(family)
    with unchanged(net):
        found = prune(net, [example], keep=0.5, recalibrate=False)
    assert type(found.model) is type(net) and found.parameters[1] < found.parameters[0]
    assert all(after < before or before == 1 for before, after in found.sizes.values())
    assert all(repaired <= cut * (1 + 1e-6) + 1e-9 for cut, repaired in found.errors.values())
    with torch.no_grad():
        answer = called(found.model, example)
        whole = prune(net, [example], keep=1.0, recalibrate=False).model
        same = called(whole, example)
        straight = called(net, example)
    for a, b in zip(*(tree_leaves(v) for v in (same, straight))):
        torch.testing.assert_close(a, b)
    assert all(t.isfinite().all() for t in tree_leaves(answer))
    folder = edit.save(found.model, tmp_path)
    again = edit.load(folder, lambda: made(family, seed=3)[0]).eval()
    with torch.no_grad():
        for a, b in zip(tree_leaves(called(again, example)), tree_leaves(answer)):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def tree_leaves(value) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    tree_map(lambda t: found.append(t) if torch.is_tensor(t) and t.is_floating_point() else None, value)
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_language_models_open_alone(family, tmp_path):
    from transformers import AutoModelForCausalLM

    net, example = made(family)
    found = prune(net, [example], keep=0.5)
    assert found.criterion == ("saliency" if family == "gpt2" else "energy")
    found.save(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(called(again, example).logits, called(found.model, example).logits)
    free = prune(net, [example], keep=0.5, options=PruneOptions(sites="*0*"))
    free.save(tmp_path / "free")
    assert not (tmp_path / "free" / "config.json").exists()
    assert edit.load(tmp_path / "free", lambda: made(family, seed=2)[0]) is not None
