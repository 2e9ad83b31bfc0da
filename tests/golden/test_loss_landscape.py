"""Planes, directions, spectra and criteria against the official code's numbers and independent float64 evaluations."""

from __future__ import annotations

import re
from collections import OrderedDict

import pytest
import torch
from tests.golden.common import ACTIVATIONS, File, Scope, golden
from torch import Tensor, nn

from lineament.core.curvature.krylov import lanczos
from lineament.core.curvature.matrices import hessian
from lineament.core.gradients import flatten
from lineament.measure.landscape.axes import Axis, given, hessian_axes, normalised
from lineament.measure.landscape.criteria import density_curve, extreme_ratio, negative_ratio
from lineament.measure.landscape.grids import adam_equation, interpolation, line, plane
from lineament.measure.landscape.points import evaluate

LOSSES = {"mean": nn.functional.cross_entropy}
LANCZOS = {"full": lanczos}
# Array: (normalisation, its options); the official code scales one-dimensional tensors as a whole.
DIRECTIONS = {
    "filter": ("filter", {"one_dim": "scale"}),
    "layer": ("layer", {"one_dim": "scale"}),
    "weight": ("weight", {}),
    "model": ("model", {}),
    "filter_L1": ("filter", {"one_dim": "scale", "order": 1}),
}


def tensors(file: Scope, prefix: str, names: list[str]) -> dict[str, Tensor]:
    """Arrays by the names of parameters: ``l1_weight`` is ``l1.weight``."""
    layer = re.compile("_(?=weight|bias|running|num_batches)")
    return {layer.sub(".", name): file.input(f"{prefix}_{name}") for name in names}


def mlp(file: Scope, which: str) -> nn.Sequential:
    """Linear layers with an activation between them."""
    state = tensors(file, which, file["parameter"])
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for name in dict.fromkeys(key.split(".")[0] for key in state):
        if parts:
            parts[f"before {name}"] = ACTIVATIONS[file["activation"]]()
        parts[name] = nn.Linear(*state[f"{name}.weight"].T.shape)
    net = nn.Sequential(parts).double()
    net.load_state_dict(state)
    return net


def convolution(file: Scope) -> nn.Sequential:
    state = tensors(file, "conv", file["conv_parameter"] + file["conv_buffer"])
    (channels, inputs, *_), (classes, width) = state["c.weight"].shape, state["l.weight"].shape
    net = nn.Sequential(
        OrderedDict(
            c=nn.Conv2d(
                inputs,
                channels,
                file["conv_kernel_size"],
                padding=file["conv_padding"],
                stride=file.get("conv_stride", 1),
            ),
            bn=nn.BatchNorm2d(channels, eps=file["bn_eps"]),
            relu=nn.ReLU(),
            flat=nn.Flatten(),
            l=nn.Linear(width, classes),
        )
    ).double()
    net.load_state_dict(state)
    return net.eval()


def check_curvature(case: Scope, data: list[tuple[Tensor, Tensor]]) -> None:
    at, loss_fn, net = case.name, LOSSES[case["reduction"]], mlp(case, case.name)
    operator = hessian(net, loss_fn, data)
    loss = loss_fn(net(data[0][0]), data[0][1])
    dense = operator.dense()
    case.compare(f"{at}_loss", loss)
    case.compare(f"{at}_grad", flatten(torch.autograd.grad(loss, list(net.parameters()))))
    case.compare(f"{at}_hess", dense)
    case.compare(f"{at}_eigs", torch.linalg.eigvalsh(dense))
    case.compare(f"{at}_trace", torch.trace(dense))
    if case.has(f"{at}_v0"):
        v = case.input(f"{at}_v0")
        case.compare(f"{at}_hutch_single", v @ (operator @ v))
        run = LANCZOS[case["reorthogonalize"]](operator, case["lanczos_steps"], start=v)
        case.compare(f"{at}_lanczos_alpha", run.diagonal)
        case.compare(f"{at}_lanczos_beta", run.off_diagonal[:-1])
        nodes, vectors = run.ritz()
        case.compare(f"{at}_nodes", nodes)
        case.compare(f"{at}_weights", vectors[0].square())
    # Criteria and densities are functions of the stored nodes and weights.
    if case.has(f"{at}_nodes") and case.has(f"{at}_weights"):
        nodes, weights = case.input(f"{at}_nodes"), case.input(f"{at}_weights")
        case.compare(f"{at}_re", extreme_ratio(nodes))
        for n in case["exponent"]:
            case.compare(f"{at}_K_{n}", negative_ratio(nodes, weights, n))
        for ending in (m[1] for key in case.values if (m := re.fullmatch(r"density(|_.+)_s2", key))):
            variance, margin = case[f"density{ending}_s2"], case[f"density{ending}_ext"]
            grid, height = density_curve(
                nodes, weights, variance=variance, margin=margin, points=case["n_grid"]
            )
            case.compare(f"{at}_density_grid{ending}", grid)
            case.compare(f"{at}_density{ending}", height)


