"""The subcommand ``lineament leak``; imports no torch before it runs."""

from __future__ import annotations

import argparse
from typing import Any

_EPILOG = """examples:
  lineament leak net.py:make photos.npz --weights net.safetensors --out leaked
  lineament leak net.py:make faces.npz --groups person --local epochs=1,rate=0.01,batch_size=4 --batch-size 4 --minutes 10 --out leaked
  lineament leak net.py:make mine.npz --update after.npz --before global.npz --public others.npz --local rate=0.01 --out leaked
  lineament leak net.py:make photos.npz --defence none --defence clip=4,noise=0.01 --defence prune=90 --batch-size 1,4 --out leaked

It makes the messages of your own pictures and searches those; it does not open anybody else's. Defences: none, clip=BOUND, noise=DEVIATION,
prune=PERCENT, soteria=PERCENT, private=BOUND:NOISE (per sample), gaussian=EPSILON:DELTA:BOUND, truncate=PERCENT:GAMMA, bits=8, secagg=CLIENTS (only
their mean is seen); commas put one after another.
A saved update is safetensors, a .pt of tensors, or an .npz of arrays in the order of the state dict (as Flower's clients send them); the pictures behind it are needed.
A run that was cut off goes on where it stopped when the same command is given again."""


def add_parser(subparsers: Any) -> Any:
    """Add ``leak`` to the commands of :mod:`lineament.cli`."""
    from lineament.cli.data_options import add_data_options

    parser = subparsers.add_parser(
        "leak",
        help="what could a curious server see of your pictures in one update?",
        description="Makes the update that a client would send from your own pictures, searches it, and shows what was found beside what could be had "
        "without it. Writes leak.html and leak.json.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="package.module:factory, file.py:factory, or a Hugging Face directory or name",
    )
    add("data", metavar="DATA", help="labelled images, as for audit")
    add(
        "--out",
        metavar="DIR",
        default="lineament-leak",
        help="the folder for the page (default: lineament-leak)",
    )
    add("--overwrite", action="store_true", help="replace a finished audit in that folder")
    add("--weights", metavar="FILE", help="a checkpoint for the network that MODEL makes")
    add_data_options(parser, split="test, validation or train")
    add(
        "--defence",
        metavar="KIND=VALUE",
        action="append",
        help="what is done to a message (may be repeated; default: none, and clip=4,noise=0.01)",
    )
    add(
        "--public",
        metavar="DATA2",
        help="what the attacker has beside the message, with labels (default: the samples of DATA not audited)",
    )
    add(
        "--groups",
        metavar="ARRAY",
        help="names each sample's group (the person): none audited is known to the attacker, and guesses are looked for among other pictures of it",
    )
    add(
        "--local",
        metavar="NAME=VALUE,...",
        help="clients send the change of their weights after epochs=1,rate=0.01,batch_size=8,optimizer=sgd|adam,momentum=0,weight_decay=0,order=given|known|unknown (default: they send a gradient)",
    )
    add(
        "--batch-norm",
        metavar="MODE",
        default="running",
        help="running, or batch: clients train in training mode, and send the buffers along (default: running)",
    )
    add("--update", metavar="AFTER", help="audit this saved update; DATA are then the pictures behind it")
    add("--before", metavar="FILE", help="the weights that the update started from (default: the model's)")
    add(
        "--attack",
        metavar="NAME",
        action="append",
        help="gifd, no ball, no regulariser, one layer, latent, gias, ggl, ig, gi, idlg, dlg or closed form (may be repeated; default: gifd, latent, ig, without a prior ig and gi, and the closed form where it applies)",
    )
    add("--batch-size", metavar="N,N", default="1", help="pictures behind one message (default: 1)")
    add("--pictures", type=int, default=8, metavar="N", help="how many are audited (default: 8)")
    add(
        "--samples",
        type=int,
        default=1000,
        metavar="N",
        help="read no more samples than this (default: 1000)",
    )
    add(
        "--prior",
        metavar="KIND",
        default="vae",
        help="vae, dcgan or stylegan2, trained on the attacker's pictures; FILE with a StyleGAN2 or BigGAN-deep (safetensors, or .pt of tensors); or none (default: vae)",
    )
    add(
        "--classifier",
        metavar="FACTORY",
        help="of a generator FILE with classes other than the model's: package.module:factory of a network that tells them, pictures in [0, 1] to logits",
    )
    add("--steps", type=int, metavar="N", help="gradients of each layer searched (default: 60)")
    add(
        "--optimizer",
        metavar="NAME",
        default="adam",
        help="of the searches: adam, sgd or lbfgs (default: adam)",
    )
    add(
        "--minutes",
        type=float,
        metavar="M",
        help="take about so many minutes in all, in place of --steps: as many steps as fit, and what does not fit is left out and named",
    )
    add("--restarts", type=int, default=1, metavar="N", help="of each search (default: 1)")
    add("--known-labels", action="store_true", help="give the attacker the labels")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: where the model is)")
    add("--seed", type=int, default=0, metavar="N", help="of every random choice (default: 0)")
    parser.names |= {
        "attacks": "--attack",
        "batch_sizes": "--batch-size",
        "defences": "--defence",
        "defence": "--defence",
        "batch_norm": "--batch-norm",
        "after": "--update",
        "prior": "--prior",
    }
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Audit the messages, and say where the page is."""
    from lineament.audit.leak import LeakOptions, leak
    from lineament.cli.console import note
    from lineament.cli.option_values import classes, image_size, normalize
    from lineament.core.checks import InputError
    from lineament.privacy.local import local_of
    from lineament.privacy.search import Search
    from lineament.report.text import printable

    try:
        sizes = [int(word) for word in arguments.batch_size.split(",")]
    except ValueError:
        raise InputError(
            f"--batch-size: got {arguments.batch_size!r}, expected whole numbers with commas between them"
        ) from None
    if arguments.steps is not None and arguments.minutes is not None:
        raise InputError("--steps: --minutes says how many; give one of the two")
    options = LeakOptions(
        weights=arguments.weights,
        inputs=arguments.inputs,
        targets=arguments.targets,
        classes=classes(arguments.classes),
        split=arguments.split,
        image_size=image_size(arguments.image_size),
        normalize=normalize(arguments.normalize),
        attacks=tuple(arguments.attack or ()),
        prior=arguments.prior,
        classifier=arguments.classifier,
        search=Search(
            steps=60 if arguments.steps is None else arguments.steps,
            restarts=arguments.restarts,
            optimizer=arguments.optimizer,
        ),
        known_labels=arguments.known_labels,
        public=arguments.public,
        groups=arguments.groups,
        local=None if arguments.local is None else local_of(arguments.local),
        batch_norm=arguments.batch_norm,
        update=arguments.update,
        before=arguments.before,
        minutes=arguments.minutes,
    )
    found = leak(
        arguments.model,
        arguments.data,
        out=arguments.out,
        defences=arguments.defence or (("none",) if arguments.update else ("none", "clip=4,noise=0.01")),
        pictures=arguments.pictures,
        batch_sizes=sizes,
        samples=arguments.samples,
        device=arguments.device,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
        note=note,
        options=options,
    )
    for finding in found.findings:
        print(f"{finding.severity:>8}  {printable(finding.sentence)}")
    print(f"Page: {found.html.resolve()}")
    return 0
