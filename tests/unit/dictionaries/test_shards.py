"""Features that lie with two processes: codes, losses, gradients, training and files are those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import free_port
from torch import Tensor, nn

from lineament.core.checks import InputError
from lineament.dictionaries import Steer, evaluate, load_dictionary, max_examples, steer, steering_effects
from lineament.dictionaries.autoencoders import BatchTopK, TopK
from lineament.dictionaries.harvest import seeded
from lineament.dictionaries.selection import Selection
from lineament.dictionaries.topk import shards, step
from lineament.dictionaries.trainer import TrainingOptions, _directions_, initialise
from lineament.dictionaries.training import train_dictionary

D, WIDTH, ROWS = 6, 25, 9  # 13 features and 12

KINDS: dict[str, Any] = {
    "row": lambda: TopK(D, WIDTH, k=3, selection=Selection(beta=2.0)),
    "product, all": lambda: TopK(D, WIDTH, k=20, selection=Selection(score="product")),
    "signed": lambda: TopK(D, WIDTH, k=4, selection=Selection(score="signed")),
    "groups": lambda: TopK(D, WIDTH, k=3, selection=Selection(beta=2.0, pool=4)),
    "batch": lambda: BatchTopK(D, WIDTH, k=3),
}
PLAN: dict[str, Any] = {
    "tokens": 64 * 12, "batch_size": 64, "gradient": "labels", "learning_rate": 5e-3, "options": TrainingOptions(dead_tokens=200, ema=0.5),
}  # fmt: skip

SCRIPT = """
import os, sys, torch, torch.distributed as dist
from test_shards import KINDS, TRAINED, filled, found, looked, trained
from lineament.core.checks import InputError
from lineament.dictionaries import export_saelens, load_dictionary

dist.init_process_group("gloo")
rank, path = dist.get_rank(), sys.argv[1]
told = {}
for name, made in KINDS.items():
    sae = filled(made())
    if rank:
        with torch.no_grad():
            sae.W_dec.zero_()  # the first process's weights are everybody's
    sae.shard()
    told[name] = found(sae)
made = [kind() for kind in TRAINED]
for sae in made:
    sae.shard()
told["trained"] = []
for number, one in enumerate(trained(made)):
    one.dictionary.save_pretrained(f"{path}/{number}")
    told["trained"].append([tuple(one.dictionary.W_enc.to_local().shape), one.history, one.dictionary.info])
again = load_dictionary(f"{path}/0")
again.shard()
told["looked"] = looked(again)
try:
    export_saelens(again, f"{path}/export")
except InputError as error:
    told["export"] = str(error)
