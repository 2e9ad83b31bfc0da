"""SAELens: ``cfg.json`` and ``sae_weights.safetensors``, of versions 2 to 6; read and written.

Its encoder is (d, width) and its decoder (width, d). Layer normalisation and constant norms are kept (:class:`~lineament.dictionaries.normalised.Normalised`);
the scale of ``expected_average_only_in`` is folded into the weights, so that features are as SAELens has them after its own folding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from lineament.core.checks import InputError, number, require, show
from lineament.core.files import atomic_write, output_folder, write_json
from lineament.core.sites.families import hook_of_site, site_of_hook
from lineament.dictionaries.formats.parts import Found, Request, Weights, autoencoder, placed, read_json
from lineament.dictionaries.formats.value_bias import value_bias
from lineament.dictionaries.normalised import Normalised
from lineament.dictionaries.topk.shards import divided
from lineament.load.checkpoints import read_checkpoint

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_KINDS = {"standard": "ReLU", "gated": "Gated", "jumprelu": "JumpReLU", "topk": "TopK"}
_FORMS = {"layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}


def matches(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file()


def read(folder: Path, request: Request) -> Any:
    """The dictionary in a folder of SAELens."""
    require((folder / CONFIG).is_file(), f"folder: {str(folder)!r} has {WEIGHTS!r} but no {CONFIG!r}")
    config = read_json(folder / CONFIG)
    said = {**config, **(config["metadata"] if isinstance(config.get("metadata"), dict) else {})}
    kind = _kind(config)
    weights = Weights(read_checkpoint(folder / WEIGHTS, "folder"), folder / WEIGHTS)
    encoder, decoder = weights.matrix("W_enc").T, weights.matrix("W_dec")
    found = Found(
        "SAELens",
        str(said.get("model_name") or ""),
        str(said.get("hook_name") or said.get("hook_point") or ""),
    )
    if "scaling_factor" in weights or "finetuning_scaling_factor" in weights:
        factor = weights.get("finetuning_scaling_factor", "scaling_factor", shape=(len(decoder),))
        decoder = decoder * factor[:, None]
        found.notes.append("the factors of its finetuning are folded into the decoder")
    b_dec = weights.get("b_dec")
    extra: dict[str, Any] = {}
    if kind == "Gated":
        b_enc = weights.get("b_mag")
        extra = {"b_gate": weights.get("b_gate"), "r_mag": weights.get("r_mag")}
    else:
        b_enc = weights.get("b_enc")
        extra = {"threshold": weights.get("threshold")} if kind == "JumpReLU" else {}
    scale, form = _normalisation(folder, config, request, found)
    if scale != 1.0:
        encoder, decoder, b_dec = encoder * scale, decoder / scale, b_dec / scale
        found.notes.append(f"the scale {scale:g} of its activations is folded into the weights")
    # SAELens compares pre-activations times the decoder's norms, and returns them so.
    rescaled = kind == "TopK" and bool(config.get("rescale_acts_by_decoder_norm"))
    k = weights.count("k", _k(config), len(decoder)) if kind == "TopK" else None
    made = autoencoder(
        kind, encoder, decoder, b_enc, b_dec, k=k, unit_norm=rescaled,
        subtract_bias=bool(config.get("apply_b_dec_to_input", True)), **extra,
    )  # fmt: skip
    if form is not None:
        made = Normalised(made, form=form)
        found.notes.append(f"each token is normalised first ({form})")
    head = said.get("hook_head_index")
    if head is not None:
        found.site = _head(found, request, head)
    return _unfolded(placed(made, found, request), said, request)


def _unfolded(made: Any, said: dict[str, Any], request: Request) -> Any:
    """The dictionary for values that still hold the bias which TransformerLens had folded away."""
    told = said.get("model_from_pretrained_kwargs")
    options: dict[str, Any] = told if isinstance(told, dict) else {}
    if not options.get("fold_value_biases") or not made.info["hook"].endswith("attn.hook_z"):
        return made
    site: Any = made.site
    require(
        isinstance(request.model, nn.Module) and site is not None,
        "model: the dictionary was trained on heads' values without their bias (fold_value_biases), which is in the model; give model=, the module",
    )
    common = value_bias(request.model, str(site), with_norm=bool(options.get("fold_ln")))
    require(
        not isinstance(made, Normalised) and common.shape == (made.d,),
        "folder: a value bias beside a normalisation, or of single heads, has no counterpart here",
    )
    inner: Any = made
    common = common.to(inner.b_dec)
    inner.b_dec += common
    if not inner.subtract_bias:
        inner.b_enc -= inner.W_enc @ common
    made.info["notes"].append("the bias of the heads' values, which its activations lacked, is folded in")
    return made


def _kind(config: dict[str, Any]) -> str:
    architecture = config.get("architecture", "standard")
    function = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    if architecture == "standard" and function == "topk":
        architecture = "topk"
    require(
        isinstance(architecture, str) and architecture in _KINDS,
        f"folder: a SAELens dictionary of architecture {show(architecture)}, which has no counterpart here; expected one of {', '.join(_KINDS)}"
        + (
            "; save it for inference first (sae.save_inference_model)"
            if "batchtopk" in str(architecture)
            else ""
        ),
    )
    require(
        function in ("relu", "topk"),
        f"folder: activation_fn {show(function)} has no counterpart here; expected relu or topk",
    )
    return _KINDS[architecture]


def _k(config: dict[str, Any]) -> Any:
    kwargs = config.get("activation_fn_kwargs")
    return config.get("k", kwargs.get("k") if isinstance(kwargs, dict) else None)


def _normalisation(
    folder: Path, config: dict[str, Any], request: Request, found: Found
) -> tuple[float, str | None]:
    """The scale to fold in, and the form of a normalisation that is kept."""
    how = config.get("normalize_activations", "none")
    how = {None: "none", False: "none", True: "expected_average_only_in"}.get(how, how)
    form, scale = _FORMS.get(str(how)), 1.0
    require(
        form is not None or how in ("none", "expected_average_only_in"),
        f"folder: normalize_activations {show(how)} has no counterpart here; expected none, expected_average_only_in, {', '.join(_FORMS)}",
    )
    if how == "expected_average_only_in":
        file = folder / "activation_scaler.json"
        scale = request.scale
        if scale is None and file.is_file():
            scale = read_json(file).get("scaling_factor")
        if scale is None:
            raise InputError(
                "scale: the dictionary was trained on activations times a factor (expected_average_only_in) that its folder does not hold; give scale=, "
                "sqrt(d) over the site's mean norm where it is not known"
            )
        number("scale", scale, low=0, open_low=True)
    centred = request.centred
    if centred is None:
        options = config.get("model_from_pretrained_kwargs")
        options = (
            options
            if options is not None
            else (config.get("metadata") or {}).get("model_from_pretrained_kwargs")
        )
        # TransformerLens centres what is written to a residual stream that layer norms read; RMS norms would see the difference.
        writes = any(
            part in found.hook for part in ("hook_resid", "hook_attn_out", "hook_mlp_out", "hook_embed")
        )
        rms = any(part in found.model.lower() for part in ("gemma", "llama", "mistral", "qwen"))
        asked = isinstance(options, dict) and bool(options.get("center_writing_weights"))
        centred = asked and writes and not rms
    if centred:
        require(
            form in (None, "layer_norm"),
            "centred: a dictionary of centred activations with a constant norm has no counterpart here",
        )
        # A layer normalisation takes the mean anyway.
        form = form or "centred"
    return float(scale), form


def _head(found: Found, request: Request, head: Any) -> str:
    number("hook_head_index", head, low=0, integer=True)
    require(
        found.hook.endswith("attn.hook_z"),
        f"folder: head {head} of the hook {found.hook!r} has no site here; expected attn.hook_z",
    )
    site = site_of_hook(found.hook, request.model if request.model is not None else found.model)
    return f"{site.removesuffix(':in').rpartition('.')[0]}:z[{head}]"


def export_saelens(dictionary: Any, folder: str | Path, *, model: str = "") -> Path:
    """Write a dictionary as SAELens 6 reads it: ``SAE.load_from_disk(folder)``.

    Args:
        model: the model's name, for SAELens' configuration; by default what the dictionary says.

    Raises:
        InputError: a kind that SAELens has not, batch top-k without its threshold among them.

    >>> import tempfile
    >>> from lineament.dictionaries import ReLU, load_dictionary
    >>> folder = export_saelens(ReLU(2, 3, site="transformer.h.1"), tempfile.mkdtemp(), model="gpt2")
    >>> load_dictionary(folder).site, sorted(path.name for path in folder.iterdir())
    ('transformer.h.1', ['cfg.json', 'sae_weights.safetensors'])
    """
    form = "none"
    inner, info = dictionary, dict(getattr(dictionary, "info", {}))
    if isinstance(dictionary, Normalised):
        names = {"layer_norm": "layer_norm", "constant_norm": "constant_norm_rescale", "centred": "none"}
        inner, form = dictionary.inner, names[dictionary.form]
    require(
        not divided(getattr(inner, "W_dec", None)),
        "dictionary: its features lie with several processes; expected one that lies with this one, as load_dictionary opens what save_pretrained wrote",
    )
    kind = type(inner).__name__
    architectures = {ours: theirs for theirs, ours in _KINDS.items()} | {"BatchTopK": "jumprelu"}
    require(
        kind in architectures,
        f"dictionary: SAELens has no counterpart of {kind}; expected one of {', '.join(architectures)}",
    )
    tensors = {
        "W_enc": inner.W_enc.T, "W_dec": inner.W_dec, "b_dec": inner.b_dec,
        **({"b_mag": inner.b_enc, "b_gate": inner.b_gate, "r_mag": inner.r_mag} if kind == "Gated" else {"b_enc": inner.b_enc}),
    }  # fmt: skip
    if kind == "BatchTopK":
        require(
            float(inner.threshold) >= 0,
            "dictionary: a BatchTopK whose threshold was not measured; SAELens keeps it as a JumpReLU of that threshold",
        )
        tensors["threshold"] = inner.threshold.expand(inner.width)
    elif kind == "JumpReLU":
        tensors["threshold"] = inner.threshold
    name = model or info.get("model") or ""
    hook = info.get("hook") or hook_of_site(dictionary.site or "", name) or dictionary.site or ""
    centred = isinstance(dictionary, Normalised) and dictionary.form == "centred"
    config = {
        "architecture": architectures[kind],
        "d_in": inner.d,
        "d_sae": inner.width,
        "dtype": str(inner.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": inner.subtract_bias,
        "normalize_activations": form,
        "reshape_activations": "hook_z" if hook.endswith("hook_z") else "none",
        **({"k": inner.k, "rescale_acts_by_decoder_norm": False} if kind == "TopK" else {}),
        "metadata": {
            "sae_lens_version": "6.0.0",
            "model_name": name,
            "hook_name": hook,
            "hook_head_index": None,
            "model_class_name": "HookedTransformer"
            if hook.startswith(("blocks.", "hook_"))
            else "AutoModelForCausalLM",
            **({"model_from_pretrained_kwargs": {"center_writing_weights": True}} if centred else {}),
        },
    }
    folder = output_folder(folder)
    with atomic_write(folder / WEIGHTS) as temporary:
        plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        temporary.write_bytes(save(plain))
    write_json(folder / CONFIG, config)
    return folder
