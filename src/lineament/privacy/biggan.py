"""BigGAN-deep as a prior: pictures of a class, whose embedding goes with the code into every block's batch norms.

Brock, Donahue, Simonyan, "Large Scale GAN Training for High Fidelity Natural Image Synthesis", ICLR 2019, arXiv 1809.11096, in the layout of Hugging Face's conversion
(pytorch-pretrained-biggan). Spectral norms are folded into the weights once, statistics are those of one truncation, and the search freezes code and class behind its first
stage (Fang et al. 2023, arXiv 2308.04699, section 1.4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import InputError, number, require, show
from lineament.privacy.priors import Block

_PREFIX, _EPS = "generator.layers.", 1e-4


class BigGANPrior:
    """The search's view of a BigGAN-deep from its tensors.

    Args:
        tensors: by Hugging Face's names. classes: for each label of the audited model the generator's class; by default the same number.
        truncation: in (0, 1], picks the statistics of batch norms; of codes it is the search that decides.

    >>> try: BigGANPrior({}, lambda made: made)
    ... except InputError as error: print(str(error)[:47])
    prior: 'embeddings.weight' is missing, expected
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        render: Block,
        *,
        classes: Sequence[int] | None = None,
        truncation: float = 1.0,
    ):
        number("truncation", truncation, low=0, high=1, open_low=True)
        self.render = render
        try:
            self.own = _folded(tensors, truncation)
            self.embedding = self.own["embeddings.weight"]
            self.code = self.own["generator.gen_z.weight"].shape[1] - self.embedding.shape[0]
            self.layers = 1 + max(
                int(n[len(_PREFIX) :].split(".")[0]) for n in self.own if n.startswith(_PREFIX)
            )
        except (KeyError, ValueError) as error:
            raise InputError(
                f"prior: {error} is missing, expected the tensors of a BigGAN-deep as Hugging Face names them (embeddings.weight, generator.gen_z.weight_orig, ...)"
            ) from None
        self.classes = None if classes is None else torch.as_tensor(classes)

    @property
    def side(self) -> int:
        """Of its pictures: 4, doubled by half of the blocks with convolutions."""
        blocks = sum(f"{_PREFIX}{k}.conv_0.weight" in self.own for k in range(self.layers))
        return 4 * 2 ** (blocks // 2)

    def blocks(self, code: Tensor, targets: Tensor | None) -> Sequence[Block]:
        if targets is None or targets.ndim != 1:
            raise InputError(f"targets: got {show(targets)}, expected a class for each code")
        labels = targets if self.classes is None else self.classes.to(targets.device)[targets]
        many = self.embedding.shape[1]
        require(
            int(labels.min()) >= 0 and int(labels.max()) < many,
            f"targets: go from {int(labels.min())} to {int(labels.max())}, but the generator has classes 0 to {many - 1}; pass classes=, one for each label",
        )
        condition = torch.cat([code, self.embedding.to(code).T[labels]], 1)
        last = self.layers - 1
        return [self._block(k, condition, k == last) for k in range(self.layers)]

    def _block(self, k: int, condition: Tensor, last: bool) -> Block:
        name = f"{_PREFIX}{k}."

        def run(x: Tensor) -> Tensor:
            if k == 0:  # the code is in the condition, too; its gradient comes through both
                x = F.linear(
                    condition, self._at("generator.gen_z.weight", x), self._at("generator.gen_z.bias", x)
                )
                x = x.view(len(x), 4, 4, -1).permute(0, 3, 1, 2)
            x = self._attention(name, x) if f"{name}gamma" in self.own else self._convolved(name, x, condition, doubles=self._doubles(k))  # fmt: skip
            if last:
                x = self._norm("generator.bn", x).relu()
                x = F.conv2d(
                    x,
                    self._at("generator.conv_to_rgb.weight", x),
                    self._at("generator.conv_to_rgb.bias", x),
                    padding=1,
                )
                return x[:, :3].tanh()
            return x

        return run

    def _doubles(self, k: int) -> bool:
        """Blocks come in pairs, of which the second doubles the side."""
        before = sum(f"{_PREFIX}{j}.conv_0.weight" in self.own for j in range(k))
        return before % 2 == 1

    def _at(self, name: str, like: Tensor) -> Tensor:
        return self.own[name].to(like)

    def _norm(self, name: str, x: Tensor, condition: Tensor | None = None) -> Tensor:
        mean, variance = (self._at(f"{name}.{part}", x)[:, None, None] for part in ("mean", "variance"))
        x = (x - mean) * (variance + _EPS).rsqrt()
        if condition is None:
            return (
                x * self._at(f"{name}.weight", x)[:, None, None] + self._at(f"{name}.bias", x)[:, None, None]
            )
        scale, offset = (F.linear(condition, self._at(f"{name}.{part}.weight", x))[:, :, None, None] for part in ("scale", "offset"))  # fmt: skip
        return x * (1 + scale) + offset

    def _convolved(self, name: str, x: Tensor, condition: Tensor, *, doubles: bool) -> Tensor:
        """A bottleneck of four convolutions beside its input, which loses the channels that are too many."""
        kept = x
        for j in range(4):
            x = self._norm(f"{name}bn_{j}", x, condition).relu()
            if j == 1 and doubles:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            weight = self._at(f"{name}conv_{j}.weight", x)
            x = F.conv2d(x, weight, self._at(f"{name}conv_{j}.bias", x), padding=weight.shape[-1] // 2)
        kept = kept[:, : x.shape[1]]
        return x + (F.interpolate(kept, scale_factor=2, mode="nearest") if doubles else kept)

    def _attention(self, name: str, x: Tensor) -> Tensor:
        """Every place looks at means of 2 x 2 places' largest values."""
        theta, phi, g = (
            F.conv2d(x, self._at(f"{name}snconv1x1_{part}.weight", x)) for part in ("theta", "phi", "g")
        )
        phi, g = (F.max_pool2d(v, 2).flatten(2) for v in (phi, g))
        looks = torch.einsum("ncq,nck->nqk", theta.flatten(2), phi).softmax(-1)
        seen = torch.einsum("nck,nqk->ncq", g, looks).unflatten(2, x.shape[2:])
        return x + self._at(f"{name}gamma", x) * F.conv2d(seen, self._at(f"{name}snconv1x1_o_conv.weight", x))


def _folded(tensors: Mapping[str, Tensor], truncation: float) -> dict[str, Tensor]:
    """Weights over their largest singular value, as the power iteration left it; means and variances of one truncation, between the two stored nearest."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        stem = name.rpartition(".")[0]
        if name.endswith(".weight_orig"):
            u, v = tensors[f"{stem}.weight_u"], tensors[f"{stem}.weight_v"]
            found[f"{stem}.weight"] = value / torch.dot(u, value.flatten(1) @ v)
        elif name.endswith((".running_means", ".running_vars")):
            steps = len(value) - 1
            at = truncation * steps
            low = min(int(at + 1e-6), steps)
            high = min(low + 1, steps)
            part = max(at - low, 0.0)
            # Row k holds the statistics of truncation k / steps.
            told = value[low] * (1 - part) + value[high] * part
            found[f"{stem}.{'mean' if name.endswith('means') else 'variance'}"] = told
        elif not name.endswith((".weight_u", ".weight_v")):
            found[name] = value
    return {name: value.float() for name, value in found.items()}
