"""A film coloured: the network, the loop, and what bad input gets."""

import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError
from lineament.core.pictures import rgb_to_lab
from lineament.modules.colormnet import network
from lineament.modules.colormnet.colorize import Colorizer, as_rgb, colorize, suggest
from lineament.modules.colormnet.configuration import ColorMNetConfig
from lineament.modules.colormnet.features import conv_of_upsampled, upsampled
from lineament.modules.colormnet.film import Colorizing, FilmState, margins, padded, unpadded
from lineament.modules.colormnet.memory import MemoryOptions
from lineament.modules.colormnet.naming import from_official, published_state
from lineament.modules.colormnet.network import ColorMNet
from lineament.modules.colormnet.scores import colour_consistency, psnr_legacy
from lineament.modules.colormnet.training import clip_losses


@pytest.fixture(scope="module")
def model() -> ColorMNet:
    torch.manual_seed(0)
    return ColorMNet(ColorMNetConfig.tiny(value_depths=(1, 1, 1))).eval()


def film(count: int, height: int = 32, width: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (height, width + count), dtype=np.uint8)
    return [np.ascontiguousarray(base[:, t : t + width]) for t in range(count)]


def coloured(grey: np.ndarray, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (*grey.shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(112, 112), (100, 113), (480, 854), (1, 1)])
def test_padding_comes_off_again(size):
    x = torch.rand(1, 2, *size)
    sides = margins(*size, 112)
    large = padded(x, 112)
    assert (
        not any(side % 112 for side in large.shape[2:])
        and sides[1] - sides[0] in (0, 1)
        and sides[3] - sides[2] in (0, 1)
    )
    assert torch.equal(unpadded(large, sides), x)


@pytest.mark.parametrize("factor", [2, 4])
def test_a_convolution_of_an_upsampled_map_is_made_at_the_small_size(factor):
    conv, x = nn.Conv2d(24, 6, 3, padding=1).double(), torch.randn(2, 24, 3, 4, dtype=torch.float64)
    small = conv_of_upsampled(conv, x, factor)
    torch.testing.assert_close(small, conv(upsampled(x, factor)))
    # The cheaper order is what was used: it would not be in place of itself.
    assert small.shape == (2, 6, 3 * factor, 4 * factor)


def test_swapped_chroma_swaps_the_output_without_local_attention():
    torch.manual_seed(0)
    model = ColorMNet(ColorMNetConfig.tiny(window=0)).double().eval()
    lightness = [torch.rand(1, 1, 32, 32, dtype=torch.float64) for _ in range(3)]
    ab = torch.rand(1, 2, 32, 32, dtype=torch.float64) - 0.5
    runs = []
    for colours in (ab, ab.flip(1)):
        state = FilmState(model, Colorizing(every=1))
        state.step(lightness[0], given=colours)
        runs.append([state.step(x) for x in lightness[1:]])
    for one, other in zip(*runs):
        torch.testing.assert_close(one, other.flip(1))


def test_saved_and_read_again(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = ColorMNet.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config\.json"):
        ColorMNet.from_pretrained(tmp_path)


def test_a_pickle_with_code_is_refused(tmp_path):
    torch.save({"key_proj.key_proj.weight": print}, tmp_path / "bad.pth")
    with pytest.raises(InputError, match=r"holds .*beside tensors"):
        from_official(tmp_path / "bad.pth")
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="expected a checkpoint of ColorMNet"):
        from_official(tmp_path / "other.pth")


def test_published_names_of_either_transformers(model):
    names = set(published_state(model))
    assert {
        "key_encoder.network2.backbone.blocks.0.attn.qkv.weight",
        "key_encoder.conv1.weight",
        "value_encoder.layer1.0.bn1.running_var",
    } <= names
    from lineament.modules.colormnet.naming import published_name

    vit = "key_encoder.network2.backbone.encoder.layer.3.attention."
    assert published_name(f"{vit}attention.query.weight") == published_name(f"{vit}q_proj.weight")
    assert published_name(f"{vit}output.dense.bias") == published_name(f"{vit}o_proj.bias")


