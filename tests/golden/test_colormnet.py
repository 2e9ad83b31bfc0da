"""ColorMNet against the released code: its units, its memory, its scores, and the whole network with weights by formula."""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.golden.common import File, Scope, golden
from torch import Tensor, nn

from lineament.core.pictures import lab_to_rgb, psnr, rgb_to_lab, ssim
from lineament.modules.colormnet.blocks import DecoderCell, ObjectFusion, UpsampleBlock, ValueCell
from lineament.modules.colormnet.configuration import ColorMNetConfig
from lineament.modules.colormnet.features import FusionBlock, KeyProjection, resampled_positions
from lineament.modules.colormnet.film import Colorizing, Exemplar, FilmState, margins, padded
from lineament.modules.colormnet.local_attention import FORMS, LocalAttention
from lineament.modules.colormnet.memory import (
    Memory,
    MemoryOptions,
    joined,
    read_all,
    similarity,
    top_weights,
    usage_of,
    weighted_rows,
)
from lineament.modules.colormnet.memory import _memory_side as memory_side
from lineament.modules.colormnet.memory import _query_side as query_side
from lineament.modules.colormnet.naming import from_published, published_name, published_state
from lineament.modules.colormnet.network import ColorMNet
from lineament.modules.colormnet.scores import colour_consistency, colourfulness, psnr_legacy
from lineament.modules.colormnet.training import clip_losses

pytestmark = pytest.mark.slow


# Units -----------------------------------------------------------------------------------------------------------------------------


def loaded(case: Scope, unit: nn.Module, dtype: torch.dtype) -> Any:
    """The unit with the stored parameters, every one of which it has under its official name."""
    unit = unit.to(dtype).eval()
    state = {name: case.input(f"{case.name}_p_{name}").to(dtype) for name in case["parameters"]}
    unit.load_state_dict(state)
    return unit


def check_read(case: Scope, dtype: torch.dtype) -> None:
    mk, ms, qk, qe, mv = (case.input(name).to(dtype).flatten(2) for name in ("mk", "ms", "qk", "qe", "mv"))
    S = similarity(mk, ms, qk, qe)
    case.compare("sim", S, dtype)
    case.compare("sim_no_selection", similarity(mk, ms, qk, None), dtype)
    case.compare("sim_no_shrinkage", similarity(mk, None, qk, qe), dtype)
    case.compare("affinity", S.softmax(1), dtype)
    size = case.input("qk").shape[2:]
    case.compare("readout", read_all(mk, ms, qk, qe, mv).unflatten(2, size), dtype)
    dense, usage = [], []
    for sample in range(len(mk)):
        found = top_weights(memory_side(mk, ms)[sample], query_side(qk, qe)[sample], case["top_k"])
        dense.append(torch.zeros_like(S[sample]).scatter_(0, found.index.T, found.weight.T))
        usage.append(usage_of(found, mk.shape[2]))
        torch.testing.assert_close(
            weighted_rows([mv[sample].T.contiguous()], found).T, mv[sample] @ dense[-1]
        )
    case.compare("affinity_topk", torch.stack(dense), dtype)
    case.compare("usage_topk", torch.stack(usage), dtype)


def check_la(case: Scope, dtype: torch.dtype) -> None:
    q, k, v = (case.input(f"{case.name}_{name}").to(dtype) for name in "qkv")
    assert q.shape[1] == case["d_att"] * case["num_heads"]
    layer = LocalAttention(
        q.shape[1], v.shape[1], case["max_dis"], heads=case["num_heads"], kernel=case["depthwise_kernel"]
    )
    layer = loaded(case, layer, dtype)
    case.compare(f"{case.name}_attn", layer.weights(q, k), dtype)
    for form in FORMS:
        layer.form = form
        if form != "flex":  # compiled on GPUs; here a unit test sees to it
            case.compare(f"{case.name}_out", layer.mapped(q, k, v).flatten(2).permute(2, 0, 1), dtype)


def check_fusion(case: Scope, dtype: torch.dtype) -> None:
    semantics, detail = (case.input(f"{case.name}_{name}").to(dtype) for name in ("enc", "cnn"))
    block = FusionBlock(semantics.shape[1], detail.shape[1], case["num_heads"], eps=case["norm_eps"])
    block = loaded(case, block, dtype)
    case.compare(f"{case.name}_attn_only", block.attended(block.encode_enc(semantics), detail), dtype)
    case.compare(f"{case.name}_out", block(semantics, detail), dtype)


