"""DiffROAR: do input gradients mark what a network uses, and does adversarial training change that?

Shah, Jain, Netrapalli, NeurIPS 2021, arXiv 2102.12781. ``quick`` and ``small`` are BlockMNIST (on MNIST where it is found, else on scikit-learn's
digits) and the simplified data of the theorem; ``paper`` is CIFAR-10 with a ResNet-50, or a folder of images with a ResNet-18.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import require
from lineament.explain.faithfulness.input_gradients import attribution
from lineament.explain.faithfulness.retraining import FRACTIONS, DiffROAR
from lineament.recipes.diffroar import figures
from lineament.recipes.diffroar.experiments import MODELS, PLACEMENTS, Demonstration, rebuilt, simplified
from lineament.recipes.diffroar.photographs import on_photographs
from lineament.recipes.kit.presets import presets
from lineament.report.outcome import Claim, Outcome, Table

SLUG = "diffroar"
TITLE = "Do Input Gradients Highlight Discriminative Features?"
SIMPLIFIED = ("linear", "wide", "robust", "everywhere")
OTHER_KINDS = ("loss_predicted", "softmax_predicted", "logit_predicted x input")


@dataclass(frozen=True)
class Config:
    """One run. The groups are: all data sets, BlockMNIST (``widths`` also for ``network="mlp"``), the simplified data, photographs."""

    dataset: Literal["blockmnist", "cifar10", "images"] = "blockmnist"
    data_folder: str | None = None
    fractions: tuple[float, ...] = (1.0, 0.5, 0.2, 0.1, 0.05)
    level: float = 0.1
    runs: int = 3
    jobs: int = 2
    seed: int = 0

    data: Literal["auto", "mnist", "digits"] = "auto"
    train_images: int = 6000
    test_images: int = 1000
    widths: tuple[int, ...] = (256, 256)
    epochs: int = 12
    retrain_epochs: int = 10
    batch_size: int = 100
    lr: float = 1e-3
    eps: float | None = None
    attack_steps: int = 5
    controls: bool = True

    blocks: int = 10
    points: int = 2000
    wide: int = 2000
    simple_epochs: int = 60
    robust_width: int = 512
    robust_epochs: int = 200

    network: Literal["resnet18", "resnet50", "mlp"] = "resnet50"
    network_width: int = 64
    image_size: int = 112
    photograph_epochs: int = 150
    photograph_lr: float = 0.1
    attacks: tuple[str, ...] = ("l2 0.25", "l2 0.5", "l2 1.0", "linf 8/255")
    device: str = "auto"

    preset: str = presets(
        quick={
            "fractions": (1.0, 0.2, 0.1),
            "runs": 2,
            "train_images": 2000,
            "test_images": 500,
            "widths": (128, 128),
            "epochs": 10,
            "retrain_epochs": 8,
            "controls": False,
            "robust_width": 256,
            "robust_epochs": 60,
        },
        small={},
        paper={"dataset": "cifar10", "fractions": FRACTIONS, "runs": 5, "level": 0.1, "batch_size": 128},
    )


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished stage."""
    require(config.runs > 0, f"runs: got {config.runs}, expected at least 1")
    require(
        config.level in config.fractions,
        f"level: got {config.level}, expected one of the fractions {config.fractions}: the claims are judged there",
    )
    stages = Checkpoint(out / ".stages", asdict(config))
    if config.dataset != "blockmnist":
        return on_photographs(config, stages, out, SLUG, TITLE)
    demo = Demonstration(config)

    def timed(name: str, compute: Any) -> Any:
        def work() -> dict[str, Any]:
            start = time.perf_counter()
            value = compute()
            return {"value": value, "seconds": time.perf_counter() - start}

        stored = stages.stage(name, work)
        seconds[name] = stored["seconds"]
        return stored["value"]

    seconds: dict[str, float] = {}
    models = {
        placement: {
            kind: demo.model(timed(f"{kind} {placement}", lambda p=placement, k=kind: demo.train(p, k)))
            for kind in MODELS
        }
        for placement in PLACEMENTS
    }
    seen = {
        (kind, placement): timed(
            f"describe {kind} {placement}",
            lambda p=placement, k=kind: demo.describe(models[p][k], p),
        )
        for placement in PLACEMENTS
        for kind in MODELS
    }
    judged: dict[str, DiffROAR] = {}
    for kind in MODELS:
        model = models["random"][kind]
        judged[kind] = rebuilt(
            timed(
                f"diffroar {kind}",
                lambda m=model: demo.judge(attribution(m), fractions=config.fractions, runs=config.runs),
            )
        )
    demonstration = sum(seconds.values())
    noise = attribution(models["random"]["standard"], "random", seed=config.seed)
    judged["random"] = rebuilt(
        timed("diffroar random", lambda: demo.judge(noise, fractions=(1.0, config.level), runs=config.runs))
    )
    others = _controls(config, demo, models["random"], timed) if config.controls else {}
    theory = {name: timed(f"simplified {name}", lambda n=name: simplified(config, n)) for name in SIMPLIFIED}
    tables = [*_tables(config, demo, seen, judged, theory, others)]
    tables.append(
        Table(
            "Seconds",
            ["what", "seconds"],
            [
                ["BlockMNIST: four models, their gradients, DiffROAR of two", demonstration],
                ["everything", sum(seconds.values())],
            ],
        )
    )
    drawn = [
        figures.curves(judged, out),
        figures.heat_maps(models, demo.data, out),
        figures.theorem(theory, config.blocks, out),
    ]
    return Outcome(
        SLUG,
        TITLE,
        config.preset,
        asdict(config),
        claims(config, seen, judged, theory, others),
        tables,
        drawn,
    )