def test_no_gradient_reaches_the_semantics(model):
    model = copy.deepcopy(model).requires_grad_()
    L, ab = torch.rand(1, 3, 1, 32, 32), torch.rand(1, 3, 2, 32, 32)
    clip_losses(model, L, ab, deep=[True, True, False]).sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without and all(name.startswith("key_encoder.network2.") for name in without)
    assert without == {
        name for name, _ in model.named_parameters() if name.startswith("key_encoder.network2.")
    }


SMALL = MemoryOptions(top_k=5, max_frames=4, min_frames=2, prototypes=3, max_long=9)


def test_streaming_is_batch(model):
    frames, options = film(8), Colorizing(every=1, memory=SMALL)
    given = {0: coloured(frames[0])}
    whole = list(colorize(frames, given, model, options=options))
    taken = 0

    def stream():
        nonlocal taken
        for frame in frames:
            taken += 1
            yield frame

    for count, (found, same) in enumerate(zip(colorize(stream(), given, model, options=options), whole), 1):
        assert torch.equal(found.picture, same.picture)
        assert taken <= count + 1  # one frame is looked ahead, to know the last


def test_memory_is_bounded_over_a_long_film(model):
    state, sizes = FilmState(model, Colorizing.published(every=1, memory=SMALL)), []
    for t in range(60):
        grey = torch.rand(1, 1, 16, 32, generator=torch.Generator().manual_seed(t)) - 0.5
        state.step(grey, given=torch.zeros(1, 2, 16, 32) if t == 0 else None)
        sizes.append(sum(state.memory.sizes))
    assert max(sizes) <= 3 * 2 + 9 and sizes[-1] > 6


@pytest.mark.parametrize("options", [Colorizing(every=2, flip=True), Colorizing.published(every=1)])
def test_a_stored_state_goes_on_with_the_same_bits(model, tmp_path, options):
    frames = film(12)
    options = replace(options, memory=MemoryOptions(top_k=3, max_frames=3, min_frames=1, prototypes=2))
    whole = [x.picture for x in colorize(frames, {0: coloured(frames[0])}, model, options=options)]
    found: list[torch.Tensor] = []
    for _ in range(2):  # killed in the seventh frame, and started again
        colorizer, found = Colorizer(model, options), []
        for t in Checkpoint(tmp_path / "state", {}).loop(
            "film", 12, {"film": colorizer, "found": found}, every=2
        ):
            shown = coloured(frames[0]) if t == 0 else None
            found.append(colorizer.frame(frames[t], shown, last=t == 11).picture)
            if t == 6 and len(list(tmp_path.glob("seen"))) == 0:
                (tmp_path / "seen").touch()
                break
    assert len(found) == 12 and all(torch.equal(a, b) for a, b in zip(found, whole))


def test_the_frame_keeps_its_lightness(model):
    frames = [np.full((32, 32), 120, dtype=np.uint8)] * 2
    found = list(colorize(frames, {0: coloured(frames[0])}, model))
    lab = rgb_to_lab(as_rgb("frame", frames[1]))
    inside = rgb_to_lab(as_rgb("found", found[1].picture))
    assert (inside[0] - lab[0]).abs().median() < 3
    assert found[1].ab.shape == (2, 32, 32) and 0 <= found[1].confidence <= 1


@pytest.mark.parametrize(
    "how",
    ["flip", "max_side", "guided", "memory", "replicate", "no_long", "sliding", "cuts", "reverse", "parity"],
)
def test_each_option_colours_the_film(model, how):
    frames = film(4, 48, 64)
    options = {
        "flip": {"flip": True}, "max_side": {"max_side": 32}, "guided": {"max_side": 32, "guided": True}, "memory": {"local_source": "memory"},
        "replicate": {"padding": "replicate"}, "no_long": {"memory": MemoryOptions(long_term=False)}, "sliding": {"permanent": 1},
        "cuts": {"cuts": 1e-6},
    }.get(how)  # fmt: skip
    first = 3 if how == "reverse" else 0
    told = {"reverse": how == "reverse", "parity": how == "parity"}
    found = list(
        colorize(
            frames,
            {first: coloured(frames[0])},
            model,
            options=None if options is None else Colorizing(**options),
            **told,
        )
    )
    assert [x.index for x in found] == ([3, 2, 1, 0] if how == "reverse" else [0, 1, 2, 3])
    assert all(x.picture.shape == (48, 64, 3) and x.picture.dtype == torch.uint8 for x in found)
    assert any(x.cut for x in found) == (how == "cuts")


