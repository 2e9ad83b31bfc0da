"""What a training will save is checked before its first step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lineament.cli import main
from lineament.core.checks import InputError
from lineament.load.weights import require_savable

SHARING = {
    "transposed tie": "b.weight = nn.Parameter(a.weight.data.t())",
    "overlapping slices": "w = torch.zeros(4, 3); a.weight, b.weight = nn.Parameter(w[:3]), nn.Parameter(w[1:])",
    "slices of one buffer": "w = torch.zeros(6, 3); a.weight, b.weight = nn.Parameter(w[:3]), nn.Parameter(w[3:])",
    "one tensor": "b.weight = a.weight",
    "apart": "pass",
}


def network(change):
    a, b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    exec(change, {"torch": torch, "nn": nn, "a": a, "b": b})
    return nn.Sequential(a, b)


@pytest.mark.parametrize("kind", SHARING)
def test_weights_that_share_memory(kind):
    if kind in ("one tensor", "apart"):
        return require_savable(network(SHARING[kind]))
    with pytest.raises(InputError, match=r"weights 0\.weight, 1\.weight share memory and could not be saved"):
        require_savable(network(SHARING[kind]))


def test_the_command_refuses_them_before_an_epoch(tmp_path, capsys):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\ndef make():\n    a, b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)\n"
        f"    {SHARING['transposed tie']}\n    return nn.Sequential(a, b)\n"
    )
    np.savez(tmp_path / "d.npz", x=np.zeros((6, 3)), y=np.arange(6) % 3)
    assert main(["train", f"{tmp_path}/net.py:make", f"{tmp_path}/d.npz", "--out", str(tmp_path / "t")]) == 2
    assert "share memory" in capsys.readouterr().err and not (tmp_path / "t").exists()
