"""What GIFD's rivals have beside a search: generators with weights of their own (GIAS), restarts as a group (GI), and the first layer's closed form.

Jeon et al. 2021, arXiv 2110.14962; Yin et al. 2021, arXiv 2104.07586; Fang et al. 2023, arXiv 2308.04699, sections 1.5 and 7.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lineament.core.checks import InputError
from lineament.privacy.messages import Message
from lineament.privacy.priors import Block, Decoder, Prior


def own_generators(prior: Prior, code: Tensor) -> tuple[Tensor, Block]:
    """The weights of a generator, once for each code [n, weights], and what makes pictures of such weights.

    Raises:
        InputError: a prior that is no :class:`lineament.privacy.Decoder`, whose weights could be told.

    >>> prior = Decoder(nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (1, 2, 2))), 2)
    >>> weights, made = own_generators(prior, torch.ones(3, 2))
    >>> tuple(weights.shape), torch.equal(made(weights), prior.generator(torch.ones(3, 2)))
    ((3, 12), True)
    """
    if not isinstance(prior, Decoder):
        raise InputError(
            f"prior: got {type(prior).__name__}, expected a Decoder: 'gias' changes the generator's weights"
        )
    named = {name: p.detach() for name, p in prior.generator.named_parameters()}
    sizes = [p.numel() for p in named.values()]
    flat = torch.cat([p.flatten() for p in named.values()]).to(code)

    def one(weights: Tensor, z: Tensor) -> Tensor:
        parts = {n: w.view(p.shape) for (n, p), w in zip(named.items(), weights.split(sizes))}
        return functional_call(prior.generator, parts, (z[None],))[0]

    return flat.repeat(len(code), 1), lambda weights: vmap(one)(weights, code)


def group_term(restarts: int, steps: int, *, side: int) -> Callable[[Tensor, int], Tensor]:
    """Σ over rows of |x - mean of the restarts| / side², for pictures [messages x restarts, batch, ...] at a step.

    The mean is first taken at step 500 of a long search, or after a quarter of a short one, and renewed every 100 steps or twentieth.
    """
    begin, every = min(500, steps // 4), max(1, min(100, steps // 20))
    held: list[Tensor] = []

    def term(x: Tensor, step: int) -> Tensor:
        if step < begin:
            return x.new_zeros(())
        by_message = x.view(-1, restarts, *x.shape[1:])
        if not held or (step - begin) % every == 0:
            held[:] = [by_message.detach().mean(1, keepdim=True)]
        return (by_message - held[0]).flatten(2).norm(dim=2).sum() / side**2

    return term


def closed_form(model: nn.Module, message: Message) -> Tensor | None:
    """The picture itself where one picture met a linear first layer with a bias: each row of its gradient is the input times the bias's; else None.
    Zeros where no unit of that layer let a slope through.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)); x = torch.rand(1, 1, 2, 2)
    >>> torch.allclose(closed_form(net, Message.of(net, x, torch.tensor([2]))), x.flatten(), atol=1e-5)
    True
    """
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    layer = dict(model.named_modules()).get(names[0].rpartition(".")[0])
    if (
        message.count != 1
        or not isinstance(layer, nn.Linear)
        or len(names) < 2
        or not names[1].endswith("bias")
    ):
        return None
    weight, bias = message.gradient(model)[:2]
    row = int(bias.abs().argmax())
    return weight[row] / bias[row] if bias[row] != 0 else torch.zeros_like(weight[row])
