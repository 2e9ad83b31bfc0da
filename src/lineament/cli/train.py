"""The subcommand ``lineament train``: train a classifier on a user's data or a language model on a text, and compare trainings; imports no torch before it runs."""

from __future__ import annotations

import argparse
from typing import Any

from lineament.cli.data_options import add_data_options
from lineament.cli.loss_options import NAMES, add_loss_options

_EPILOG = """examples:
  lineament train net.py:make photos --image-size 64,64 --out runs/plain
  lineament train net.py:make data.npz --out runs/sam --sam 0.1 --useful auto --epochs 100
  lineament train net.py:make faces --loss arcface --margin 0.3 --scale 32 --out runs/faces
  lineament train net.py:make clicks.csv --targets clicked --multiplex 0.25 --out runs/small
  lineament train net.py:make photos --loss simclr --views flip,crop,jitter --out runs/simclr
  accelerate launch --num_processes 2 -m lineament train net.py:make data.npz --out runs/two
  lineament train ./llama-saved text.txt --ssa --block-size 64 --blocks 8 --length 4096 --out runs/sparse
  lineament train --compare runs

A run that was cut off goes on after its last whole epoch when the same command is given again. All of the data is held in memory."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add ``train`` to the commands of :mod:`lineament.cli`."""
    parser = subparsers.add_parser(
        "train",
        help="train a classifier or an embedding, or a language model on a text, with the optimizers and methods here, for the audit to open",
        description="Trains a network on labelled data, or with --ssa a language model on a text. Writes model.safetensors, train.json, a learning curve and a log.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help="package.module:factory or file.py:factory; with --ssa the folder of a language model",
    )
    add(
        "data",
        nargs="?",
        metavar="DATA",
        help=".npz, .npy, .pt, .csv, .parquet, a folder of images, of MNIST or CIFAR, a Hugging Face data set, file.py:function, or digits",
    )
    add("--out", metavar="DIR", help="the run's folder")
    add("--overwrite", action="store_true", help="replace an earlier run in that folder")
    add("--compare", metavar="RUNS", nargs="+", help="print a table of the runs in these folders instead")
    add("--optimizer", metavar="NAME", default="sgd", help="sgd (default), adam, adamw or diffgrad")
    add(
        "--lr",
        metavar="RATE",
        type=float,
        help="at the start (default: 0.05 for sgd, 0.001 for the others, 1e-5 with --ssa)",
    )
    add("--momentum", metavar="M", type=float, help="of sgd (default: 0.9)")
    add("--weight-decay", metavar="W", type=float, help="(default: 0.01 for adamw, 0 for the others)")
    add("--epochs", metavar="N", type=int, help="(default: 20; with --ssa 1)")
    add("--batch-size", metavar="N", type=int, help="of all processes together (default: 64; with --ssa 8)")
    add("--schedule", metavar="NAME", default="cosine", help="cosine (default), step or none")
    add("--seed", metavar="N", type=int, default=0, help="of everything random (default: 0)")
    add(
        "--sam",
        metavar="RHO",
        type=float,
        help="sharpness-aware minimisation around the optimizer; .05 to .2",
    )
    add("--asam", metavar="RHO", type=float, help="its scale-invariant form; .5 to 2")
    add(
        "--useful",
        metavar="EPOCH",
        nargs="?",
        const="auto",
        help="show the examples learned late twice: found after this epoch, or auto (default when given alone)",
    )
    add("--tract", metavar="LAMBDA", type=float, help="train the first layer's outputs (TrAct); 0.1")
    add(
        "--multiplex",
        metavar="SHARE",
        type=float,
        help="put one shared table of this share of their numbers in place of the network's embeddings; 0.25",
    )
    add(
        "--validation",
        metavar="SHARE",
        type=float,
        help="of each class that is held out (default: 0.1; 0: none)",
    )
    add(
        "--on-nan",
        metavar="HOW",
        default="raise",
        help="a loss or gradient that is NaN or infinite: raise (default), or skip the step",
    )
    add(
        "--ssa",
        action="store_true",
        help="go on training a language model on a text file with full and sparse attention aligned, so that it runs with either",
    )
    add("--block-size", metavar="N", type=int, default=16, help="tokens of a block, with --ssa (default: 16)")
    add(
        "--blocks",
        metavar="K",
        type=int,
        default=16,
        help="blocks that a token reads, with --ssa (default: 16)",
    )
    add(
        "--length",
        metavar="N",
        type=int,
        help="tokens of a sequence, with --ssa (default: 512, or what the model takes)",
    )
    add("--weights", metavar="FILE", help="start from this checkpoint (.safetensors, .pt, .pth, .ckpt, .bin)")
    add_loss_options(parser)
    add_data_options(parser, split="train")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: what Accelerate chooses)")
    parser.names["nonfinite"] = "--on-nan"
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Train, and say where the weights are and how to audit them; or compare."""
    from lineament.core.checks import require

    a = arguments
    if a.compare is not None:
        from lineament.cli.console import note, show_trainings
        from lineament.cli.train_run import runs_in

        require(
            a.model is None and a.data is None and a.out is None,
            "--compare: it trains nothing; leave MODEL, DATA and --out out",
        )
        show_trainings(runs_in(a.compare, note))
        return 0
    require(a.model is not None, "MODEL: got none, expected file.py:factory or package.module:factory")
    require(
        a.data is not None,
        "DATA: got none, expected an .npz file, a folder of images by class, a Hugging Face data set or 'digits'",
    )
    require(a.out is not None, "--out: got none, expected the folder for this run")

    if a.ssa:
        from lineament.cli.train_ssa import train as train_language_model

        return train_language_model(a)
    for name, usual in (("block_size", 16), ("blocks", 16), ("length", None)):
        given = getattr(a, name)
        require(
            given == usual,
            f"{name}: got {given}, which only --ssa uses; leave it out, or add --ssa for a language model",
        )
    from lineament.cli.train_options import Options
    from lineament.cli.train_run import train

    a.epochs, a.batch_size = (
        (20 if a.epochs is None else a.epochs),
        (64 if a.batch_size is None else a.batch_size),
    )
    names = ("optimizer", "lr", "momentum", "weight_decay", "epochs", "batch_size", "schedule", "seed")
    names += ("sam", "asam", "tract", "on_nan", "multiplex")
    embedding = _embedding(a)
    require(
        embedding is None or a.validation is None,
        f"--validation: {a.loss} holds out classes, expected --validation-classes",
    )
    options = Options(
        **{name: getattr(a, name) for name in names},
        validation=0.1 if a.validation is None else a.validation,
        useful=_useful(a.useful),
        embedding=embedding,
    )
    return train(arguments, options)


def _useful(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() else text


def _embedding(a: argparse.Namespace) -> Any:
    """The options of a loss for embeddings; ``None`` for cross-entropy, which takes none of them."""
    from lineament.cli.embedding_options import EmbeddingOptions
    from lineament.cli.loss_options import LOSSES
    from lineament.cli.option_values import numbers, words
    from lineament.core.checks import one_of, require

    given = {name: getattr(a, name) for name in NAMES if getattr(a, name) is not None}
    one_of("loss", a.loss, ("cross-entropy", *LOSSES))
    if a.loss == "cross-entropy":
        first = next(iter(given), "")
        require(
            not given,
            f"{first}: it is for embeddings, and cross-entropy takes none; choose a --loss, such as arcface",
        )
        return None
    for name, read in (("margin", lambda text: numbers("--margin", text)), ("ft", words), ("views", words)):
        if name in given:
            given[name] = tuple(read(given[name]))
    return EmbeddingOptions(a.loss, **given)