def check_planes(file: File, data: list[tuple[Tensor, Tensor]]) -> None:
    loss_fn, net = LOSSES[file["reduction"]], mlp(file, file["reference"])
    axes: list[Axis] = []
    for number in sorted({m[1] for m in file.arrays(r"dir(\d+)_.+").values()}):
        raw = given(net, tensors(file, f"dir{number}", file["parameter"]))
        for name, (how, options) in DIRECTIONS.items():
            file.compare(f"dir{number}_{name}", normalised(net, raw, how, **options).vector)
        axes.append(normalised(net, raw, "filter", one_dim="scale"))

    def surface(axes: list[Axis], grid: Tensor) -> Tensor:
        return plane(net, loss_fn, data, axes, at=(grid, grid)).loss

    if file.has("plane_axis"):
        file.compare("plane_filter", surface(axes, file.input("plane_axis")))
    if file.has("plane_freeze_axis"):
        count = file["freeze_tensor"]
        for key, held in ((f"from{count}", count), (f"before{count}", -count)):
            found = surface([axis.frozen(net, held) for axis in axes], file.input("plane_freeze_axis"))
            file.compare(f"plane_freeze_{key}", found)
    if file.has("plane_official_steps"):
        # Their rows are shifted by one cell in turn; the same points by our evaluation give their numbers.
        steps = int(file.input("plane_official_steps"))
        cells = [
            ((i - steps / 2) / steps, (j + (i % 2 == 0) - steps / 2) / steps)
            for i in range(steps)
            for j in range(steps)
        ]
        found = evaluate(net, loss_fn, data, axes, cells)["loss"].view(steps, steps)
        file.compare("plane_official_filter_dist1", found)
    if file.has("hess_plane_axis") or file.arrays("eig(vec|val)_top.+"):
        wanted = file["n_eigenvectors"]
        found = hessian_axes(hessian(net, loss_fn, data), indices=range(wanted), tol=1e-11)
        values = torch.tensor([axis.info["eigenvalue"] for axis in found], dtype=torch.float64)
        file.compare(f"eigval_top{wanted}_mag", values.abs())
        for number, axis in enumerate(found, 1):
            file.compare(f"eigvec_top{number}", axis.vector)
        if file.has("hess_plane_axis"):
            file.compare("hess_plane", surface(found[:2], file.input("hess_plane_axis")))
    if file.has("adameq_steps"):
        moments = [given(net, file.input(f"adam_{key}")) for key in "mv"]
        adam = torch.optim.Adam(net.parameters())
        found = adam_equation(
            net, loss_fn, data, adam, steps=int(file.input("adameq_steps")), moments=moments
        )
        for key, value in (("a", found.a), ("b", found.b), ("correct", found.loss)):
            file.compare(f"adameq_{key}", value)


def check_interpolation(file: File, data: list[tuple[Tensor, Tensor]]) -> None:
    start = next((case.name for case in file.cases if case.name != file["reference"]), file["reference"])
    first, last, loss_fn = mlp(file, start), mlp(file, file["reference"]), LOSSES[file["reduction"]]
    if file.has("interp_alpha"):
        found = interpolation(first, loss_fn, data, last, at=file.input("interp_alpha"))
        file.compare("interp_loss", found.loss)
    steps = file["interp_official_steps"]
    at = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    file.compare(
        f"interp_official_steps{steps}", lambda: interpolation(first, loss_fn, data, last, at=at).loss
    )


def check_batch_norm(file: File) -> None:
    net, loss_fn = convolution(file), nn.functional.cross_entropy
    data = [(file.input("conv_X"), file.input("conv_y"))]
    raw = given(net, tensors(file, "convdir", file["conv_parameter"]))
    scaled, ignored = normalised(net, raw, one_dim="scale"), normalised(net, raw)
    file.compare("convdir_filter", scaled.vector)
    file.compare("convdir_filter_biasbn_ignored", ignored.vector)
    at = file.input("conv_line_alpha")
    file.compare("conv_line_eval", line(net, loss_fn, data, scaled, at=at).loss)
    file.compare("conv_line_trainBN", line(net, loss_fn, data, scaled, at=at, batchnorm="batch").loss)
    file.compare("conv_line_eval_biasbn_ignored", line(net, loss_fn, data, ignored, at=at).loss)


def check_lla(file: File) -> None:
    if file.has("conv_X"):
        check_batch_norm(file)
    if not file.has("X"):
        return
    data = [(file.input("X"), file.input("y"))]
    if all(file.has(f"{which}_nodes") for which in file["repeats"]):
        runs = [[file.input(f"{which}_{key}") for which in file["repeats"]] for key in ("nodes", "weights")]
        nodes, weights, n = torch.stack(runs[0]), torch.stack(runs[1]), file["repeat_exponent"]
        file.compare("multi_re", extreme_ratio(nodes).mean())
        file.compare(f"multi_K_{n}", negative_ratio(nodes, weights, n).mean())
    if file.has(f"{file['reference']}_{file['parameter'][0]}"):
        check_interpolation(file, data)
        check_planes(file, data)
    for case in file.cases:
        check_curvature(case, data)


pytestmark = pytest.mark.filterwarnings(
    "ignore::lineament.measure.landscape.batchnorm_modes.LandscapeWarning"
)
test_golden, test_a_wrong_number_is_noticed = golden(
    "loss-landscape", {"lla": check_lla}, fixed=("direction_eps", "adam_eps", "conv_bn_num_batches_tracked")
)
