"""The subcommand ``lineament audit``; imports no torch before it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lineament.audit.lenses import LENSES

_EPILOG = (
    "lenses:\n"
    + "\n".join(f"  {name:<10} {what}" for name, what in LENSES.items())
    + """

examples:
  lineament audit --out report
  lineament audit net.py:make data.npz --weights net.safetensors --groups site --out report
  lineament audit ./resnet-saved ./photos --out report --samples 500 --lenses accuracy,gaze
  lineament audit ./gpt2-saved pairs.jsonl --out report

A run that was cut off goes on where it stopped when the same command is given again."""
)


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add ``audit`` to the commands of :mod:`lineament.cli`."""
    parser = subparsers.add_parser(
        "audit",
        help="what a trained network relies on, as one report; without arguments, on a built-in example",
        description="What does this network rely on, and how does it hold it? Writes report.html and report.json.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help="package.module:factory, file.py:factory, a torch.export .pt2, or a Hugging Face directory or name",
    )
    add(
        "data",
        nargs="?",
        metavar="DATA",
        help=".npz, a folder of images by class, a Hugging Face data set, or digits; for a language model a .txt of prompts, a .jsonl of "
        "prompts or prompt pairs (clean, corrupt, answer, wrong), or ioi",
    )
    add(
        "--out",
        metavar="DIR",
        default="lineament-report",
        help="the folder for the report (default: lineament-report)",
    )
    add("--overwrite", action="store_true", help="replace a finished report in that folder")
    add("--weights", metavar="FILE", help="a .safetensors file for a factory's network")
    add("--lenses", "--lens", metavar="NAMES", action="append", help="only these, with commas between them")
    add(
        "--sites",
        "--site",
        metavar="GLOB",
        action="append",
        default=[],
        help="places to look at (may be repeated; default: the network's blocks)",
    )
    add(
        "--classes",
        metavar="NAMES",
        help="names of the classes 0, 1, ..., with commas between them, or a text file with one a line",
    )
    add(
        "--groups",
        metavar="ARRAY",
        help="the array or column that names each sample's group, or a .npy or .txt file",
    )
    add("--inputs", metavar="ARRAY", help="the array or column with the inputs")
    add("--targets", metavar="ARRAY", help="the array or column with the targets")
    add("--split", metavar="NAME", help="of a Hugging Face data set (default: test, validation or train)")
    add("--image-size", metavar="H,W", help="bring images to this size")
    add(
        "--normalize",
        metavar="MEAN,STD",
        help="two numbers, or one mean for each channel and then one deviation for each",
    )
    add("--task", default="auto", metavar="KIND", help="classification, regression or auto (default)")
    add(
        "--method",
        default="norm_grad",
        metavar="NAME",
        help="saliency method of the gaze lens (default: norm_grad)",
    )
    add(
        "--gaze-site",
        metavar="SITE",
        help="where the saliency maps are taken (default: the last place that has a map)",
    )
    add(
        "--faithfulness",
        default="scores",
        metavar="HOW",
        help="how the maps are judged: scores (default), or diffroar, which also trains the architecture anew on what they keep",
    )
    add(
        "--samples",
        type=int,
        default=2000,
        metavar="N",
        help="look at no more samples than this (default: 2000)",
    )
    add("--batch-size", type=int, default=64, metavar="N", help="samples at a time (default: 64)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: where the model is)")
    add("--seed", type=int, default=0, metavar="N", help="of every random choice (default: 0)")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Audit, and say where the report is."""
    from lineament.audit.run import audit
    from lineament.console import note
    from lineament.report.text import printable

    found = audit(
        arguments.model,
        arguments.data,
        out=arguments.out,
        overwrite=arguments.overwrite,
        weights=arguments.weights,
        lenses=None if arguments.lenses is None else [n for text in arguments.lenses for n in _words(text)],
        sites=arguments.sites,
        classes=_classes(arguments.classes),
        groups=arguments.groups,
        inputs=arguments.inputs,
        targets=arguments.targets,
        split=arguments.split,
        image_size=_image_size(arguments.image_size),
        normalize=_normalize(arguments.normalize),
        task=arguments.task,
        method=arguments.method,
        gaze_site=arguments.gaze_site,
        faithfulness=arguments.faithfulness,
        samples=arguments.samples,
        batch_size=arguments.batch_size,
        device=arguments.device,
        seed=arguments.seed,
        note=note,
    )
    for finding in found.findings:
        print(f"{finding.severity:>8}  {printable(finding.sentence)}")
    for section in found.sections:
        if section.status in ("failed", "skipped"):
            print(f"{section.status:>8}  {section.name}: {printable(section.sentence)}")
    print(f"Report: {found.html.resolve()}")
    return 0


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _classes(text: str | None) -> list[str] | None:
    if text is None:
        return None
    path = Path(text)
    if path.suffix == ".txt":
        from lineament.core.checks import require

        require(path.is_file(), f"--classes: file {text!r} does not exist")
        return path.read_text(encoding="utf-8").splitlines()
    return text.split(",")


def _numbers(what: str, text: str) -> list[float]:
    from lineament.core.checks import InputError

    try:
        return [float(word) for word in _words(text)]
    except ValueError:
        raise InputError(f"{what}: got {text!r}, expected numbers with commas between them") from None


def _image_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    from lineament.core.checks import require

    sides = _numbers("--image-size", text)
    require(
        len(sides) in (1, 2) and all(s == int(s) and s > 0 for s in sides),
        f"--image-size: got {text!r}, expected HEIGHT,WIDTH in pixels",
    )
    return int(sides[0]), int(sides[-1])


def _normalize(text: str | None) -> tuple[list[float], list[float]] | None:
    if text is None:
        return None
    from lineament.core.checks import require

    values = _numbers("--normalize", text)
    require(
        len(values) >= 2 and len(values) % 2 == 0,
        f"--normalize: got {len(values)} numbers, expected one mean and one deviation for each channel",
    )
    half = len(values) // 2
    return values[:half], values[half:]
