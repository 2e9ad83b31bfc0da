"""Relevance patching against two bare forwards and one backward, and all three ways of patching against TransformerLens on the same weights.

The model is a GPT-2 (transformers' configuration, random weights) of 6 layers and 256 dimensions, the prompts are 8 pairs of 15 tokens as in the paper's
demonstration. Sites are the residual stream, attention outputs and MLP outputs of every layer and position, 270 nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lineament.bench import Row, compare, quick
from lineament.core.models import frozen
from lineament.explain.patching.activation import activation_patching
from lineament.explain.patching.attribution import attribution_patching
from lineament.explain.patching.integrated import integrated_patching
from lineament.explain.patching.metrics import logit_difference
from lineament.explain.patching.relevance import relevance_patching

SLUG = "relp"
LAYERS, WIDTH, HEADS, WORDS, PAIRS, POSITIONS = 2 if quick() else 6, 256, 8, 4096, 8, 15
NODES = f"{3 * LAYERS * POSITIONS} nodes"


def network() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=WORDS, n_positions=64, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, initializer_range=0.1, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def prompts() -> tuple[Tensor, Tensor, Any]:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(1, WORDS, (PAIRS, POSITIONS), generator=generator)
    corrupt = clean.clone()
    corrupt[:, 9] = torch.randint(1, WORDS, (PAIRS,), generator=generator)
    return clean, corrupt, logit_difference(list(range(8)), list(range(8, 16)))


def bare(model: Any, clean: Tensor, corrupt: Tensor, metric: Any) -> Callable[[], Any]:
    """The minimum that any approximation needs: a forward, a forward with graph, and a backward to the first residual stream."""

    def run() -> Any:
        with frozen(model):
            with torch.no_grad():
                metric(model(clean, use_cache=False, logits_to_keep=1).logits)
            start = model.transformer.wte(corrupt).detach().requires_grad_()
            score = metric(model(inputs_embeds=start, use_cache=False, logits_to_keep=1).logits).mean()
            return torch.autograd.grad(score, start)

    return run


def hooked(model: Any) -> Any:
    """The same weights in TransformerLens, or ``None`` where it is not installed."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        return None
    config = HookedTransformerConfig(
        n_layers=LAYERS, d_model=WIDTH, n_ctx=64, d_head=WIDTH // HEADS, n_heads=HEADS, d_mlp=4 * WIDTH, d_vocab=WORDS, act_fn="gelu_new",
        normalization_type="LN", eps=1e-5, seed=0,
    )  # fmt: skip
    peer = HookedTransformer(config)
    state = dict(peer.state_dict())
    body = model.transformer
    state["embed.W_E"], state["pos_embed.W_pos"] = body.wte.weight, body.wpe.weight
    state["unembed.W_U"], state["ln_final.w"], state["ln_final.b"] = (
        model.lm_head.weight.T,
        body.ln_f.weight,
        body.ln_f.bias,
    )
    for k, block in enumerate(body.h):
        at = f"blocks.{k}"
        for n, norm in ((1, block.ln_1), (2, block.ln_2)):
            state[f"{at}.ln{n}.w"], state[f"{at}.ln{n}.b"] = norm.weight, norm.bias
        for part, w, b in zip(
            "QKV", block.attn.c_attn.weight.split(WIDTH, 1), block.attn.c_attn.bias.split(WIDTH)
        ):
            state[f"{at}.attn.W_{part}"] = w.unflatten(1, (HEADS, -1)).permute(1, 0, 2)
            state[f"{at}.attn.b_{part}"] = b.unflatten(0, (HEADS, -1))
        state[f"{at}.attn.W_O"] = block.attn.c_proj.weight.unflatten(0, (HEADS, -1))
        state[f"{at}.attn.b_O"] = block.attn.c_proj.bias
        state[f"{at}.mlp.W_in"], state[f"{at}.mlp.b_in"] = block.mlp.c_fc.weight, block.mlp.c_fc.bias
        state[f"{at}.mlp.W_out"], state[f"{at}.mlp.b_out"] = block.mlp.c_proj.weight, block.mlp.c_proj.bias
    peer.load_state_dict({name: value.detach().clone() for name, value in state.items()})
    return peer.eval()


NAMES = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")


def wanted(name: str) -> bool:
    return name.endswith(NAMES)


def their_attribution(peer: Any, clean: Tensor, corrupt: Tensor, metric: Any) -> Callable[[], Tensor]:
    """Attribution patching as TransformerLens' demonstration does it, caching no more than the sites need and without a backward on the clean run."""

    def run() -> Tensor:
        with torch.no_grad():
            clean_logits, clean_cache = peer.run_with_cache(clean, names_filter=wanted)
        values: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        peer.reset_hooks()
        peer.add_hook(wanted, lambda act, hook: values.__setitem__(hook.name, act.detach()), "fwd")
        peer.add_hook(wanted, lambda grad, hook: gradients.__setitem__(hook.name, grad.detach()), "bwd")
        score = metric(peer(corrupt)).mean()
        score.backward()
        peer.reset_hooks()
        peer.zero_grad()
        gap = metric(clean_logits).mean() - score.detach()
        maps = [
            torch.stack(
                [((clean_cache[n] - values[n]) * gradients[n]).sum((0, 2)) for n in values if n.endswith(end)]
            )
            for end in NAMES
        ]
        return torch.stack(maps) / gap

    return run


