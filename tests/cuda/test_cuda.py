"""On a GPU the methods give what they give on the CPU; left out where there is none."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.contracts.language_models import prompts, tiny
from torch import nn

from lineament.audit import audit
from lineament.cli import main
from lineament.core.curvature.density import spectral_density
from lineament.core.curvature.eigenpairs import top_eigenpairs
from lineament.core.curvature.matrices import hessian
from lineament.core.curvature.traces import trace
from lineament.core.readouts import ridge
from lineament.dictionaries.autoencoders import TopK
from lineament.dictionaries.selection import Selection
from lineament.dictionaries.topk import select, step
from lineament.explain.patching.activation import activation_patching
from lineament.explain.patching.attribution import attribution_patching
from lineament.explain.patching.metrics import logit_difference
from lineament.explain.patching.relevance import relevance_patching
from lineament.explain.saliency.maps import saliency
from lineament.explain.tokens.recursion import reagent
from lineament.learn.tract.layer import tract
from lineament.measure.collapse.profile import collapse
from lineament.measure.landscape.axes import random_axes
from lineament.measure.landscape.grids import plane
from lineament.modules import attend
from lineament.modules import select as select_blocks
from lineament.optim import GNS, SAM, DiffGrad

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def exact_products():
    """No TF32: what differs from the CPU is then the order of sums alone."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


def pictures(n=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 12, 12, generator=generator), torch.arange(n) % 4


def both(make):
    """What ``make`` returns for the CPU and for the GPU."""
    return make(torch.device("cpu")), make(DEVICE)


def close(a, b, tol=1e-4):
    torch.testing.assert_close(
        torch.as_tensor(a).cpu(),
        torch.as_tensor(b).cpu(),
        rtol=tol,
        atol=tol * float(torch.as_tensor(a).abs().max()),
    )


def test_hessian_products_eigenvalues_trace_and_density():
    def made(device):
        net = convolutional().double().to(device)
        x, y = pictures()
        operator = hessian(net, F.cross_entropy, [(x.double(), y)])
        v = torch.ones(operator.shape[0], dtype=torch.float64, device=device)
        density = spectral_density(operator, steps=20, probes=1)
        return operator @ v, top_eigenpairs(operator, 2).values, trace(operator, 20).value, density.nodes[0]

    for a, b in zip(*both(made)):
        close(a, b, 1e-6)


@pytest.mark.parametrize("method", ["norm_grad", "grad_cam", "gradient", "integrated_gradients"])
def test_maps(method):
    def made(device):
        x, y = pictures(4)
        options = {"site": "4"} if method in ("norm_grad", "grad_cam") else {}
        return saliency(convolutional().to(device), x.to(device), y.to(device), method=method, **options)

    close(*both(made), tol=1e-3)


def test_collapse():
    def made(device):
        x, y = pictures()
        return collapse(convolutional().to(device), [(x, y)], sites=["4", "6"]).to_dict()

    cpu, gpu = both(made)
    assert cpu.keys() == gpu.keys()
    flat = [[float(v) for v in numbers(each)] for each in (cpu, gpu)]
    assert len(flat[0]) == len(flat[1]) > 10
    np.testing.assert_allclose(*flat, rtol=1e-3, atol=1e-4)


def numbers(nest):
    if isinstance(nest, dict):
        for value in nest.values():
            yield from numbers(value)
    elif isinstance(nest, (list, tuple)):
        for value in nest:
            yield from numbers(value)
    elif isinstance(nest, float):
        yield nest


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", [activation_patching, attribution_patching, relevance_patching])
def test_patching(family, method):
    def made(device):
        clean, corrupt = (ids.to(device) for ids in prompts())
        metric = logit_difference([5, 6, 7], [8, 9, 10])
        result = method(tiny(family).to(device), clean, corrupt, metric, normalise=False)
        return torch.cat([scores.flatten().cpu() for scores in result.scores.values()])

    close(*both(made), tol=1e-3)


