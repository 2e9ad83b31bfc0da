"""The subcommand ``lineament audit``; imports no torch before it runs."""

from __future__ import annotations

import argparse
import os
from typing import Any

from lineament.audit.catalogue import all_lenses
from lineament.cli.data_options import add_data_options, add_engine, add_sample_options

_EPILOG = (
    "lenses:\n"
    + "\n".join(f"  {lens.name:<10} {lens.help}" for lens in all_lenses().values())
    + """

examples:
  lineament audit --out report
  lineament audit net.py:make data.npz --weights net.safetensors --groups site --out report
  lineament audit ./resnet-saved ./photos --out report --samples 500 --lenses accuracy,gaze
  lineament audit ./bert-classifier reviews.csv --out report
  lineament audit ./gpt2-saved pairs.jsonl --out report
  lineament audit ./gpt2-saved prompts.txt --text book.txt --lenses attention --out report

A run that was cut off goes on where it stopped when the same command is given again."""
)


def add_parser(subparsers: Any) -> Any:
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
        help="package.module:factory, file.py:factory, a torch.export .pt2, a TorchScript or .onnx file, or a Hugging Face directory or name of a classifier of images, texts or words, or of a "
        "masked, causal or encoder-decoder language model",
    )
    add(
        "data",
        nargs="?",
        metavar="DATA",
        help=".npz, .npy, .pt, .csv, .jsonl, .parquet, a folder of images, of MNIST or CIFAR, a Hugging Face data set, file.py:function, or digits; for a text classifier a table "
        "with a column of texts; for a token classifier one with words and their tags, or a CoNLL file; for a masked language model a .txt of texts; for a language model a .txt of prompts, a .jsonl of "
        "prompts or prompt pairs (clean, corrupt, answer, wrong), or ioi",
    )
    add(
        "--out",
        metavar="DIR",
        default="lineament-report",
        help="the folder for the report (default: lineament-report)",
    )
    add("--overwrite", action="store_true", help="replace a finished report in that folder")
    add(
        "--weights",
        metavar="FILE",
        help="a checkpoint for a factory's network: .safetensors, .pt, .pth, .ckpt, .bin, or an index of shards",
    )
    add("--lenses", "--lens", metavar="NAMES", action="append", help="only these, with commas between them")
    add(
        "--sites",
        "--site",
        metavar="GLOB",
        action="append",
        default=[],
        help="places to look at (may be repeated; default: the network's blocks)",
    )
    add_data_options(parser, split="test, validation or train")
    add_sample_options(
        parser,
        samples=2000,
        tasks="classification, multi-label, regression, dense, embedding",
        models="model is",
    )
    add(
        "--output",
        metavar="NAME",
        help="which of several outputs of the network to look at, by name or number (default: logits)",
    )
    add(
        "--embedding",
        metavar="SITE",
        help="take the network for an embedding, which passes there (of a network whose outputs are the embedding: --task embedding)",
    )
    add(
        "--filler",
        metavar="MODEL",
        help="a masked language model, whose words stand in for those of a text that are replaced",
    )
    add(
        "--layout",
        metavar="KIND=GLOB",
        action="append",
        help="where the components of a language model of no known family are (may be repeated): blocks, z, attn_out, mlp_out ..., such as z=model.layers.*.attention:z",
    )
    add(
        "--text",
        metavar="FILE",
        help="a long text for a language model: how much of its past it needs (the attention lens; without it, prompts that are long enough)",
    )
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
    add_engine(parser, "retrainings (--faithfulness diffroar) and the points of the loss's plane")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Audit, and say where the report is; 1 where lenses failed and none has an answer."""
    from lineament.audit.run import AuditOptions, audit
    from lineament.cli.console import note
    from lineament.cli.data_options import data_options
    from lineament.cli.option_values import classes, pairs, words
    from lineament.core.engines import engine
    from lineament.report.text import printable

    options = AuditOptions(
        weights=arguments.weights,
        sites=arguments.sites,
        **data_options(arguments),
        method=arguments.method,
        gaze_site=arguments.gaze_site,
        faithfulness=arguments.faithfulness,
        output=arguments.output,
        filler=arguments.filler,
        layout=pairs("--layout", arguments.layout),
        text=arguments.text,
        embedding=arguments.embedding,
    )
    with engine(arguments.engine):
        found = audit(
            arguments.model,
            arguments.data,
            out=arguments.out,
            overwrite=arguments.overwrite,
            lenses=None if arguments.lenses is None else [n for t in arguments.lenses for n in words(t)],
            classes=classes(arguments.classes),
            groups=arguments.groups,
            samples=arguments.samples,
            device=arguments.device,
            seed=arguments.seed,
            note=note,
            options=options,
        )
    if os.environ.get("RANK", "0") != "0":  # the first of several processes says it
        return _status(found)
    for finding in found.findings:
        print(f"{finding.severity:>8}  {printable(finding.sentence)}")
    for section in found.sections:
        if section.status in ("failed", "skipped"):
            print(f"{section.status:>8}  {section.name}: {printable(section.sentence)}")
    print(f"Report: {found.html.resolve()}")
    return _status(found)


def _status(found: Any) -> int:
    statuses = {section.status for section in found.sections}
    return 1 if "failed" in statuses and statuses <= {"failed", "skipped"} else 0