def their_activation(peer: Any, clean: Tensor, corrupt: Tensor, metric: Any) -> Callable[[], Tensor]:
    """All three of TransformerLens' patching helpers."""
    from transformer_lens import patching

    def run() -> Tensor:
        with torch.no_grad():
            clean_logits, cache = peer.run_with_cache(clean, names_filter=wanted)
            low, high = metric(peer(corrupt)).mean(), metric(clean_logits).mean()

            def share(logits: Tensor) -> Tensor:
                return (metric(logits).mean() - low) / (high - low)

            helpers = (
                patching.get_act_patch_resid_pre,
                patching.get_act_patch_attn_out,
                patching.get_act_patch_mlp_out,
            )
            return torch.stack([helper(peer, corrupt, cache, share) for helper in helpers])

    return run


def rows(repeats: int = 7) -> Iterator[Row]:
    model = network()
    clean, corrupt, metric = prompts()
    yield compare(
        SLUG,
        f"relevance patching, {NODES}",
        lambda: relevance_patching(model, clean, corrupt, metric),
        "two bare forwards and one backward",
        bare(model, clean, corrupt, metric),
        target=1 / 1.15,
        repeats=max(repeats, 15),
        note="the limit is 1: the rest is 36 copies of activations, their differences and contractions, and the hooks",
    )
    yield from atp_star(model, clean, corrupt, metric, repeats)
    peer = hooked(model)
    whole = {"sites": ("resid_pre", "attn_out", "mlp_out")}
    name = "TransformerLens"
    if peer is None:
        for what in ("attribution patching", "activation patching", "integrated gradients"):
            yield compare(SLUG, what, lambda: None, name, None, repeats=1)
        return
    theirs = their_attribution(peer, clean, corrupt, metric)
    check = attribution_patching(model, clean, corrupt, metric, **whole)
    torch.testing.assert_close(torch.stack(list(check.scores.values())), theirs(), atol=2e-3, rtol=1e-2)
    yield compare(
        SLUG,
        f"attribution patching, {NODES}",
        lambda: attribution_patching(model, clean, corrupt, metric, **whole),
        name,
        theirs,
        target=1.5,
        repeats=max(repeats, 15),
        note="both are two forwards and one backward; theirs also differentiates the weights and computes every position's logits",
    )
    theirs = their_activation(peer, clean, corrupt, metric)
    progress_off()
    truth = activation_patching(model, clean, corrupt, metric, **whole)
    torch.testing.assert_close(torch.stack(list(truth.scores.values())), theirs(), atol=2e-3, rtol=1e-2)
    yield compare(
        SLUG,
        f"activation patching of all {NODES}",
        lambda: activation_patching(model, clean, corrupt, metric, **whole),
        name,
        theirs,
        target=2.0,
        repeats=min(repeats, 3),
        note="ours starts at the patched layer (half the blocks on average), patches many nodes in one forward, and needs one position's logits",
    )
    yield compare(
        SLUG,
        f"relevance patching against the patches of {NODES} that it approximates",
        lambda: relevance_patching(model, clean, corrupt, metric),
        "activation patching (ours)",
        lambda: activation_patching(model, clean, corrupt, metric, **whole),
        repeats=min(repeats, 3),
    )
    yield compare(
        SLUG,
        "integrated gradients, 10 steps a site",
        lambda: integrated_patching(model, clean, corrupt, metric, **whole),
        "activation patching (ours)",
        lambda: activation_patching(model, clean, corrupt, metric, **whole),
        repeats=min(repeats, 3),
    )


def atp_star(model: Any, clean: Tensor, corrupt: Tensor, metric: Any, repeats: int) -> Iterator[Row]:
    """What AtP*'s two fixes cost beside attribution patching of the same queries, keys and values."""
    nodes: dict[str, Any] = {"sites": ("q", "k", "v")}
    for what, options in (
        ("QK fix", {"qk_fix": True}),
        ("GradDrop", {"grad_drop": True}),
        ("AtP*, both", {"qk_fix": True, "grad_drop": True}),
    ):
        yield compare(
            SLUG,
            f"{what}, queries, keys and values of all heads",
            lambda options=options: attribution_patching(model, clean, corrupt, metric, **nodes, **options),
            "attribution patching (ours)",
            lambda: attribution_patching(model, clean, corrupt, metric, **nodes),
            repeats=repeats,
            note=f"the fix adds a forward of each attention for each position that differs, GradDrop {LAYERS - 1} backward passes",
        )


def progress_off() -> None:
    """Their helpers draw a progress bar for every map."""
    import functools

    from transformer_lens import patching

    module: Any = patching
    module.tqdm = functools.partial(module.tqdm, disable=True)


if __name__ == "__main__":
    for row in rows(3):
        print(row)