def test_reagent_draws_the_same_replacements():
    def made(device):
        return reagent(tiny("gpt2").to(device), prompts()[0][:1].to(device), target=7, steps=5, seed=3).scores

    close(*both(made), tol=1e-3)


def test_ridge():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 8, generator=generator), torch.randn(50, 2, generator=generator)
    cpu, gpu = both(lambda device: ridge(x.to(device), y.to(device)))
    close(cpu.predict(x), gpu.predict(x.to(DEVICE)), tol=1e-3)


def parameters(device):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(n, generator=generator).to(device)) for n in (7, 4096, 300)]
    return params, generator


def stepped(device, make, steps=4):
    params, generator = parameters(device)
    optimizer = make(params)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(device)
        optimizer.step()
    return torch.cat([p.detach().cpu() for p in params])


@pytest.mark.parametrize(
    "options",
    [
        {}, {"foreach": False}, {"foreach": True}, {"compiled": True}, {"capturable": True}, {"capturable": True, "compiled": True}, {"amsgrad": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True}, {"version": 1}, {"rectify": "skip"},
    ],
)  # fmt: skip
def test_diffgrad_in_every_form(options):
    plain = {k: v for k, v in options.items() if k not in ("foreach", "compiled", "capturable")}
    want = stepped(torch.device("cpu"), functools.partial(DiffGrad, lr=0.1, **plain))
    close(want, stepped(DEVICE, functools.partial(DiffGrad, lr=0.1, **options)), tol=1e-5)


def test_diffgrad_in_a_graph_of_the_device():
    """Captured once and replayed, with the gradients written into the same memory."""
    params, generator = parameters(DEVICE)
    twin = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer, plain = DiffGrad(params, lr=0.1, capturable=True), DiffGrad(twin, lr=0.1)
    for p, q in zip(params, twin):
        p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)

    def draw():
        for p, q in zip(params, twin):
            gradient = torch.randn(p.shape, generator=generator).to(DEVICE)
            p.grad.copy_(gradient)
            q.grad.copy_(gradient)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            draw()
            optimizer.step()
            plain.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(5):
        draw()
        graph.replay()
        plain.step()
    for p, q in zip(params, twin):
        close(q.detach(), p.detach(), tol=1e-5)


def trained(device, prepare, steps=5):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.Tanh(), nn.Linear(16, 4)).to(device)
    x, y = (t.to(device) for t in pictures())
    step = prepare(net)
    for _ in range(steps):
        step(net, x, y)
    return torch.cat([p.detach().flatten().cpu() for p in net.parameters()])


def closure_of(net, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return closure


def test_sam():
    def prepare(net):
        optimizer = SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.05, model=net)
        return lambda net, x, y: optimizer.step(closure_of(net, optimizer, x, y))

    close(*both(lambda device: trained(device, prepare)), tol=1e-4)


def test_gns():
    def prepare(net):
        optimizer = GNS(net.parameters())

        def closure(x, y):
            return lambda: F.cross_entropy(net(x), y)

        return lambda net, x, y: optimizer.step(closure(x, y))

    close(*both(lambda device: trained(device, prepare, steps=2)), tol=1e-2)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_tract(autocast):
    def prepare(net):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        tract(net)

        def step(net, x, y):
            optimizer.zero_grad()
            with torch.autocast(
                x.device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None
            ):
                loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()

        return step

    cpu = trained(torch.device("cpu"), prepare) if autocast is None else None
    gpu = trained(DEVICE, prepare)
    assert torch.isfinite(gpu).all()
    if cpu is not None:
        close(cpu, gpu, tol=1e-3)


def test_plane():
    def made(device):
        net = convolutional().to(device)
        x, y = pictures()
        return torch.as_tensor(plane(net, F.cross_entropy, [(x, y)], random_axes(net), steps=5).loss)

    close(*both(made), tol=1e-3)


def test_a_model_on_the_gpu_is_left_as_it_was():
    net = convolutional().to(DEVICE)
    before = copy.deepcopy(net.state_dict())
    x, y = pictures()
    plane(net, F.cross_entropy, [(x, y)], random_axes(net), steps=3)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