torch.save(told, f"{path}/{rank}.pt")
dist.destroy_process_group()
"""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(sae: Any) -> Any:
    sae = sae.double()
    with torch.no_grad():
        for number, p in enumerate(sae.parameters()):
            p.copy_(normal(*p.shape, seed=number + 7))
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    return sae


def found(sae: Any) -> dict[str, Tensor]:
    """Everything that is compared, whole in each process."""
    x, g, dead = normal(ROWS, D), normal(ROWS, D, seed=1), torch.arange(WIDTH) % 3 == 0
    options: dict[str, Any] = {"dead": dead, "k_aux": 5, "variance": 2.0}
    codes = sae.codes(x, gradient=g)
    with torch.no_grad():
        told = {"codes": codes.dense().detach(), "activation": sae.encode(x), "z": sae.pre_activations(x)}
        told["dense"] = sae.decode(told["codes"]) - sae.decode(codes)
    by_hand, losses = step.gradients(sae, x, sae.codes(x, gradient=g), alpha=0.1, **options)
    told |= {"reconstruction": losses.reconstruction, "auxiliary": losses.auxiliary}
    inputs = x.clone().requires_grad_()
    loss = step.losses(sae, inputs, sae.codes(inputs, gradient=g), **options)
    (loss.reconstruction + 0.1 * loss.auxiliary).backward()
    assert inputs.grad is not None
    told["x"] = inputs.grad
    for name, parameter in sae.named_parameters():
        told[f"{name}, autograd"] = shards.whole(parameter.grad)
        own = parameter.detach().clone()
        shards.local(own).copy_(by_hand[name])
        told[name] = shards.whole(own)
    if isinstance(sae, BatchTopK):
        sae.threshold.fill_(1.0)
        told["by threshold"] = sae.encode(x).detach()
    return told


TRAINED = [
    lambda: TopK(12, 25, k=2),
    lambda: TopK(12, 24, k=2, selection=Selection(beta=0.0)),
    lambda: BatchTopK(12, 24, k=2),
]


def network() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Identity(), nn.Linear(12, 4))
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    return net, (x, torch.arange(64) % 4)


def trained(dictionaries: list[Any]) -> list[Any]:
    return train_dictionary(*network(), site="0", dictionary=dictionaries, **PLAN)


def looked(sae: Any) -> dict[str, Any]:
    """What the calls that look at a dictionary say."""
    net, data = network()
    told: dict[str, Any] = {"atoms": sae.atoms}
    for mode in ("activation", "gradient"):
        seen = evaluate(net, sae, data, mode=mode)
        told |= {f"{mode} {name}": v for name, v in seen.to_dict().items() if isinstance(v, float)}
    seen = max_examples(net, sae, data, top=3)
    told |= {"maxima": seen.maxima, "typical norm": seen.typical_norm}
    with torch.no_grad(), steer(net, [Steer(sae, 3, add=2.0, unit=1.0), Steer(sae, 20, clamp=1.0, unit=1.0)]):
        told["steered"] = net(data[0])
    told["effects"] = steering_effects(net, sae, data[0][:4], latents=[1, 20]).kl
    return told


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    path = tmp_path_factory.mktemp("two")
    (path / "two.py").write_text(SCRIPT)
    paths = [str(Path(__file__).parent), *(str(Path(p).resolve()) for p in sys.path if p)]
    around = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    around |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    runs = [
        subprocess.Popen(
            [sys.executable, "two.py", str(path)], cwd=path, stderr=subprocess.PIPE, env={**around, "RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(2)
    ]  # fmt: skip
    for run in runs:
        _, said = run.communicate(timeout=200)
        assert run.returncode == 0, said.decode()[-3000:]
    return path, [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_codes_losses_and_gradients_are_those_of_one_process(two_processes: Any, kind: str) -> None:
    expected = found(filled(KINDS[kind]()))
    assert (
        expected["auxiliary"] > 0
        and (expected["codes"] != 0).any()
        and not expected["dense"].abs().max() > 1e-12
    )
    for told in two_processes[1]:
        assert told[kind].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(told[kind][name], value, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.slow
def test_trained_by_two_processes_it_is_one_file_with_the_weights_of_one(two_processes: Any) -> None:
    path, told = two_processes
    for number, alone in enumerate(trained([kind() for kind in TRAINED])):
        opened = load_dictionary(path / str(number))
        width = alone.dictionary.width
        assert [one["trained"][number][0] for one in told] == [(-(-width // 2), 12), (width // 2, 12)]
        for name, value in alone.dictionary.state_dict().items():
            torch.testing.assert_close(
                opened.state_dict()[name], value, rtol=0, atol=5e-5, msg=f"{number} {name}"
            )
        for one in told:
            for moment, theirs in zip(alone.history, one["trained"][number][1], strict=True):
                assert (moment.tokens, moment.l0, moment.dead) == (theirs.tokens, theirs.l0, theirs.dead)
                assert moment.fvu == pytest.approx(theirs.fvu, abs=1e-4)
        training = opened.info["training"]
        assert training["initial_sha256"] == alone.dictionary.info["training"]["initial_sha256"]
        assert training["processes"] == 2


@pytest.mark.slow
def test_what_looks_at_a_file_that_was_opened_and_divided_again_sees_the_same(two_processes: Any) -> None:
    path, told = two_processes
    expected = looked(load_dictionary(path / "0"))
    for one in told:
        assert one["looked"].keys() == expected.keys() and len(expected) > 40
        for name, value in expected.items():
            torch.testing.assert_close(one["looked"][name], value, rtol=1e-4, atol=1e-6, equal_nan=True, msg=name)  # fmt: skip
        assert one["export"].startswith("dictionary: its features lie with several processes")


def test_start_values_do_not_hang_on_who_holds_them() -> None:
    whole = torch.empty(100, 5)
    _directions_(whole, 100, 0, seeded(0))
    drawn = torch.randn(100, 5, generator=seeded(0), dtype=torch.float64)
    assert torch.equal(whole, (drawn / drawn.norm(dim=1, keepdim=True)).float())
    for first, stop in ((0, 37), (37, 100)):
        own = torch.empty(stop - first, 5)
        _directions_(own, 100, first, seeded(0), at_once=16)
        assert torch.equal(own, whole[first:stop])
    sae = TopK(5, 100, k=2)
    initialise(sae, torch.randn(50, 5))
    assert torch.equal(sae.atoms, whole)


def test_the_best_of_a_pool_push_others_out() -> None:
    values = torch.tensor([[5.0, 4.0], [3.0, 0.0], [1.0, 2.0]])
    indices = torch.arange(6).view(3, 2)
    kept, those = shards.best(indices, values, values, 1, size=2)
    dense = torch.zeros(3, 6).scatter(1, kept, those)
    assert dense.tolist() == [[5, 4, 0, 0, 0, 0], [0] * 6, [0, 0, 0, 0, 0, 2]]


def test_refused() -> None:
    with pytest.raises(InputError, match="mesh: there is no process group"):
        TopK(4, 8, k=2).shard()
