"""What every dictionary keeps: the protocol of ``lineament.core.codes``, whatever its rule of what is on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lineament.core.checks import InputError
from lineament.core.codes import Codes, Dictionary
from tests.contracts.dictionaries import MEMBERS, D, made


@pytest.fixture(params=MEMBERS, ids=list(MEMBERS))
def member(request: Any) -> Any:
    return made(request.param)


def rows(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed)).abs()


def test_it_is_a_dictionary(member: Any) -> None:
    assert isinstance(member, Dictionary)
    assert member.site == "layer" and member.atoms.shape[1] == D and not member.atoms.requires_grad


@pytest.mark.parametrize("shape", [(7,), (2, 3), (), (1,), (0,), (0, 3)], ids=str)
def test_shapes_and_codes_equal_encode(member: Any, shape: tuple[int, ...]) -> None:
    x, width = rows(*shape), len(member.atoms)
    codes, dense = member.codes(x), member.encode(x)
    assert dense.shape == (*shape, width) and codes.indices.dtype == torch.int64
    assert codes.width == width and codes.values.shape[:-1] == shape
    assert torch.allclose(codes.dense(), dense, atol=1e-6)
    for given in (codes, dense):
        assert member.decode(given).shape == x.shape
    assert torch.allclose(member.decode(codes), member.decode(dense), atol=1e-5)


def test_decode_is_affine_with_the_atoms(member: Any) -> None:
    width = len(member.atoms)
    zero = member.decode(torch.zeros(width))
    f, g = torch.rand(2, 4, width, generator=torch.Generator().manual_seed(2))
    sum_of = member.decode(f + 2 * g) - zero
    assert torch.allclose(sum_of, (member.decode(f) - zero) + 2 * (member.decode(g) - zero), atol=1e-4)
    assert torch.allclose(member.decode(torch.eye(width)) - zero, member.atoms, atol=1e-5)


def test_round_trip_through_a_folder(member: Any, tmp_path: Any) -> None:
    member.info = {"model": "none", "tokens": 3}
    member.save_pretrained(tmp_path / "it")
    again = type(member).from_pretrained(tmp_path / "it")
    x = rows(5)
    assert torch.equal(again.encode(x), member.encode(x)) and torch.equal(again.atoms, member.atoms)
    assert again.site == member.site and again.info == member.info and again.settings == member.settings
    (tmp_path / "it" / "dictionary.safetensors").write_bytes(b"{}")
    with pytest.raises(InputError, match="SHA-256 differs"):
        type(member).from_pretrained(tmp_path / "it")
    (tmp_path / "it" / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no .config\.json."):
        type(member).from_pretrained(tmp_path / "it")


def test_nothing_changes_with_chunks_threads_and_memory_layout(member: Any, monkeypatch: Any) -> None:
    x = rows(40)
    whole = member.codes(x).dense()
    spread = torch.stack([x, x], -1)[..., 0]  # the same numbers, not contiguous
    assert torch.equal(member.codes(spread).dense(), whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.allclose(member.codes(x).dense(), whole, atol=1e-5)
        assert torch.equal(member.codes(x).dense() != 0, whole != 0)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr("lineament.dictionaries.topk.select.BYTES", 4 * len(member.atoms) * 7)
    chunked = member.codes(x).dense()
    assert torch.equal(chunked != 0, whole != 0) and torch.allclose(chunked, whole, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_computes_in_the_dtype_of_its_weights(member: Any, dtype: torch.dtype) -> None:
    x = rows(4)
    codes = member.to(dtype).codes(x.to(torch.bfloat16))
    assert codes.values.dtype == dtype and member.decode(codes).dtype == dtype


def test_bad_input_is_refused(member: Any) -> None:
    with pytest.raises(InputError, match=f"x: got a float32 tensor of shape \\(3, {D + 1}\\).*{D}"):
        member.encode(torch.zeros(3, D + 1))
    bad = rows(5)
    bad[1, 0], bad[3, 2] = float("nan"), float("inf")
    with pytest.raises(InputError, match="rows 1, 3 hold NaN"):
        member.codes(bad)
    with pytest.raises(InputError, match="floating-point"):
        member.codes(torch.ones(3, D, dtype=torch.long))
    width = len(member.atoms)
    with pytest.raises(InputError, match="codes"):
        member.decode(torch.zeros(2, width + 1))
    with pytest.raises(InputError, match="codes"):
        member.decode(Codes(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1), width + 1))
