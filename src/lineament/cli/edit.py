"""The subcommand ``lineament edit``: a network with fewer channels, or without a class; imports no torch before it runs."""

from __future__ import annotations

import argparse
from typing import Any

_PRUNE = """  lineament edit prune net.py:make digits --weights net.safetensors --out smaller --keep 0.7
  lineament edit prune ./llama-saved text.txt --out smaller --params 1.3"""
_UNLEARN = """  lineament edit unlearn net.py:make ./photos --weights net.safetensors --class cat --out without-cats"""
_AGAIN = "A pruning that was cut off goes on where it stopped when the same command is given again."


def add_parser(subparsers: Any) -> Any:
    """Add ``edit`` to the commands of :mod:`lineament.cli`."""
    parser = subparsers.add_parser(
        "edit",
        help="take channels or a class out of a network, and see what it costs",
        description="Writes the edited network, edit.html and edit.json.",
        epilog=f"examples:\n{_PRUNE}\n{_UNLEARN}\n\n{_AGAIN}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for add, run in ((_prune_parser, prune), (_unlearn_parser, unlearn)):
        one = add(actions)
        one.add_argument("--debug", action="store_true", help="show the traceback of an error")
        one.set_defaults(run=run)
        parser.names.update(one.names)
    return parser


def _shared(parser: Any, data: str) -> None:
    from lineament.cli.data_options import add_data_options

    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="package.module:factory, file.py:factory, or a Hugging Face directory or name",
    )
    add("data", metavar="DATA", help=data)
    add("--out", metavar="DIR", required=True, help="the folder for the page and the network")
    add("--overwrite", action="store_true", help="replace a finished edit in that folder")
    add("--weights", metavar="FILE", help="a checkpoint for the network that a factory makes")
    add_data_options(parser, split="test, validation or train")
    add("--samples", type=int, default=2000, metavar="N", help="read no more than so many (default: 2000)")
    add("--device", metavar="NAME", help="cpu, cuda, mps (default: where the model is)")
    add("--seed", type=int, default=0, metavar="N", help="of every random choice (default: 0)")


def _prune_parser(actions: Any) -> Any:
    parser = actions.add_parser(
        "prune",
        help="a smaller network with the same call",
        description="Takes channels out of a network, repairs what reads them on half of the samples, and measures what it costs on the other half.",
        epilog=f"examples:\n{_PRUNE}\n\n{_AGAIN}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _shared(parser, "as for audit; for a language model a text file")
    add = parser.add_argument
    add(
        "--length",
        type=int,
        default=128,
        metavar="N",
        help="positions of a sequence of a text (default: 128)",
    )
    add("--keep", type=float, metavar="SHARE", help="of the channels of every group (default: 0.7)")
    add("--params", type=float, metavar="TIMES", help="so many times fewer parameters")
    add("--flops", type=float, metavar="TIMES", help="so many times fewer operations")
    add("--latency", type=float, metavar="TIMES", help="so many times faster, as measured here")
    add("--remove", type=float, metavar="SHARE", help="the paper's rule: what each output gives up in a pass")
    add(
        "--widths",
        choices=("one", "free"),
        help="of a language model: one width for all layers, which from_pretrained opens (default), or free ones, which lineament.edit.load opens",
    )
    return parser


def _unlearn_parser(actions: Any) -> Any:
    parser = actions.add_parser(
        "unlearn",
        help="a network that no longer answers a class",
        description="Changes the weights that give most to the answers on one class, and says how much of the class and of the others is left.",
        epilog=f"example:\n{_UNLEARN}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _shared(parser, "as for audit")
    add = parser.add_argument
    add("--class", dest="label", metavar="NAME", required=True, help="the class, by its name or number")
    add(
        "--retain",
        metavar="DATA2",
        help="measure the other classes on these samples (default: on those of DATA)",
    )
    add(
        "--share",
        type=float,
        metavar="SHARE",
        help="of the weights' pairs in each layer (default: the smallest with which the class is answered in a tenth of its samples, or by chance)",
    )
    return parser


def _options(arguments: argparse.Namespace) -> Any:
    from lineament.audit.edited import EditOptions
    from lineament.cli.option_values import classes, image_size, normalize

    return EditOptions(
        weights=arguments.weights,
        samples=arguments.samples,
        length=getattr(arguments, "length", 128),
        share=getattr(arguments, "share", None),
        widths=getattr(arguments, "widths", None),
        seed=arguments.seed,
        device=arguments.device,
        classes=classes(arguments.classes),
        inputs=arguments.inputs,
        targets=arguments.targets,
        split=arguments.split,
        image_size=image_size(arguments.image_size),
        normalize=normalize(arguments.normalize),
    )


def prune(arguments: argparse.Namespace) -> int:
    """Prune, and say where the page is."""
    from lineament.audit.edited import pruned_report
    from lineament.cli.console import note

    target = {name: getattr(arguments, name) for name in ("keep", "params", "flops", "latency", "remove")}
    if all(value is None for value in target.values()):
        target["keep"] = 0.7
    found = pruned_report(
        arguments.model, arguments.data, out=arguments.out, overwrite=arguments.overwrite, options=_options(arguments),
        note=note, **target,
    )  # fmt: skip
    return _said(found)


def unlearn(arguments: argparse.Namespace) -> int:
    """Take the class out, and say where the page is."""
    from lineament.audit.edited import unlearned_report
    from lineament.cli.console import note

    found = unlearned_report(
        arguments.model, arguments.data, arguments.label, out=arguments.out, retain=arguments.retain, overwrite=arguments.overwrite,
        options=_options(arguments), note=note,
    )  # fmt: skip
    return _said(found)


def _said(found: Any) -> int:
    from lineament.report.text import printable

    for finding in found.findings:
        print(f"{finding.severity:>8}  {printable(finding.sentence)}")
        if finding.advice:
            print(f"{'':>8}  {printable(finding.advice)}")
    print(f"Page: {found.html.resolve()}")
    return 0
