"""Long runs that may be killed at any moment and, started again, give the result of an uninterrupted run.

A :class:`Checkpoint` is a folder that belongs to one configuration. Each finished stage, and now and then the state of a long
loop, is a safetensors file for the tensors and a JSON file that names it. Both writes are atomic; the JSON file comes last and
holds the SHA-256 of both, so that what was cut off or edited is computed again, not trusted.
What a stage returns is always what was read back, so a fresh and a resumed run go on from the same bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import copy
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lineament import __version__
from lineament.core.checks import InputError, number, require, show
from lineament.core.files import atomic_write, output_folder, write_json, write_text
from lineament.core.serialization import pack, unpack

T = TypeVar("T")

_MARKER = "checkpoint.json"
_LOCK = "checkpoint.lock"
_locks: dict[tuple[int, str], int] = {}


class Checkpoint:
    """The finished stages of a run, in a folder that knows which configuration it belongs to.

    Args:
        folder: made if it is not there. Stages of another configuration found there are discarded with a warning, or refused where ``discard`` is false.
        key: everything that decides the result: the run's configuration, of plain values. The versions of Lineament and PyTorch
            count too.

    Raises:
        InputError: the folder cannot be written, holds other things than a checkpoint, or is in use by another process.

    >>> import tempfile; folder = Path(tempfile.mkdtemp()) / "stages"
    >>> Checkpoint(folder, {"seed": 0}).stage("train", lambda: {"loss": 0.5, "weights": torch.ones(2)})["loss"]
    0.5
    >>> Checkpoint(folder, {"seed": 0}).stage("train", lambda: 1 / 0)["weights"]
    tensor([1., 1.])
    """

    _part = ""

    def __init__(self, folder: str | Path, key: Mapping[str, Any], *, discard: bool = True):
        self.folder = output_folder(folder)
        self._key = _digest(_canonical({**key, "": [__version__, torch.__version__]}).encode())
        self._lock()
        found = _read_json(self.folder / _MARKER)
        self.resumed = isinstance(found, dict) and found.get("key") == self._key
        if not self.resumed:
            foreign = [path.name for path in self.folder.iterdir() if not _ours(path)]
            require(
                not foreign,
                f"checkpoint: {str(self.folder)!r} holds {show(sorted(foreign)[:1])[1:-1]}, which is no part of a "
                "checkpoint; choose an empty folder",
            )
            if self._files():
                require(
                    discard,
                    f"{str(self.folder)!r} holds a run of other options or another version that was cut off; give those again to go on, "
                    "pass overwrite=True to throw it away, or choose another folder",
                )
                warnings.warn(
                    f"the checkpoint in {str(self.folder)!r} belongs to another configuration or version; "
                    "it is discarded and the run starts from the beginning",
                    stacklevel=2,
                )
                self._clear()

    def within(self, part: str) -> Checkpoint:
        """The same checkpoint for a part of the run, whose stages and loops are others than those of the same names elsewhere.

        >>> import tempfile; run = Checkpoint(Path(tempfile.mkdtemp()) / "stages", {})
        >>> [run.within(part).stage("train", lambda: part) for part in ("a", "b", "a")]
        ['a', 'b', 'a']
        """
        found = copy(self)
        found._part = f"{self._part}{part} / "
        return found

    def stage(self, name: str, compute: Callable[[], T], kind: type[T] | None = None) -> T:
        """The stored result of this stage if an earlier run finished it, else ``compute()``, stored.

        Args:
            name: the same for the same stage in every run, and another for each stage.
            compute: returns tensors, NumPy arrays, numbers, strings, bytes, paths, booleans, ``None``, and dicts, lists, tuples and
                dataclasses of them, and draws its randomness from seeds of its own. Tensors come back on their device, detached
                and contiguous.
            kind: the type of the result, needed where dataclasses or enums are in it, since nothing in a file may choose a class:
                ``Result``, ``list[Result]``, ``dict[str, Result]``. Those in a dataclass's fields are found by their annotations.
                A stored result whose fields are no longer those of ``kind`` is computed again.

        Raises:
            InputError: ``compute`` returned something else.

        >>> import tempfile; from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Result:
        ...     loss: float
        >>> run = Checkpoint(Path(tempfile.mkdtemp()) / "stages", {})
        >>> run.stage("train", lambda: [Result(0.5)], list[Result])
        [Result(loss=0.5)]
        """
        name = self._part + name
        stored = self._load(name, kind)
        if stored is None:
            self._save(name, compute(), kind)
            stored = self._load(name, kind)
            require(stored is not None, f"checkpoint: {name!r} cannot be read back from {str(self.folder)!r}")
        assert stored is not None
        return stored[0]

    def finished(self, name: str, kind: Any = None) -> bool:
        """Whether a stage is stored, whole; ``kind`` as for :meth:`stage`."""
        return self._load(self._part + name, kind) is not None

    def loop(
        self,
        name: str,
        steps: int,
        state: Mapping[str, Any],
        *,
        every: int | None = None,
        seconds: float = 20.0,
        kinds: Mapping[str, Any] | None = None,
    ) -> Iterator[int]:
        """The steps ``0 ... steps - 1`` of a long loop, without those that a killed run stored as done.

        Before the first step that is left, every object of ``state`` gets back what it held after the last one stored.
        The rest of the loop then does what it would have done: whatever a step reads, changes and leaves to the next
        (a model, an optimizer, a generator, a list of losses) belongs in ``state``, or follows from the step's number.

        Args:
            name: the loop's, as for :meth:`stage`.
            state: objects with ``state_dict`` and ``load_state_dict`` (modules, optimizers, schedulers), PyTorch or NumPy
                generators, tensors, lists and dicts.
            every: store after so many steps; ``None``: after so many ``seconds``.
            kinds: the types of lists and dicts in ``state`` that hold dataclasses, such as ``{"history": list[Epoch]}``.

        >>> import tempfile; run = Checkpoint(Path(tempfile.mkdtemp()) / "stages", {})
        >>> generator, seen = torch.Generator().manual_seed(0), []
        >>> for step in run.loop("walk", 5, {"generator": generator, "seen": seen}, every=1):
        ...     seen.append(torch.randint(9, (), generator=generator).item())
        ...     if step == 2: break  # killed here, say: the step in which it happens is not done
        >>> whole = list(seen)
        >>> for step in run.loop("walk", 5, {"generator": generator, "seen": seen}, every=1):
        ...     seen.append(torch.randint(9, (), generator=generator).item())
        >>> seen[:3] == whole, len(seen)
        (True, 5)
        """
        number("steps", steps, low=0, integer=True)
        if every is not None:
            number("every", every, low=1, integer=True)
        for key, holder in state.items():
            _held(key, holder)
        name = f"loop {self._part}{name}"  # no stage may be taken for a loop
        kind: Any = dict[str, dict[str, reduce(or_, kinds.values())]] if kinds else None
        stored = self._load(name, kind)
        done = 0
        if stored is not None:
            done = stored[0]["done"]
            for key, holder in state.items():
                _restore(holder, stored[0]["state"][key])
        last = time.monotonic()
        for step in range(done, steps):
            yield step
            due = time.monotonic() - last >= seconds if every is None else (step + 1) % every == 0
            if due or step + 1 == steps:
                held = {key: _held(key, holder) for key, holder in state.items()}
                self._save(name, {"done": step + 1, "state": held}, kind)
                last = time.monotonic()

    def finish(self) -> None:
        """Remove what was stored, and the folder if nothing else is in it: the run's result is written elsewhere."""
        self._clear()
        with suppress(FileNotFoundError):
            (self.folder / _LOCK).unlink()
        handle = _locks.pop((os.getpid(), str(self.folder.resolve())), None)
        if handle is not None:
            os.close(handle)
        with suppress(OSError):
            self.folder.rmdir()

    def _save(self, name: str, result: Any, kind: Any) -> None:
        tensors: dict[str, Tensor] = {}
        structure = pack(name, result, tensors, kind)
        self._lock()
        if not self.resumed:
            write_json(self.folder / _MARKER, {"key": self._key})
            self.resumed = True
        index = self._index(name)
        content = save(tensors)
        digest = _digest(content)
        # The content names the file: what an older index names stays until the new index is there.
        data = self.folder / f"{index.stem}-{digest[:16]}.safetensors"
        with atomic_write(data) as temporary:
            temporary.write_bytes(content)
        body = {"name": name, "tensors": data.name, "sha256": digest, "structure": structure}
        # ASCII, because text may hold what UTF-8 has no bytes for.
        write_text(index, json.dumps({**body, "own_sha256": _digest(_canonical(body).encode())}))
        for other in self.folder.glob(f"{index.stem}-*.safetensors"):
            if other != data:
                other.unlink()

    def _load(self, name: str, kind: Any) -> tuple[Any] | None:
        """What is stored under a name, in a tuple; ``None`` where nothing is, or not every bit of it."""
        if not self.resumed:
            return None
        index = _read_json(self._index(name))
        if not isinstance(index, dict):
            return None
        try:
            own = index.pop("own_sha256")
            if own != _digest(_canonical(index).encode()) or index["name"] != name:
                return None
            data = (self.folder / Path(index["tensors"]).name).read_bytes()
            if _digest(data) != index["sha256"]:
                return None
            return (unpack(index["structure"], load(data), kind),)
        except (OSError, KeyError, TypeError, ValueError, AttributeError, SafetensorError):
            return None

    def _index(self, name: str) -> Path:
        safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in name)[:40]
        return self.folder / f"stage-{safe}-{_digest(name.encode('utf-8', 'surrogatepass'))[:12]}.json"

    def _files(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if _ours(path) and path.name != _LOCK]

    def _clear(self) -> None:
        self.resumed = False
        if self.folder.is_dir():
            # The marker first: what is cut off here does not look like a checkpoint afterwards.
            for path in sorted(self._files(), key=lambda path: path.name != _MARKER):
                with suppress(FileNotFoundError):
                    path.unlink()

    def _lock(self) -> None:
        """Hold the folder for this process; the system lets go of it when the process ends, however it ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if (os.getpid(), str(self.folder.resolve())) in _locks:
            return
        try:
            import fcntl
        except ImportError:  # no POSIX locks: two runs at once only do each other's work again
            return
        path = self.folder / _LOCK
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                os.close(handle)
                raise InputError(
                    f"checkpoint: another process is running in {str(self.folder)!r}; wait for it or choose another folder"
                ) from error
            except OSError:  # a file system without locks
                os.close(handle)
                return
            with suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(handle).st_ino:
                    break
            os.close(handle)  # removed by a run that finished in between
        _locks[os.getpid(), str(self.folder.resolve())] = handle


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _canonical(value: Any) -> str:
    def plain(other: Any) -> Any:
        if isinstance(other, (Path, torch.dtype, torch.device)):
            return str(other)
        if isinstance(other, np.generic):
            return other.item()
        # Anything else might be written with its address, so that no later run would know it again.
        raise InputError(
            f"checkpoint: the key holds {show(other)} ({type(other).__name__}), expected plain values"
        )

    return json.dumps(value, sort_keys=True, default=plain)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _ours(path: Path) -> bool:
    name = path.name.removeprefix(".")  # what was being written when a run was killed has a dot before
    known = name.startswith("stage-") and path.suffix in {".json", ".safetensors"}
    return (
        known or name in {_MARKER, _LOCK} or (path.name.startswith(".checkpoint-") and path.suffix == ".json")
    )


def _held(key: str, holder: Any) -> Any:
    """What an object holds now, in a form that can be stored."""
    if hasattr(holder, "state_dict") and hasattr(holder, "load_state_dict"):
        return holder.state_dict()
    if isinstance(holder, torch.Generator):
        return holder.get_state()
    if hasattr(holder, "bit_generator"):
        return holder.bit_generator.state
    if isinstance(holder, (Tensor, list, dict)):
        return holder
    raise InputError(
        f"state {key!r}: got {show(holder)} ({type(holder).__name__}), expected an object with state_dict, a generator, "
        "a tensor, a list or a dict"
    )


def _restore(holder: Any, held: Any) -> None:
    if hasattr(holder, "load_state_dict"):
        holder.load_state_dict(held)
    elif isinstance(holder, torch.Generator):
        holder.set_state(held)
    elif hasattr(holder, "bit_generator"):
        holder.bit_generator.state = held
    elif isinstance(holder, Tensor):
        with torch.no_grad():
            holder.copy_(held)
    elif isinstance(holder, list):
        holder[:] = held
    else:
        holder.clear()
        holder.update(held)