def test_a_given_cut_is_a_cut_that_was_found(model):
    """The frame is remembered, and what came before is forgotten but for exemplars."""
    states = [FilmState(model, Colorizing(every=2, cuts=cuts)) for cuts in (None, 1e-6)]
    for t, frame in enumerate(film(4)):
        L = torch.from_numpy(frame)[None, None] / 255
        given = torch.zeros(1, 2, 32, 40) if t == 0 else None
        found = [state.step(L, given=given, scene=t == 3) for state in states]
        if t == 2:
            assert states[0].memory.sizes == (6, 0) == states[1].memory.sizes
    assert states[0].cut and states[1].cut and states[0].memory.sizes == (6, 0) == states[1].memory.sizes
    assert len(states[0].memory.permanent) == 1 and found[0].shape == found[1].shape


def test_a_scene_that_begins_with_an_exemplar_forgets_the_one_before(model):
    state, dark = FilmState(model, Colorizing(every=1, cuts=0.05)), film(3)
    for t, frame in enumerate([*dark, 255 - dark[0]]):
        L = torch.from_numpy(frame)[None, None] / 127.5 - 1
        state.step(L, given=torch.zeros(1, 2, 32, 40) if t in (0, 3) else None)
    assert state.cut and state.memory.sizes == (0, 0) and len(state.memory.permanent) == 2


def test_a_flipped_film_with_flip_is_the_flipped_result(model):
    frames = film(3)
    given = coloured(frames[0])
    options = Colorizing(flip=True)
    one = list(colorize(frames, {0: given}, model, options=options))
    other = list(colorize([x[:, ::-1] for x in frames], {0: given[:, ::-1]}, model, options=options))
    for a, b in zip(one, other):
        assert (a.ab - b.ab.flip(-1)).abs().max() < 1e-3


def test_one_frame_with_a_separate_exemplar(model):
    [frame] = film(1)
    for parity in (False, True):
        [found] = colorize([frame], {0: coloured(frame)[:20, :20]}, model, parity=parity)
        assert found.picture.shape == (32, 40, 3)


@pytest.mark.parametrize("weights", [(0.299, 0.587, 0.114), (0.2126, 0.7152, 0.0722)])
def test_the_frame_in_colour_is_known_by_its_luma(model, weights):
    """A film is made grey by luma, which is no function of Lab's lightness."""
    rgb = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    grey = (rgb @ np.array(weights)).round().astype(np.uint8)
    [found] = colorize([grey], {0: rgb}, model)
    [other] = colorize([grey], {0: rgb[::-1].copy()}, model)
    assert found.confidence == 1 and other.confidence < 1
    assert (found.ab - rgb_to_lab(as_rgb("picture", rgb))[1:]).abs().max() < 1e-3


def test_an_exemplar_is_used_once(model):
    frames = film(6)
    state = FilmState(model, Colorizing(every=100))
    list(colorize(frames, {0: coloured(frames[0]), 3: coloured(frames[3], 5)}, model))
    for t in range(6):
        L = torch.from_numpy(frames[t])[None, None] / 255
        state.step(L, given=torch.zeros(1, 2, 32, 40) if t in (0, 3) else None)
    assert len(state.memory.permanent) == 2


def test_the_model_is_left_as_it_was(model):
    model.train()
    try:
        frames = film(2)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        list(colorize(frames, {0: coloured(frames[0])}, model))
        assert model.training
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    finally:
        model.eval()


def test_suggested_frames_begin_with_the_first(model):
    dark, light = np.zeros((32, 32), np.uint8), np.full((32, 32), 250, np.uint8)
    assert suggest([dark, dark, light, dark], 2, model) == [0, 2]
    assert suggest([dark], 5, model) == [0]