def _controls(config: Config, demo: Demonstration, models: Any, timed: Any) -> dict[str, Any]:
    """What one wants to know besides: other gradients, another fill, and labels that mean nothing; one run each."""
    found: dict[str, Any] = {"shuffled": timed("shuffled labels", demo.shuffled)}
    for kind, model in models.items():
        for name in OTHER_KINDS:
            gradient, times = name.removesuffix(" x input"), name.endswith("x input")
            explain = attribution(model, gradient, times_input=times)
            found[f"{kind}|{name}"] = timed(
                f"{kind} {name}", lambda e=explain: demo.judge(e, fractions=(config.level,), runs=1)
            )
        explain = attribution(model)
        found[f"{kind}|mean fill"] = timed(
            f"{kind} mean fill",
            lambda e=explain: demo.judge(e, fractions=(config.level,), runs=1, fill="mean"),
        )
    return found


def claims(config: Config, seen: Any, judged: Any, theory: Any, others: Any) -> list[Claim]:
    """The paper's claims and the controls, judged by predicates that were written before the first run."""
    k, at = config.level, f"{100 * config.level:g} % kept"
    standard, robust, noise = judged["standard"], judged["robust"], judged["random"]
    share = {key: value["null_fraction"] for key, value in seen.items()}
    ends = _interval(robust, k)
    small = [f for f in robust.fractions if f < 0.5]
    wide, sturdy, everywhere = theory["wide"], theory["robust"], theory["everywhere"]
    found = [
        Claim(
            f"Standard training: DiffROAR is near zero or negative (at {at}, at most 0.05)",
            "CIFAR-10 -0.048, ImageNet-10 -0.046 at 10 % kept; 0.007 on BlockMNIST in our specification's trial",
            f"{standard.at(k):+.3f}",
            standard.at(k) <= 0.05,
            ""
            if standard.at(k) <= 0.05
            else "the standard model's gradient does order the pixels to some degree here",
        ),
        Claim(
            f"Adversarial training: DiffROAR is clearly positive (at {at}, at least 0.1, its interval above zero)",
            "CIFAR-10 l2 0.5: 0.137, linf 8/255: 0.228; BlockMNIST 0.760 in our specification's trial",
            f"{robust.at(k):+.3f}, 95 % interval over {config.runs} seeds {ends[0]:.3f} to {ends[1]:.3f}",
            robust.at(k) >= 0.1 and ends[0] > 0,
            "" if robust.at(k) >= 0.1 and ends[0] > 0 else "the interval over so few runs is wide",
        ),
        Claim(
            "The robust model's DiffROAR exceeds the standard model's at every share kept below a half",
            "so at every level of the published curves below a half",
            "; ".join(f"{100 * f:g} %: {robust.at(f):+.3f} against {standard.at(f):+.3f}" for f in small),
            all(robust.at(f) > standard.at(f) for f in small),
        ),
        Claim(
            "The null block's share of the largest gradients drops with robust training (to at most half)",
            ".447 to .037 of the top 10 % in our specification's trial (the paper shows heat maps)",
            f"{share['standard', 'random']:.3f} to {share['robust', 'random']:.3f}",
            share["robust", "random"] <= share["standard", "random"] / 2,
        ),
        Claim(
            "Leakage goes away when the signal is always on top (BlockMNIST-Top: share at most 0.05)",
            "the standard model's gradients avoid the null block; .000 in our specification's trial",
            f"standard {share['standard', 'top']:.3f}, robust {share['robust', 'top']:.3f}",
            share["standard", "top"] <= 0.05,
        ),
        Claim(
            "The theorem beside a trained wide network: other signal blocks have as much gradient as the own (ratio 0.8 to 1.25), noise little (share at most 0.1)",
            "ratio 1, noise 0; ratio 1.1 in our specification's trial",
            f"ratio {wide['ratio']:.2f}, noise {wide['noise']:.3f}",
            0.8 <= wide["ratio"] <= 1.25 and wide["noise"] <= 0.1,
            ""
            if 0.8 <= wide["ratio"] <= 1.25 and wide["noise"] <= 0.1
            else "noise coordinates are always zero here, so that their weights stay as they were drawn; only the others grow, with training",
        ),
        Claim(
            "A robust network's gradient marks the instance's own block (largest there in at least 0.9 of instances)",
            "1.000 in the official run, 1.0 in our specification's trial",
            f"{sturdy['top_is_own']:.3f}; shares own {sturdy['own']:.2f}, other {sturdy['other']:.2f}",
            sturdy["top_is_own"] >= 0.9,
        ),
        Claim(
            "With the signal in every block, a standard network's largest gradient is not the signal (at most 0.15), the smallest often is (at least 0.3)",
            "largest .041, smallest .562 in the official run",
            f"largest {everywhere['top_is_own']:.3f}, smallest {everywhere['bottom_is_own']:.3f}",
            everywhere["top_is_own"] <= 0.15 and everywhere["bottom_is_own"] >= 0.3,
        ),
        Claim(
            f"Control: a random order has DiffROAR 0 (at {at}, zero within the 95 % interval)",
            "0 in expectation",
            "{:+.3f}, interval over {} seeds {:.3f} to {:.3f}".format(
                noise.at(k), config.runs, *_interval(noise, k)
            ),
            _interval(noise, k)[0] <= 0 <= _interval(noise, k)[1],
            ""
            if _interval(noise, k)[0] <= 0 <= _interval(noise, k)[1]
            else f"the interval is over training seeds only: all runs share one draw of the order and {config.test_images} test images, whose "
            f"own standard error is {noise.test_error[noise.fractions.index(k)]:.3f}",
        ),
        Claim(
            "Control: with everything kept DiffROAR is exactly 0",
            "0",
            "; ".join(f"{name} {each.at(1.0):g}" for name, each in judged.items() if 1.0 in each.fractions),
            all(each.at(1.0) == 0 for each in judged.values() if 1.0 in each.fractions),
        ),
    ]
    if "shuffled" in others:
        both = [others["shuffled"][end][0][0] for end in ("keep_top", "keep_bottom")]
        bar = others["shuffled"]["chance"] + 3 * (0.1 * 0.9 / config.test_images) ** 0.5
        found.append(
            Claim(
                "Control: with shuffled labels both ends are at chance (no label leaks into the masks; three standard errors)",
                "chance",
                f"top kept {both[0]:.3f}, bottom kept {both[1]:.3f}; at most {bar:.3f}",
                max(both) <= bar,
            )
        )
    return found