FACTORY = """
from torch import nn
def build():
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
"""


def test_train_and_audit_commands(tmp_path):
    (tmp_path / "net.py").write_text(FACTORY)
    x, y = pictures(200)
    np.savez(tmp_path / "data.npz", images=x.numpy(), labels=y.numpy())
    out, data, factory = tmp_path / "trained", str(tmp_path / "data.npz"), f"{tmp_path / 'net.py'}:build"
    assert main(["train", factory, data, "--epochs", "2", "--device", "cuda", "--out", str(out)]) == 0
    weights = str(out / "model.safetensors")
    audit = [
        "audit",
        factory,
        data,
        "--weights",
        weights,
        "--device",
        "cuda",
        "--out",
        str(tmp_path / "report"),
    ]
    assert main(audit) == 0
    assert (tmp_path / "report" / "report.html").stat().st_size > 1000


def test_an_audit_has_the_numbers_of_the_cpu(tmp_path):
    def made(device):
        net, lenses = convolutional().to(device), ["accuracy", "collapse", "spectrum"]
        report = audit(net, pictures(120), out=tmp_path / device.type, lenses=lenses)
        layers = report["collapse"].numbers["sites"] + report["spectrum"].numbers["sites"]
        found = [layer.get("nc1_tilde", layer.get("effective_rank")) for layer in layers]
        return torch.tensor([report["accuracy"].numbers["overall"]["accuracy"], *found])

    close(*both(made), tol=1e-3)


def attended(device, backend, dtype, group=4, block_size=16, size=64):
    torch.manual_seed(0)
    shapes = ((2, 2 * group, 300, size), (2, 2, 300, size), (2, 2, 300, size))
    given = [torch.randn(*shape).to(device, dtype).requires_grad_() for shape in shapes]
    padding = torch.arange(300)[None] >= torch.tensor([[0], [45]])
    selection = select_blocks(
        given[0], given[1], block_size=block_size, blocks=3, padding=padding.to(device), recent=1
    )
    found = attend(*given, selection, backend=backend)
    (found.output.float() * torch.linspace(0, 1, size, device=device)).sum().backward()
    return found, [x.grad for x in given]


@pytest.mark.parametrize("backend", ["triton", "flex"])
@pytest.mark.parametrize(("group", "block_size", "size"), [(1, 16, 64), (4, 64, 128), (7, 5, 64), (12, 1, 32), (4, 80, 16)])  # fmt: skip
def test_kernels_of_sparse_attention(backend, group, block_size, size):
    shape = {"group": group, "block_size": block_size, "size": size}
    # Both read what was chosen from the same numbers, so that no block is another.
    known, gradients = attended(DEVICE, "gather", torch.float32, **shape)
    found, ours = attended(DEVICE, backend, torch.float32, **shape)
    assert torch.equal(known.selection.indices, found.selection.indices)
    for a, b in zip([known.output, *gradients], [found.output, *ours]):
        close(a, b, 1e-3)
    real = known.lse.isfinite()
    close(known.lse[real], found.lse[real], 1e-3)


