"""Perplexity in sliding windows: every token but the first counts once, with what its window holds of its past."""

from __future__ import annotations

import math

import pytest
import torch
from tests.unit.modules.sparse_attention.models import made

from lineament.core.checks import InputError
from lineament.modules.sparse_attention.perplexity import sliding_perplexity


def test_every_token_but_the_first_is_counted_once_with_its_past() -> None:
    model, ids = made("llama"), torch.arange(50).repeat(2)[:77]
    found = sliding_perplexity(model, ids, context=77, stride=3)
    expected = float(model(ids[None], labels=ids[None]).loss.detach())
    assert found.tokens == 76 and found.loss == pytest.approx(expected, rel=1e-5) and math.isnan(found.error)
    windows = sliding_perplexity(model, ids, context=20, stride=7, batch_size=3)
    single = sliding_perplexity(model, ids, context=20, stride=7)
    assert windows.tokens == 76 and windows.loss == pytest.approx(single.loss, rel=1e-5)
    one = sliding_perplexity(model, ids[-20:], context=19, stride=1)
    with torch.no_grad():
        last = torch.log_softmax(model(ids[None, -19:]).logits, -1)[0, -2, ids[-1]]
    assert one.by_window[-1].item() == pytest.approx(-float(last), rel=1e-4)
    assert one.perplexity == pytest.approx(math.exp(one.loss))
    with pytest.raises(InputError, match="less than the context"):
        sliding_perplexity(model, ids, context=8, stride=8)
