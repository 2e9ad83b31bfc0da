"""Dictionaries of other libraries: the numbers of the peers' own code (``fixtures/make.py``), their sites, and what is refused."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lineament.core.checks import InputError
from lineament.dictionaries import (
    BatchTopK,
    Gated,
    JumpReLU,
    Neurons,
    Normalised,
    ReLU,
    TopK,
    export_saelens,
    load_dictionary,
)

FIXTURES = Path(__file__).parent / "fixtures"
FOLDERS = {
    str(path.parent.relative_to(FIXTURES)): path.parent
    for path in sorted(FIXTURES.rglob("expected.safetensors"))
}
# What each folder is here: the kind and the site.
KNOWN = {
    "saelens/standard": (ReLU, "transformer.h.3:in"),
    "saelens/standard_output_bias": (ReLU, "transformer.h.3.mlp"),
    "saelens/standard_layer_norm": (Normalised, "transformer.h.3:in"),
    "saelens/standard_constant_norm": (Normalised, "transformer.h.3:in"),
    "saelens/gated": (Gated, "transformer.h.3"),
    "saelens/jumprelu": (JumpReLU, "transformer.h.3.attn"),
    "saelens/topk": (TopK, "transformer.h.3.attn.c_proj:in"),
    "saelens/topk_rescaled": (TopK, "transformer.h.3.mlp.c_proj:in"),
    "sparsify/layers.5.mlp": (TopK, "layers.5.mlp"),
    **{
        f"dictionary_learning/{name}": (kind, "gpt_neox.layers.3")
        for name, kind in {
            "AutoEncoder": ReLU, "AutoEncoderNew": ReLU, "GatedAutoEncoder": Gated, "JumpReluAutoEncoder": JumpReLU,
            "AutoEncoderTopK": TopK, "BatchTopKSAE": BatchTopK, "MatryoshkaBatchTopKSAE": BatchTopK,
        }.items()
    },
    "gemma_scope/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71": (JumpReLU, "model.layers.20"),
}  # fmt: skip


def test_every_fixture_is_known():
    assert set(FOLDERS) == set(KNOWN)


@pytest.mark.parametrize("name", FOLDERS)
def test_features_and_reconstruction_are_the_peers_own(name):
    folder, (kind, site) = FOLDERS[name], KNOWN[name]
    sae, want = load_dictionary(folder), load_file(folder / "expected.safetensors")
    assert type(sae) is kind and sae.site == site
    x = want["x"]
    features = sae.encode(x)
    if kind is Normalised:
        # Features are in the units of x, and what a token was divided by is one of them.
        y, carriers = sae.normalise(x)
        torch.testing.assert_close(sae.inner.encode(y), want["features"], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(
            features[:, : sae.inner.width], want["features"] * carriers[:, :1], atol=1e-5, rtol=1e-5
        )
    else:
        torch.testing.assert_close(features, want["features"], atol=1e-6, rtol=1e-5)
    assert (features != 0).any(), "nothing is on, so that this compares nothing"
    for codes in (features, sae.codes(x)):
        torch.testing.assert_close(sae.decode(codes), want["output"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.codes(x).dense(), features)


@pytest.mark.parametrize(
    "name", [name for name in FOLDERS if name.startswith("saelens") and "rescaled" not in name]
)
def test_export_writes_what_saelens_wrote(name, tmp_path):
    """Verified once against SAELens 6.54.12 itself, which reads these folders with the same numbers."""
    folder = export_saelens(load_dictionary(FOLDERS[name]), tmp_path / "out")
    theirs, ours = (load_file(each / "sae_weights.safetensors") for each in (FOLDERS[name], folder))
    assert theirs.keys() == ours.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], atol=1e-7, rtol=1e-6)
    configs = [json.loads((each / "cfg.json").read_text()) for each in (FOLDERS[name], folder)]
    for key in (
        "architecture",
        "d_in",
        "d_sae",
        "apply_b_dec_to_input",
        "normalize_activations",
        *(["k"] if "topk" in name else []),
    ):
        assert configs[0][key] == configs[1][key], key
    assert configs[0]["metadata"]["hook_name"] == configs[1]["metadata"]["hook_name"]


@pytest.mark.parametrize("name", FOLDERS)
def test_saved_as_ours_it_is_the_same(name, tmp_path):
    sae = load_dictionary(FOLDERS[name])
    sae.save_pretrained(tmp_path)
    again = load_dictionary(tmp_path)
    x = load_file(FOLDERS[name] / "expected.safetensors")["x"]
    assert again.site == sae.site and again.info == sae.info
    assert torch.equal(again.encode(x), sae.encode(x))


def test_batch_top_k_is_exported_with_its_threshold_and_others_refused(tmp_path):
    name = "dictionary_learning/BatchTopKSAE"
    sae = load_dictionary(FOLDERS[name])
    again = load_dictionary(export_saelens(sae, tmp_path, model="pythia-70m"))
    x = load_file(FOLDERS[name] / "expected.safetensors")["x"]
    torch.testing.assert_close(again.encode(x), sae.encode(x))
    assert again.site == sae.site
    with pytest.raises(InputError, match="threshold was not measured"):
        export_saelens(BatchTopK(2, 4, k=1), tmp_path)
    with pytest.raises(InputError, match="no counterpart of Neurons"):
        export_saelens(Neurons(2), tmp_path)


def edited(tmp_path, name, file="cfg.json", **changes):
    folder = tmp_path / Path(name).name
    shutil.copytree(FOLDERS[name], folder)
    config = json.loads((folder / file).read_text())
    for key, value in changes.items():
        at = (
            config["metadata"]
            if key in ("model_from_pretrained_kwargs", "hook_name", "hook_head_index")
            and "metadata" in config
            else config
        )
        at = config.get("trainer", at)
        at[key] = value
    (folder / file).write_text(json.dumps(config))
    return folder


def test_the_scale_of_the_activations_is_folded_in(tmp_path):
    folder = edited(tmp_path, "saelens/standard", normalize_activations="expected_average_only_in")
    want = load_file(folder / "expected.safetensors")
    with pytest.raises(InputError, match=r"^scale: .*give scale="):
        load_dictionary(folder)
    sae = load_dictionary(folder, scale=0.25)
    torch.testing.assert_close(sae.encode(want["x"] / 0.25), want["features"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(want["x"] / 0.25), want["output"] / 0.25, atol=1e-5, rtol=1e-5)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    assert torch.equal(load_dictionary(folder).W_enc, sae.W_enc)


def test_centred_weights_are_the_removal_of_the_mean(tmp_path):
    folder = edited(
        tmp_path, "saelens/standard", model_from_pretrained_kwargs={"center_writing_weights": True}
    )
    sae, plain = load_dictionary(folder), load_dictionary(FOLDERS["saelens/standard"])
    x = load_file(folder / "expected.safetensors")["x"]
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(sae.encode(x)[:, :-1], plain.encode(centred))
    torch.testing.assert_close(sae(x), plain(centred) + x.mean(-1, keepdim=True), atol=1e-5, rtol=1e-5)
    assert type(load_dictionary(folder, centred=False)) is ReLU
    # RMS norms do not remove the mean, and TransformerLens leaves it there.
    gemma = edited(
        tmp_path / "g", "saelens/standard", model_from_pretrained_kwargs={"center_writing_weights": True}
    )
    config = json.loads((gemma / "cfg.json").read_text())
    config["metadata"]["model_name"] = "gemma-2-2b"
    (gemma / "cfg.json").write_text(json.dumps(config))
    assert type(load_dictionary(gemma)) is ReLU and load_dictionary(gemma).site == "model.layers.3:in"


def test_configurations_before_version_6(tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(FOLDERS["saelens/topk"], folder)
    old = {
        "d_in": 8, "d_sae": 20, "dtype": "torch.float32", "model_name": "gpt2-small", "hook_point": "blocks.3.attn.hook_z",
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "normalize_activations": False,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(old))
    sae, want = load_dictionary(folder), load_file(folder / "expected.safetensors")
    assert sae.k == 4 and sae.site == "transformer.h.3.attn.c_proj:in"
    torch.testing.assert_close(sae.encode(want["x"]), want["features"], atol=1e-6, rtol=1e-5)
    old["hook_point_head_index"] = old["hook_head_index"] = 2
    (folder / "cfg.json").write_text(json.dumps(old))
    assert load_dictionary(folder).site == "transformer.h.3.attn:z[2]"


def test_the_site_is_named_as_the_model_names_it(tmp_path):
    from tests.contracts.language_models import tiny

    from lineament.dictionaries.splice import site_in

    model = tiny("gpt2")
    assert load_dictionary(FOLDERS["saelens/gated"], model=model.transformer).site == "h.3"
    assert load_dictionary(FOLDERS["saelens/gated"], site="transformer.h.1:in").site == "transformer.h.1:in"
    sae = load_dictionary(FOLDERS["sparsify/layers.5.mlp"], site="h.1.mlp")
    assert site_in(model, sae).name == "transformer.h.1.mlp"
    unknown = edited(tmp_path, "saelens/gated", hook_name="blocks.3.hook_unheard_of")
    assert load_dictionary(unknown).site is None
    assert "set dictionary.site" in load_dictionary(unknown).info["notes"][0]


REFUSED = {
    "matching_pursuit": ("saelens/standard", {"architecture": "matching_pursuit"}, "'matching_pursuit', which has no counterpart"),
    "batchtopk": ("saelens/topk", {"architecture": "batchtopk"}, "save_inference_model"),
    "tanh": ("saelens/standard", {"activation_fn": "tanh-relu"}, "tanh-relu"),
    "whitening": ("saelens/standard", {"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
    "k of 21": ("saelens/topk", {"k": 21}, r"k in topk: got 21, expected an integer in \[1, 20\]"),
    "k of text": ("saelens/topk", {"k": "4"}, "k in topk: got '4'"),
    "transcoder": ("sparsify/layers.5.mlp", {"transcode": True}, "transcoder"),
    "groupmax": ("sparsify/layers.5.mlp", {"activation": "groupmax"}, "groupmax"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_other_kinds_are_refused_by_name(case, tmp_path):
    name, changes, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        load_dictionary(edited(tmp_path, name, **changes))


def test_classes_of_dictionary_learning_are_refused_by_name(tmp_path):
    name = "dictionary_learning/AutoEncoder"
    with pytest.raises(InputError, match="CrossCoder"):
        load_dictionary(edited(tmp_path, name, "config.json", dict_class="CrossCoder"))
    lone = tmp_path / "lone"
    lone.mkdir()
    shutil.copy(FOLDERS["dictionary_learning/AutoEncoderTopK"] / "ae.pt", lone)
    with pytest.raises(InputError, match="AutoEncoderTopK or BatchTopKSAE"):
        load_dictionary(lone)


def test_a_malicious_file_runs_no_code(tmp_path):
    class Boom:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    folder = tmp_path / "sae"
    folder.mkdir()
    for write in (torch.save, lambda value, path: Path(path).write_bytes(pickle.dumps(value))):
        write({"encoder.weight": Boom()}, folder / "ae.pt")
        with pytest.raises(InputError):
            load_dictionary(folder)
    (folder / "ae.pt").unlink()
    np.savez(folder / "params.npz", W_enc=np.array([Boom()], dtype=object))
    with pytest.raises(InputError, match="objects"):
        load_dictionary(folder)
    assert not (tmp_path / "owned").exists()


def damaged(folder, file, change):
    path = folder / file
    change(path)
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("name", FOLDERS)
def test_damaged_files_are_refused(name, tmp_path):
    weights = next(
        p
        for p in FOLDERS[name].iterdir()
        if p.name in ("sae_weights.safetensors", "ae.pt", "sae.safetensors", "params.npz")
    )
    folder = tmp_path / "cut"
    shutil.copytree(FOLDERS[name], folder)
    cut(folder / weights.name)
    with pytest.raises(InputError, match="folder"):
        load_dictionary(folder)


def test_what_is_missing_or_misshapen_is_named(tmp_path):
    folder = edited(tmp_path, "saelens/standard")
    tensors = load_file(folder / "sae_weights.safetensors")
    for changes, message in (
        ({"b_enc": None}, "lacks 'b_enc'; it holds W_dec, W_enc, b_dec"),
        ({"b_enc": torch.zeros(3)}, r"encoder bias .*\(3,\).*expected shape \(20,\)"),
        ({"W_enc": torch.zeros(9, 20)}, r"encoder .*expected shape \(20, 8\)"),
        ({"b_dec": torch.full((8,), float("nan"))}, "NaN|nan|finite"),
    ):
        kept = {k: v for k, v in {**tensors, **changes}.items() if v is not None}
        save_file(kept, folder / "sae_weights.safetensors")
        with pytest.raises(InputError, match=message):
            load_dictionary(folder)
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text("[1, 2")
    with pytest.raises(InputError, match=r"'cfg.json' .*cannot be read"):
        load_dictionary(folder)
    (folder / "cfg.json").unlink()
    with pytest.raises(InputError, match=r"no 'cfg.json'"):
        load_dictionary(folder)
    with pytest.raises(InputError, match="its folders 'standard' do; name one"):
        load_dictionary(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        InputError, match=r"holds no dictionary \(it has nothing\); expected the files config.json"
    ):
        load_dictionary(tmp_path / "empty")
    for name in ("./nowhere", "nowhere"):
        with pytest.raises(InputError, match="does not exist"):
            load_dictionary(name)
    with pytest.raises(InputError, match="hub"):
        load_dictionary("owner/no-such-repository/layers.5")


@pytest.mark.parametrize("fold_ln", [False, True])
@pytest.mark.parametrize("subtract", [False, True])
def test_a_folded_value_bias_is_put_back(tmp_path, fold_ln, subtract):
    """Features of the model's own values are those of TransformerLens' values, mixed here from projections without the bias."""
    from tests.contracts.language_models import tiny

    from lineament.core.sites.activations import capture

    model = tiny("gpt2")
    model.set_attn_implementation("eager")
    block, generator = model.transformer.h[1], torch.Generator().manual_seed(0)
    with torch.no_grad():
        for bias in (block.attn.c_attn.bias, block.ln_1.bias):
            bias.copy_(torch.randn(bias.shape, generator=generator))
    d, ids = 24, torch.arange(12).view(2, 6)
    with torch.no_grad(), capture(model, ["transformer.h.1.attn.c_proj:in", "transformer.h.1:in"]) as acts:
        weights = model(ids, output_attentions=True).attentions[1]
    z, x = acts["transformer.h.1.attn.c_proj:in"], acts["transformer.h.1:in"]
    with torch.no_grad():
        normed = block.ln_1(x) - (block.ln_1.bias if fold_ln else 0)
        v = (normed @ block.attn.c_attn.weight[:, -d:]).unflatten(-1, (weights.shape[1], -1))
        theirs = torch.einsum("bhqk,bkhe->bqhe", weights, v).flatten(-2)
    names = {"W_enc": (d, 40), "W_dec": (40, d), "b_enc": (40,), "b_dec": (d,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    options = {"fold_value_biases": True, "fold_ln": fold_ln}
    (tmp_path / "cfg.json").write_text(json.dumps({
        "architecture": "standard", "d_in": d, "d_sae": 40, "apply_b_dec_to_input": subtract,
        "metadata": {"model_name": "gpt2", "hook_name": "blocks.1.attn.hook_z", "model_from_pretrained_kwargs": options},
    }))  # fmt: skip
    sae = load_dictionary(tmp_path, model=model)
    shift = tensors["b_dec"] if subtract else 0
    want = ((theirs - shift) @ tensors["W_enc"] + tensors["b_enc"]).relu()
    torch.testing.assert_close(sae.encode(z), want, atol=1e-4, rtol=1e-4)
    back = want @ tensors["W_dec"] + tensors["b_dec"] + (z - theirs)
    torch.testing.assert_close(sae.decode(sae.encode(z)), back, atol=1e-3, rtol=1e-4)
    with pytest.raises(InputError, match="give model="):
        load_dictionary(tmp_path)