def test_the_triton_kernels_in_half_precision_are_the_same_in_every_run_and_chosen_by_themselves():
    known, gradients = attended(DEVICE, "gather", torch.bfloat16)
    runs = [attended(DEVICE, backend, torch.bfloat16) for backend in ("triton", "auto")]
    for found, ours in runs:
        close(known.output.float(), found.output.float(), 0.03)
        for a, b in zip(gradients, ours):
            close(a.float(), b.float(), 0.03)
    for a, b in zip([runs[0][0].output, *runs[0][1]], [runs[1][0].output, *runs[1][1]]):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_audit_on_a_gpu_each(tmp_path):
    (tmp_path / "net.py").write_text(f"import torch\ntorch.manual_seed(0)\n{FACTORY}")
    x, y = pictures(200)
    np.savez(tmp_path / "data.npz", images=x.numpy(), labels=y.numpy())
    words = [
        "audit",
        f"{tmp_path / 'net.py'}:build",
        str(tmp_path / "data.npz"),
        "--lenses",
        "collapse,landscape",
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    out = str(tmp_path / "two")
    subprocess.run(
        [*launch, "-m", "lineament", *words, "--device", "cuda", "--out", out], check=True, timeout=300
    )
    assert main([*words, "--device", "cuda", "--out", str(tmp_path / "one")]) == 0
    one, two = (
        json.loads((tmp_path / name / "report.json").read_text())["sections"][0]["numbers"]["sites"][-1][
            "nc1_tilde"
        ]
        for name in ("one", "two")
    )
    assert one == pytest.approx(two, rel=1e-3)


@pytest.mark.parametrize("score", ["sum", "product", "signed", "topk_of_l1"])
def test_topk_steps(score):
    """Choice, gradients with dead latents and the optimizer: on a GPU they are Triton's kernels, the same bits each run."""
    d, width, count = 96, 3000, 300
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(count, d, generator=generator) for _ in range(2))
    start = TopK(d, width, k=8, selection=Selection(score=score))
    with torch.no_grad():
        for p in start.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / d**0.5)
        start.W_dec.div_(start.W_dec.norm(dim=1, keepdim=True))

    def made(device):
        sae = copy.deepcopy(start).to(device)
        dead = torch.arange(width, device=device) % 9 == 0
        codes = sae.codes(x.to(device), gradient=g.to(device))
        found, _ = step.gradients(sae, x.to(device), codes, dead=dead, k_aux=16, variance=float(d))
        told = [grad.clone() for grad in found.values()]
        parameters = {name: p.detach() for name, p in sae.named_parameters()}
        step.Adam(parameters, unit=("W_dec",)).step(found, 1e-3)
        return codes.dense().detach(), told, list(parameters.values())

    (codes, found, moved), (codes_there, found_there, moved_there) = both(made)
    assert float(((codes != 0) == (codes_there.cpu() != 0)).double().mean()) > 1 - 1e-5
    for a, b in zip(found, found_there):
        assert float((a - b.cpu()).norm() / a.norm()) < 1e-3
    for a, b in zip(moved, moved_there):
        assert float((a - b.cpu()).abs().mean()) < 2e-5
    again = made(DEVICE)
    for one, other in zip([codes_there, *found_there, *moved_there], [again[0], *again[1], *again[2]]):
        assert torch.equal(one, other)
    if find_spec("triton") is not None:
        assert select.kernels(start.to(DEVICE).W_enc) is not None


@pytest.mark.parametrize("solver", ["lbfgs", "varpro", "adam", "sgd"])
def test_a_boosted_network_grown_on_the_gpu_is_as_good(solver):
    from sklearn.datasets import load_iris

    from lineament.learn import GBNNClassifier

    X, y = load_iris(return_X_y=True)
    made = {"total_units": 12, "units_per_step": 3, "learning_rate": 0.5, "solver": solver, "random_state": 0}
    nets = [GBNNClassifier(**made, device=device).fit(X, y) for device in ("cpu", "cuda")]
    assert all(net.score(X, y) > 0.93 for net in nets)
    np.testing.assert_allclose(nets[1].predict_proba(X), nets[0].predict_proba(X), atol=0.2)


def test_descriptors_on_the_gpu_are_those_of_the_processor():
    from lineament.handcrafted import gabor, hog, lbp_codes

    x = torch.randint(0, 256, (40, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for made in (
        lambda v: hog(v.float() / 255),
        lambda v: hog(v.double(), signed=True, binning="linear", norm="L1"),
        lambda v: hog(v, like="opencv"),
        lambda v: gabor(v.float() / 255),
    ):
        torch.testing.assert_close(made(x.cuda()).cpu(), made(x), rtol=1e-4, atol=1e-5)
    for codes in ("default", "nri_uniform"):
        same = lbp_codes(x.cuda(), codes=codes).cpu() == lbp_codes(x, codes=codes)
        assert float(same.double().mean()) > 0.999