def check_keys(case: Scope, dtype: torch.dtype) -> None:
    x = case.input(f"{case.name}_x").to(dtype)
    width = len(case.input(f"{case.name}_p_key_proj.weight"))
    for name, found in zip(
        ("key", "shrink", "select"), loaded(case, KeyProjection(x.shape[1], width), dtype)(x)
    ):
        case.compare(f"{case.name}_{name}", found, dtype)


def check_value_cell(case: Scope, dtype: torch.dtype) -> None:
    g, h = (case.input(f"{case.name}_{name}").to(dtype) for name in "gh")
    case.compare(f"{case.name}_out", loaded(case, ValueCell(g.shape[2], h.shape[2]), dtype)(g, h), dtype)


def check_decoder_cell(case: Scope, dtype: torch.dtype) -> None:
    *g, h = (case.input(f"{case.name}_{name}").to(dtype) for name in ("g0", "g1", "g2", "h"))
    middle = len(case.input(f"{case.name}_p_g16_conv.weight"))
    cell = DecoderCell(tuple(x.shape[2] for x in g), middle, h.shape[2])
    case.compare(f"{case.name}_out", loaded(case, cell, dtype)(*g, h), dtype)


def check_object_fusion(case: Scope, dtype: torch.dtype) -> None:
    x, g = (case.input(f"{case.name}_{name}").to(dtype) for name in "xg")
    middle, outside = (len(case.input(f"{case.name}_p_block{k}.conv2.weight")) for k in (1, 2))
    unit = ObjectFusion(x.shape[1], g.shape[2], middle, outside, reduction=case["reduction_ratio"])
    case.compare(f"{case.name}_out", loaded(case, unit, dtype)(x, g), dtype)


def check_upsample(case: Scope, dtype: torch.dtype) -> None:
    skip, g = (case.input(f"{case.name}_{name}").to(dtype) for name in ("skip", "g"))
    outside = len(case.input(f"{case.name}_p_out_conv.conv2.weight"))
    unit = UpsampleBlock(skip.shape[1], g.shape[2], outside, factor=case["scale_factor"])
    case.compare(f"{case.name}_out", loaded(case, unit, dtype)(skip, g), dtype)


def check_memory(case: Scope, dtype: torch.dtype) -> None:
    names = ("key", "shrink", "select", "value", "query", "qselect")
    key, shrink, select, value, query, qselect = (
        case.input(f"{case.name}_{name}").to(dtype) for name in names
    )
    channels, width, h, w, steps = (int(v) for v in case["dims"])
    assert key.shape == (steps, 1, channels, h, w)
    assert value.shape == (steps, 1, case["num_objects"], width, h, w)
    # Usage is counted wherever there is a long-term memory, which the prototypes are chosen by.
    assert case["count_usage_working"]
    memory = Memory(
        MemoryOptions(
            top_k=case["top_k"], max_frames=case["max_mid_term_frames"], min_frames=case["min_mid_term_frames"],
            prototypes=case["num_prototypes"], max_long=case["max_long_term_elements"],
            long_term=case.get("enable_long_term", True), count_long=case["count_usage_long"],
        )
    )  # fmt: skip
    answers, sizes = [], []
    for step in range(steps):
        memory.add(key[step], shrink[step], select[step], value[step])
        sizes.append(memory.sizes)
        answers.append(memory.read(query[step], qselect[step])[0])
    case.compare(f"{case.name}_readout", torch.stack(answers), dtype)
    case.compare(f"{case.name}_sizes", torch.tensor(sizes), dtype)
    case.compare(f"{case.name}_work_use", lambda: joined([memory.working], "use")[None, None], dtype)
    long = memory.long
    if len(long):
        case.compare(f"{case.name}_long_key", joined([long], "key").T[None], dtype)
        case.compare(f"{case.name}_long_shrink", joined([long], "shrinkage").T[None], dtype)
        case.compare(
            f"{case.name}_long_value", joined([long], "value").T.unflatten(0, (case["num_objects"], -1)), dtype
        )  # fmt: skip
        case.compare(f"{case.name}_long_use", joined([long], "use")[None, None], dtype)
        case.compare(f"{case.name}_long_life", joined([long], "life")[None, None], dtype)


