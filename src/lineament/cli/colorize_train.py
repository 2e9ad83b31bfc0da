"""``lineament colorize --train FOLDER``: a network trained on films in colour, for one's own films or the published training again."""

from __future__ import annotations

import argparse
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lineament.cli.colorize_run import model_of
from lineament.cli.console import note
from lineament.cli.train_output import Log
from lineament.cli.train_run import _UNFINISHED, opened
from lineament.core.checks import InputError, require
from lineament.core.files import write_json
from lineament.core.models import usable
from lineament.load.colour_films import films_in, stored_frames
from lineament.load.weights import digest
from lineament.modules.colormnet.configuration import ColorMNetConfig
from lineament.modules.colormnet.network import ColorMNet
from lineament.modules.colormnet.training import ColorTraining, train_colorizer
from lineament.report.outcome import versions
from lineament.train.callbacks import Autocast

_HELD_OUT = 10  # one film of so many is for validation


def train(a: argparse.Namespace) -> int:
    """Train on the films of a folder, and say what the validation films came to."""
    out = Path(a.out)
    finished = out / "training.json"
    require(
        a.overwrite or not finished.exists(),
        f"--out: {a.out!r} holds a finished training; give --overwrite, or another name",
    )
    given = {
        name: getattr(a, name)
        for name in ("frames", "size", "epochs", "clips", "batch_size", "accumulate", "lr")
    }
    options = ColorTraining(**{k: v for k, v in given.items() if v is not None}, recompute=a.recompute)
    torch.manual_seed(a.seed)
    if a.weights:
        model = model_of(a, torch.float32)
    else:
        with usable(a.device):
            model = ColorMNet(ColorMNetConfig.tiny() if a.tiny else None).to(a.device)
    options.check(model.config)
    films = films_in(a.train)
    asked = {
        "films": [str(film.path) for film in films], **asdict(options), "seed": a.seed, "device": a.device, "precision": a.precision,
        "network at the start (sha256)": digest(model), **{k: versions()[k] for k in ("lineament", "torch")},
    }  # fmt: skip
    checkpoint = opened(out, asked, a.overwrite)
    # A crop takes at least a third of a picture, and the published films have 480 lines for a crop of 448.
    side = -(-options.size * 480 // 448)
    try:
        frames = [stored_frames(film, out / "frames" / f"{k:05d}.npy", side) for k, film in enumerate(films)]
    except InputError:
        # Without this film it is another training, which takes nothing from here.
        checkpoint.finish()
        shutil.rmtree(out / "frames", ignore_errors=True)
        (out / _UNFINISHED).unlink(missing_ok=True)
        with suppress(OSError):  # it holds something else
            out.rmdir()
        raise
    held = set(range(len(films) - 1, 0, -_HELD_OUT)) if len(films) > 1 else set()
    log = Log(out, note)
    found = train_colorizer(
        model, [x for k, x in enumerate(frames) if k not in held], options=options, seed=a.seed, checkpoint=checkpoint,
        callbacks=[_Logged(log), *[Autocast()] * (a.precision != "float32")], validation=[frames[k] for k in sorted(held)],
    )  # fmt: skip
    log.close()
    model.save_pretrained(out)
    history = [epoch.to_dict() for epoch in found.history]
    write_json(
        finished,
        {"asked": asked, "validation": [str(films[k].path) for k in sorted(held)], "history": history},
    )
    checkpoint.finish()
    (out / _UNFINISHED).unlink(missing_ok=True)
    for path in (out / "frames").iterdir():
        path.unlink()
    (out / "frames").rmdir()
    last = history[-1]
    scores = (
        f", PSNR {last['psnr_validation']:.2f} dB on {len(held)} film{'s' * (len(held) > 1)} held out"
        if held
        else ""
    )
    print(
        f"trained on {len(films) - len(held)} films: loss {last['loss']:.4f}{scores}: {out} (history: {log.place})"
    )
    return 0


class _Logged:
    """Each epoch in the log, as it ends."""

    def __init__(self, log: Log):
        self.log, self.rows = log, []

    def on_epoch_end(self, run: Any) -> None:
        self.rows = [*({"epoch": r.epoch, "loss": r.loss, **r.measured} for r in run.history)]
        self.rows.append({"epoch": run.epoch + 1, **{k: v for k, v in run.measured.items() if v is not None}})
        self.log(self.rows)