BAD = {
    "none is for frame 0": lambda m: colorize(film(2), {1: coloured(film(1)[0])}, m),
    "expected at least one, for the first frame": lambda m: colorize(film(2), {}, m),
    "frame 1: is 32 x 30, the first was 32 x 40": lambda m: list(colorize([film(1)[0], film(1, 32, 30)[0]], {0: coloured(film(1)[0])}, m)),
    r"frame 0: has values from 0 to 255, expected \[0, 1\]": lambda m: list(colorize([film(1)[0] * 0.0 + [[0] * 39 + [255.0]]], {0: coloured(film(1)[0])}, m)),
    "got none, expected at least one picture": lambda m: list(colorize([], {0: coloured(film(1)[0])}, m)),
    "frame 0: got an int64 array": lambda m: list(colorize([film(1)[0].astype(np.int64)], {0: coloured(film(1)[0])}, m)),
    "expected a sequence": lambda m: colorize(iter(film(2)), {0: coloured(film(1)[0])}, m, reverse=True),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input(model, message):
    with pytest.raises(InputError, match=message):
        BAD[message](model)


@pytest.mark.parametrize(("picture", "message"), [("grey", "is grey"), ("wide", "stretched")])
def test_doubtful_exemplars_are_told(model, picture, message):
    frames = film(1)
    given = {"grey": frames[0], "wide": coloured(np.zeros((16, 90)))}[picture]
    with pytest.warns(UserWarning, match=message):
        list(colorize(frames, {0: given}, model))


def test_exemplars_past_the_end_are_told(model):
    with pytest.warns(UserWarning, match=r"frames \[7\] were not used"):
        list(colorize(film(2), {0: coloured(film(1)[0]), 7: coloured(film(1)[0])}, model))


def test_pictures_of_every_kind():
    from PIL import Image

    rgb = coloured(film(1)[0])
    plain = as_rgb("x", rgb)
    for same in (torch.from_numpy(rgb), rgb / 255.0, Image.fromarray(rgb), np.dstack([rgb, rgb[..., 0]])):
        assert (as_rgb("x", same) - plain).abs().max() < 1e-6
    assert as_rgb("x", Image.fromarray(rgb).convert("CMYK")).shape == plain.shape
    deep = Image.fromarray(rgb[..., 0].astype(np.uint16) * 257)
    assert (as_rgb("x", deep)[0] - plain[0]).abs().max() < 1e-6


def test_consistency_knows_no_places_and_legacy_psnr_has_a_floor():
    rng = torch.Generator().manual_seed(0)
    clip = torch.randint(0, 256, (6, 5, 4, 3), dtype=torch.uint8, generator=rng)
    order = torch.randperm(20, generator=rng)
    moved = clip.flatten(1, 2)[:, order].view_as(clip)
    assert abs(colour_consistency(clip) - colour_consistency(moved)) < 1e-12
    assert colour_consistency(clip[:1].expand(6, -1, -1, -1)) == 0
    with warnings.catch_warnings():
        assert psnr_legacy(clip[0], clip[1]) >= 24
    assert psnr_legacy(clip[0] * 0, clip[0] * 0 + 255) == pytest.approx(48.13, abs=0.01)


def test_decoding_in_strips_changes_nothing(monkeypatch):
    """A strip has the rows around it that its convolutions read; with gradients, all is decoded at once."""
    torch.manual_seed(0)
    model = ColorMNet(ColorMNetConfig.tiny()).eval().double()
    frame, ab = 2 * torch.rand(1, 3, 112, 48).double() - 1, torch.rand(1, 2, 112, 48).double()
    found = []
    with torch.no_grad():
        features = model.encode_frame(frame)
        hidden = model.empty_hidden(features.key)
        value, hidden = model.encode_value(frame, features.f16, hidden, ab)
        for rows in (100, 4, 3, 1):
            monkeypatch.setattr(network, "_STRIP", rows)
            found.append(model.decode(features, value, hidden))
    found.append([x.detach() for x in model.decode(features, value, hidden)])
    assert found[0][1].std() > 0.05
    for state, chroma in found[1:]:
        torch.testing.assert_close(state, found[0][0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(chroma, found[0][1], rtol=1e-12, atol=1e-12)