def _interval(found: DiffROAR, fraction: float) -> tuple[float, float]:
    low, high = found.interval()[found.fractions.index(fraction)].tolist()
    return low, high


def _tables(
    config: Config, demo: Demonstration, seen: Any, judged: Any, theory: Any, others: Any
) -> list[Table]:
    found = [
        Table(
            f"BlockMNIST on {demo.source}: accuracy, accuracy under attack (l2, {demo.attack.eps:g}), the null block's share of the largest 10 % and of "
            "all of the gradient",
            [
                "model",
                "signal",
                "accuracy",
                "under attack",
                "attack without gradient",
                "null share, top 10 %",
                "null mass",
            ],
            [
                [
                    kind,
                    placement,
                    v["accuracy"],
                    v["attacked"],
                    v["no_gradient"],
                    v["null_fraction"],
                    v["null_mass"],
                ]
                for (kind, placement), v in seen.items()
            ],
        ),
        Table(
            f"Retraining, {config.runs} runs; replaced coordinates are black; DiffROAR with its standard deviation over pairs of runs and 95 % interval over seeds",
            [
                "model",
                "kept",
                "top kept",
                "bottom kept",
                "DiffROAR",
                "deviation",
                "from",
                "to",
                "ROAR",
                "zero scores",
            ],
            [
                [
                    name,
                    f,
                    float(each.kar[i]),
                    float(each.keep_bottom[i].mean()),
                    float(each.mean[i]),
                    float(each.std[i]),
                    *each.interval()[i].tolist(),
                    float(each.roar[i]),
                    each.zero_share[0],
                ]
                for name, each in judged.items()
                for i, f in enumerate(each.fractions)
            ],
        ),
        Table(
            f"Simplified data, {config.blocks} blocks: where the gradient lies",
            [
                "network",
                "accuracy",
                "own",
                "other signal",
                "noise",
                "largest is own",
                "smallest is own",
                "|cos|",
            ],
            [
                [
                    name,
                    *(
                        v[c]
                        for c in (
                            "accuracy",
                            "own",
                            "other",
                            "noise",
                            "top_is_own",
                            "bottom_is_own",
                            "cosine",
                        )
                    ),
                ]
                for name, v in theory.items()
            ],
        ),
    ]
    rows = [
        [*key.split("|"), each["keep_top"][0][0], each["keep_bottom"][0][0], each["mean"][0]]
        for key, each in others.items()
        if "|" in key
    ]
    if rows:
        title = f"Other attributions and another fill, {100 * config.level:g} % kept, one run"
        found.append(Table(title, ["model", "attribution", "top kept", "bottom kept", "DiffROAR"], rows))
    return found
