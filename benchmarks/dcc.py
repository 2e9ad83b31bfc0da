"""The real side of a matching step and a whole outer iteration against the published loop, and the memory of a summed step against one chunk's."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.bench import Row, compare, quick
from lineament.learn.condensation.learning import learn_pictures
from lineament.learn.condensation.matching import real_gradient
from lineament.learn.condensation.networks import convnet
from lineament.learn.condensation.options import Condensation

SLUG = "dcc"
CHUNK = 256  # pictures of which second derivatives are held


def published_real(net: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """Class by class, all of a class at once, gradients of every parameter; then their mean."""
    found = []
    for c, x in enumerate(batches):
        loss = F.cross_entropy(net(x), torch.full((len(x),), c))
        found.append([g.detach() for g in torch.autograd.grad(loss, list(net.parameters()))])
    return [torch.stack(each).mean(0) for each in zip(*found)]


def published_outer(net: nn.Module, start: Tensor, batches: list[Tensor], inner: int, epochs: int) -> Tensor:
    """The summed loop as it was published: one graph over all parameters, ``backward`` into the pictures."""
    pictures = start.clone().requires_grad_()
    labels = torch.arange(len(batches)).repeat_interleave(len(start) // len(batches))
    images = torch.optim.SGD([pictures], lr=0.1, momentum=0.5)
    weights = torch.optim.SGD(net.parameters(), lr=0.01)
    for step in range(inner):
        goal = published_real(net, batches)
        loss = F.cross_entropy(net(pictures), labels)
        mine = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        total = torch.zeros(())
        for a, b in zip(mine, goal):
            if a.ndim > 1:
                a, b = a.flatten(1), b.flatten(1)
                total = total + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()
        images.zero_grad()
        total.backward()
        images.step()
        if step < inner - 1:
            for _ in range(epochs):
                weights.zero_grad()
                F.cross_entropy(net(pictures.detach()), labels).backward()
                weights.step()
    return pictures.detach()


def summed_step(pictures: int, width: int) -> None:
    """One summed step of 8 classes, with few real pictures."""
    start = torch.randn(pictures, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    real = [torch.randn(8, 3, 32, 32) for _ in range(8)]
    how = Condensation(outer=1, inner=1, epochs=0, outer_warmup=0, inner_warmup=0, rate=0.1, chunk=CHUNK)
    labels = torch.arange(8).repeat_interleave(pictures // 8)
    learn_pictures(lambda k: convnet((3, 32, 32), 8, width=width), start, labels, lambda o, i: real, how)


def peak_mib(pictures: int, width: int) -> float:
    """What a summed step adds to the memory of a process of its own beside the set, its start and its velocity, in MiB; 0 where the system does not tell."""
    told = f"import runpy; m = runpy.run_path({__file__!r}); m['summed_step'](64, {width}); a = m['resident_mib'](); m['summed_step']({pictures}, {width}); print(m['resident_mib']() - a)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", told], capture_output=True, text=True, check=False
    )
    return float(done.stdout) - 3 * pictures * 3 * 32 * 32 * 4 / 2**20 if done.returncode == 0 else 0.0


def resident_mib() -> float:
    status = Path("/proc/self/status")
    return int(re.findall(r"VmHWM:\s*(\d+)", status.read_text())[0]) / 1024 if status.exists() else 0.0


def rows(repeats: int = 3) -> Iterator[Row]:
    width, count, per, inner, epochs = (16, 16, 1, 2, 2) if quick() else (128, 256, 10, 2, 10)
    net = convnet((3, 32, 32), 10, width=width, seed=0)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(count, 3, 32, 32, generator=generator) for _ in range(10)]
    weights = [p for p in net.parameters() if p.ndim > 1]
    what = f"ConvNet-3 of width {width}, 10 x {count}"
    for half, target in ((False, 1.5), (True, 2.2)):
        yield compare(
            SLUG,
            f"real side, {what}" + (", bfloat16" if half else ""),
            lambda half=half: real_gradient(net, weights, batches, range(10), bfloat16=half),
            "the published loop, float32",
            lambda: published_real(net, batches),
            target=target,
            repeats=repeats,
            note="3 passes of 0.1 GFLOP a picture at width 128 on both sides; small chunks keep activations in the caches (1.2 on a shared core); bfloat16 pays where the processor has it",
        )
    start = torch.randn(10 * per, 3, 32, 32, generator=generator)
    labels = torch.arange(10).repeat_interleave(per)
    for half, target in ((False, 1.4), (True, 1.9)):
        how = Condensation(
            outer=1, inner=inner, epochs=epochs, outer_warmup=0, inner_warmup=0, rate=0.1, bfloat16=half
        )
        yield compare(
            SLUG,
            f"outer iteration of {inner} summed steps, {what}, {per} per class"
            + (", bfloat16" if half else ""),
            lambda how=how: learn_pictures(
                lambda k: convnet((3, 32, 32), 10, width=width, seed=0),
                start,
                labels,
                lambda o, i: batches,
                how,
            ),
            "the published loop, float32",
            lambda: published_outer(
                convnet((3, 32, 32), 10, width=width, seed=0), start, batches, inner, epochs
            ),
            target=target,
            repeats=repeats,
            note="10 x 256 real pictures and 100 twice differentiated a step, 1,000 training pictures between steps",
        )
    many = 512 if quick() else 5000
    large, small = (peak_mib(n, width) for n in (many, CHUNK))
    yield compare(
        SLUG,
        f"summed step, {many:,} pictures in chunks of {CHUNK}, ConvNet-3 of width {width}",
        lambda: summed_step(many, width),
        f"{CHUNK} pictures, as often",
        lambda: summed_step(CHUNK, width),
        scale=many / CHUNK,
        repeats=1,
        warmup=0,
        note=f"memory that the step adds to the set's: {large:.0f} MiB, of {CHUNK} pictures {small:.0f} MiB, {large / max(small, 1):.2f} times (target: at most 1.2); "
        "several chunks need one pass more than one, to know the mean gradient",
    )


if __name__ == "__main__":
    for row in rows():
        print(row)