def pictures(x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return (x if x.ndim == 4 else x[None]).movedim(-1, 1).to(dtype)


def check_metrics(case: Scope, dtype: torch.dtype) -> None:
    for partner in case.file.partners("units_values"):
        check_scores(case, partner)
    if not case.has("img_a"):
        return
    offset, scale, chroma = case["lab_l_offset"], case["lab_l_scale"], case["lab_ab_scale"]
    rgb = pictures(case.input("img_a"), dtype) / case["data_range"]
    lab = rgb_to_lab(rgb)
    case.compare("lab_raw", lab[0].movedim(0, -1), dtype)
    centre = lab.new_tensor([offset, 0, 0])[:, None, None]
    width = lab.new_tensor([scale, chroma, chroma])[:, None, None]
    normal = (lab - centre) / width
    case.compare("lab_norm", normal[0].movedim(0, -1), dtype)
    case.compare("rgb_back", lab_to_rgb(normal * width + centre)[0].movedim(0, -1), dtype)


def check_scores(case: Scope, values: File) -> None:
    if case.has("vid"):
        values.compare("cdc", colour_consistency(case.input("vid")))
    if not case.has("img_a"):
        return
    a = case.input("img_a")
    values.compare("colorfulness_absolute_variant", colourfulness(a, absolute=True))
    values.compare("colorfulness_hasler_susstrunk", colourfulness(a))
    if case.has("img_b"):
        b, peak = case.input("img_b"), case["data_range"]
        values.compare("psnr_correct", psnr(pictures(a), pictures(b), peak=peak)[0])
        values.compare("psnr_with_uint8_wraparound", psnr_legacy(a, b))
        similar = ssim(pictures(a), pictures(b), peak=peak, window=case["ssim_window"], form="uniform")
        for array in values.arrays(r"ssim_default_window\d+"):
            values.compare(array, similar[0])


def check_positions(case: Scope, dtype: torch.dtype) -> None:
    table = case.input(f"{case.name}_in").to(dtype)
    grid, source = (tuple(int(v) for v in case[key]) for key in ("patch_grid", "source_grid"))
    found = resampled_positions(
        table, grid, offset=case["interpolate_offset"], mode=case["mode"], source=source
    )
    case.compare(f"{case.name}_out", found, dtype)


UNITS = {
    "memory_read": check_read,
    "local_attention": check_la,
    "fusion_block": check_fusion,
    "key_projection": check_keys,
    "value_recurrent_cell": check_value_cell,
    "decoder_recurrent_cell": check_decoder_cell,
    "feature_fusion_cbam": check_object_fusion,
    "decoder_upsample": check_upsample,
    "memory_manager": check_memory,
    "metrics": check_metrics,
    "position_embedding": check_positions,
}


def check_units(file: File) -> None:
    for name, values in file.spec["cases"].items():
        if file.only in ("", name):
            case = Scope(file, name, {**file.values, **values})
            check = UNITS[case["unit"]]
            # A case may be told of which the file has no array.
            first = {"memory_read": "mk", "metrics": "img_a|vid"}.get(
                case["unit"], rf"{re.escape(name)}_\w.*"
            )
            for dtype in file.dtypes if file.arrays(first) else ():
                check(case, dtype)


def check_unit_values(file: File) -> None:
    for array, match in file.arrays(r"pad_to_\d+\.\((\d+), (\d+)\)\.padded").items():
        height, width = (int(v) for v in match.groups())
        multiple = file["pad_multiple"]
        file.compare(array, torch.tensor(padded(torch.zeros(height, width), multiple).shape))
        sides = array.removesuffix("padded") + "left_right_top_bottom"
        file.compare(sides, torch.tensor(margins(height, width, multiple)))
    for partner in file.partners("units"):
        for name, values in partner.spec["cases"].items():
            case = Scope(partner, name, {**partner.values, **values})
            if case["unit"] == "metrics":
                check_scores(case, file)
            for told in values.values():  # what cases take from here
                if isinstance(told, dict) and told.get("from", "").startswith(file.path.name):
                    file.read(told["from"].split("#/")[1].replace("/", "."))


# The whole network -----------------------------------------------------------------------------------------------------------------


def by_formula(name: str, shape: torch.Size, phase: float) -> Tensor:
    count, last = shape.numel(), name.rsplit(".", 1)[-1]
    index = torch.arange(count, dtype=torch.float64)
    c = zlib.crc32(name.encode()) % 100003
    s = (index + 1).mul_(phase).mul_(1.2345678).add_(c * 0.7310585).sin_()
    s = s.mul_(1000.0).add_(index.mul_(0.618033988749895)).sin_()
    del index
    if last == "running_var":
        s = s.abs_().mul_(0.3).add_(1)
    elif last in ("running_mean", "bias"):
        s.mul_(0.05)
    elif last == "gamma":
        s.mul_(0.2).add_(0.5)
    elif last == "temperature":
        s.mul_(0.2).add_(1)
    elif last in ("cls_token", "pos_embed", "mask_token"):
        s.mul_(0.1)
    elif len(shape) <= 1:
        s.mul_(0.1).add_(1)
    else:
        s.mul_((2 / shape[1:].numel()) ** 0.5)
    return s.view(shape)


def skeleton(key: int, value: int, hidden: int) -> ColorMNet:
    with torch.device("meta"):
        config = ColorMNetConfig(key_width=key, value_width=value, hidden_width=hidden)
        return ColorMNet(config).double().eval().requires_grad_(False)


@functools.cache
def lengths(*widths: int) -> dict[str, int]:
    """How many rows each tensor has in a network of these widths."""
    return {name: len(x) for name, x in published_state(skeleton(*widths)).items() if x.ndim}


def widths_of(case: Scope) -> list[int]:
    return [int(case[f"{name}_dim"]) for name in ("key", "value", "hidden")]


FILLED: dict[
    str, Any
] = {}  # the one network that there is room for, the phase of each tensor, and what frames and clips showed


def network(case: Scope, part: str = "") -> ColorMNet:
    """The network with weights by formula, of which those of a part are sure to be filled."""
    widths = widths_of(case)
    if FILLED.get("widths") != widths:
        FILLED.clear()
        FILLED.update(widths=widths, model=skeleton(*widths).to_empty(device="cpu"), phases={}, seen={})
    model, phases, phase = FILLED["model"], FILLED["phases"], float(case["param_phase"])
    state = published_state(model)
    missing = {name for name in state if name.startswith(part) and phases.get(name) != phase}
    if missing:
        state |= {name: by_formula(name, state[name].shape, phase) for name in missing}
        from_published(model, state)
        phases.update(dict.fromkeys(missing, phase))
    return model


def once(what: list[Any], found: Callable[[], Any]) -> Any:
    """What depends on these settings alone is computed once."""
    told = repr(what)
    if told not in FILLED["seen"]:
        FILLED["seen"][told] = found()
    return FILLED["seen"][told]


def picture(t: int, phase: float, height: int, width: int) -> tuple[Tensor, Tensor]:
    y, x = torch.arange(height, dtype=torch.float64)[:, None], torch.arange(width, dtype=torch.float64)
    L = 0.5 * torch.sin(0.13 * x + 0.21 * t + phase) + 0.4 * torch.cos(0.17 * y - 0.1 * t + 2 * phase)
    a = 0.4 * torch.sin(0.05 * x + 0.03 * y + phase + 0.1 * t)
    b = 0.4 * torch.cos(0.04 * x - 0.06 * y + 3 * phase - 0.1 * t)
    return L[None, None], torch.stack([a, b])[None]


@torch.no_grad()
def features_of(case: Scope, model: ColorMNet, L: Tensor) -> Any:
    """The features of a frame, which no setting of memory changes."""
    frame = padded(L, case["pad_multiple"]).expand(-1, 3, -1, -1)
    told = [case["param_phase"], frame.shape, float(frame.sum()), float(frame.square().sum())]
    return once(told, lambda: model.encode_frame(frame))


def check_network(file: File) -> None:
    for values in file.spec["cases"].values() or [{}]:
        case = Scope(file, "", {**file.values, **values})
        widths_fit(case)
        height, width, phase = int(case["H"]), int(case["W"]), float(case["frame_phase"])
        L, ab = picture(0, phase, height, width)
        frame, colours = (padded(x, case["pad_multiple"]) for x in (L.expand(-1, 3, -1, -1), ab))
        semantics = network(case, "key_encoder.network2.").key_encoder.network2(frame)
        case.compare("dino", semantics[0, :: case["stride_dino"]])
        model = network(case)
        features = features_of(case, model, L)
        for name, found in zip(("key", "shrink", "select"), features):
            case.compare(name, found[0])
        strides = {name: case[f"stride_{name}"] for name in ("f16", "f8", "f4")}
        case.compare("f16", features.f16[0, :: strides["f16"]])
        for name, found in (("f8", features.f8), ("f4", features.f4)):
            channel, row, column = strides[name]
            case.compare(name, found[0, ::channel, ::row, ::column])
        with torch.no_grad():
            start = model.empty_hidden(features.key)
            value, hidden = model.encode_value(frame, features.f16, start, colours)
        case.compare("value", value[0, :, :: case["stride_value"]])
        case.compare("hidden", hidden[0, :, :: case["stride_hidden"]])
        step = case["stride_ab_out"]
        found = clip(case, model, file.partners("network_values"))
        case.compare("ab_out_every8", found[..., ::step, ::step])


def widths_fit(case: Scope) -> None:
    """What has other widths is known before a hundred million weights are filled."""
    rows = lengths(*widths_of(case))
    for name, part in (("key", "key_proj.key_proj"), ("select", "key_proj.e_proj")):
        if case.has(name):
            assert rows[f"{part}.weight"] == case.length(name)
    for name, part, divisor in (
        ("value", "value_encoder.fuser.block2.conv2", 1),
        ("hidden", "value_encoder.hidden_reinforce.transform", 3),
    ):
        if case.has(name):
            width = rows[f"{part}.weight"] // divisor
            assert -(-width // case[f"stride_{name}"]) == case.file.data[name].shape[1]


@functools.cache
def small_network() -> ColorMNet:
    return ColorMNet(ColorMNetConfig.tiny(dino_patch=14, dino_image=56)).double().eval()


def clip(case: Scope, model: ColorMNet, values: list[File]) -> Tensor:
    """The output of each frame; its statistics and the memory's sizes are compared with ``values``."""
    names = [
        "max_mid_term_frames", "min_mid_term_frames", "max_long_term_elements", "num_prototypes", "top_k", "mem_every",
        "enable_long_term", "enable_long_term_count_usage", "deep_update_every", "local_source", "first_frame_is_exemplar",
        "exemplar_phase", "frame_phase", "H", "W", "T", "pad_multiple", "param_phase",
    ]  # fmt: skip
    told = [case[name] for name in names]
    # The sizes do not depend on the weights: a small network has them too, at once.
    tiny = small_network()
    assert tiny.config.multiple == case["pad_multiple"]
    sizes = once(["sizes", *told], lambda: coloured(case, tiny, whole=False)[1])
    for file in values:
        file.compare("memory_sizes_after_each_frame", sizes)
    found, sizes = once(["clip", *told], lambda: coloured(case, model))
    for file in values:
        file.compare("memory_sizes_after_each_frame", sizes)
        file.compare("ab_mean", found.flatten(1).mean(1))
        file.compare("ab_std", found.flatten(1).std(1, correction=0))
    return found


def coloured(case: Scope, model: ColorMNet, *, whole: bool = True) -> tuple[Tensor, Tensor]:
    """The output of each frame, and the memory's sizes after it."""
    deep = case["deep_update_every"]
    options = Colorizing.published(
        memory=MemoryOptions(
            top_k=case["top_k"], max_frames=int(case["max_mid_term_frames"]), min_frames=int(case["min_mid_term_frames"]),
            prototypes=int(case["num_prototypes"]), max_long=int(case["max_long_term_elements"]),
            long_term=bool(case["enable_long_term"]), count_long=bool(case["enable_long_term_count_usage"]),
        ),
        every=int(case["mem_every"]), local_source=case["local_source"],
        deep_every=None if deep == "memory_frames" else int(deep),
    )  # fmt: skip
    film, length, phase = FilmState(model, options), int(case["T"]), float(case["frame_phase"])
    height, width = int(case["H"]), int(case["W"])
    found, sizes = [], []
    for t in range(length):
        L, ab = picture(t, phase, height, width)
        told: dict[str, Any] = {"features": features_of(case, model, L)} if whole else {}
        if t == 0 and case["first_frame_is_exemplar"]:
            told |= {"given": ab}
        elif t == 0:
            told |= {"exemplars": [Exemplar(*picture(0, float(case["exemplar_phase"]), height, width))]}
        found.append(film.step(L, **told, last=t == length - 1)[0])
        sizes.append(film.memory.sizes)
    return torch.stack(found), torch.tensor(sizes)


def check_network_values(file: File) -> None:
    for partner in file.partners("network"):
        case = Scope(partner, "", partner.values)
        for told in partner.spec["defaults"].values():
            if isinstance(told, dict) and told.get("from", "").startswith(file.path.name):
                file.read(told["from"].split("#/")[1].replace("/", "."))
        if partner.path.stem == file.path.stem or not partner.path.with_suffix(".json").exists():
            if file.has("ab_mean"):
                clip(case, network(case), [file])
            if file.has("train_total"):
                check_training(file, case)
            break


def check_training(file: File, case: Scope) -> None:
    height, width = (int(v) for v in file["train_size"])
    length = int(file["train_frames"])
    assert height % case["pad_multiple"] == width % case["pad_multiple"] == 0
    assert file["train_memory"] == "all earlier frames" and file["train_top_k"] is None
    assert file["train_local_source"] == "previous" and file.length("train_l1") == length - 1
    clips = [picture(t, float(case["frame_phase"]), height, width) for t in range(length)]
    L, ab = (torch.stack(list(part), 1) for part in zip(*clips))
    deep = [t in file["train_deep_update_frames"] for t in range(length)]
    decoder = [t in file["train_decoder_hidden_update_frames"] for t in range(length)]
    model = network(case)
    told = ["training", height, width, length, deep, decoder, case["param_phase"], case["frame_phase"]]
    if FILLED.get("training", [None])[0] != told:  # one graph at a time
        FILLED["training"] = [told, *trained(model, L, ab, deep, decoder)]
    _, losses, find = FILLED["training"]
    file.compare("train_l1", losses)
    file.compare("train_total", losses.sum())
    found = once([*told, "gradients"], find)
    for array, match in file.arrays(r"train_grad\.(.+)\.norm").items():
        first = f"train_grad.{match[1]}.first"
        norm, entries = found[match[1]]
        file.compare(array, norm)
        file.compare(first, entries[: file.length(first)])
    without = {name for name, gradient in found.items() if gradient is None}
    for group in file.input("train_params_without_gradient"):
        inside = {name for name in found if name.startswith(group + ".")}
        assert inside and inside <= without
        without -= inside
    assert not without, f"no gradient reaches {without}"


def trained(model: ColorMNet, L: Tensor, ab: Tensor, deep: list[bool], decoder: list[bool]) -> Any:
    """The loss of each frame, and what finds norm and first entries of each gradient, None where none arrives, by official names."""
    model.requires_grad_(True)
    losses = clip_losses(model, L, ab, deep=deep, decoder=decoder)
    model.requires_grad_(False)

    def gradients() -> dict[str, tuple[Tensor, Tensor] | None]:
        model.requires_grad_(True)
        named = [(published_name(name)[0], parameter) for name, parameter in model.named_parameters()]
        found = torch.autograd.grad(losses.sum(), [p for _, p in named], allow_unused=True)
        model.requires_grad_(False)
        return {
            name: None if g is None else (g.norm(), g.flatten()[:64].clone())
            for (name, _), g in zip(named, found)
        }

    return losses, gradients


CHECKS = {
    "units": check_units,
    "units_values": check_unit_values,
    "network": check_network,
    "network_values": check_network_values,
}
test_golden, test_a_wrong_number_is_noticed = golden(
    "colormnet",
    CHECKS,
    fixed=(
        "units:vid",  # consistency knows no order of time, place or channel
        # The stored clip is consolidated once, so that nothing is forgotten.
        "network:max_long_term_elements",
        "network:enable_long_term_count_usage",
    ),
)
