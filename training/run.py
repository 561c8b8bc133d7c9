"""What a run writes into its directory: config.json, CSV logs, checkpoints, figures. It survives a kill at any moment.

After each epoch, first the checkpoint is replaced by renaming; it holds every row of every log, and the one before it
is kept, too. Then the CSV files are written anew. A resumed run makes them agree with the checkpoint.
"""

import contextlib
import csv
import io
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock, Timeout

from common.checkpoints import Lost, read_checkpoint, write_checkpoint
from common.config import read_config
from common.console import Mistake
from common.files import written_whole
from common.hardware import device_name

ROOT = Path(__file__).parent.parent
COLUMNS = {
    "train": ("epoch", "loss", "error", "lr", "images_per_second", "peak_memory_mib"),
    "valid": ("epoch", "loss", "error"),
    "test": ("epoch", "loss", "error"),
    "valid-ema": ("epoch", "loss", "error"),  # of the averaged weights
    "test-ema": ("epoch", "loss", "error"),
}
FIGURES = ("loss.png", "error.png", "loss-error.png")
WEIGHTS = tuple(f"weights.{suffix}" for suffix in ("pth", "onnx", "safetensors", "pt2"))
CHECKPOINTS = ("latest.pth", "previous.pth")  # a run resumes from the first of them that is whole
KEPT = [f"epoch-{'[0-9]' * digits}.pth" for digits in (4, 5, 6, 7)]  # by --keep-every
FILES = (*CHECKPOINTS, "best.pth", *WEIGHTS, "config.json", *(f"{name}.csv" for name in COLUMNS), *FIGURES, *KEPT)


class Run:
    """A run directory; as a context manager, it releases its lock at the end.

    ``rows`` maps "train", "valid", "test", … to the rows (dicts) logged so far, the "metrics" of a checkpoint.
    ``epoch`` is the last finished epoch, None before this process has written anything. ``stopped_early`` is True if
    --patience has ended the run.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.rows, self.epoch, self.stopped_early, self.events = {}, None, False, None
        self._lock = FileLock(self.path / ".lock")  # flock: the kernel releases it when the process dies

    def check(self, resume, overwrite):
        """Raise Mistake unless a run may start, or be resumed, here. Writes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise Mistake(f"{self.path} is a file: choose another directory with --save")
        if resume and not self.can_go_on():
            found = "only weights.pth" if (self.path / "weights.pth").exists() else "no latest.pth"
            raise Mistake(f"{self.path} has {found} to resume: leave out --resume, or name the run with --save")
        existing = [path.name for name in FILES for path in self.path.glob(name)]
        if existing and not self._is_ours():
            raise Mistake(f"{self.path} holds files of another program ({existing[0]}): choose another --save")
        if existing and not (resume or overwrite):
            ways = "--resume continues it, --overwrite replaces it, --save DIR starts another"
            raise Mistake(f"{self.path} holds a run ({existing[0]}): {ways}")

    def can_go_on(self):
        """True if there is a checkpoint to resume."""
        return any((self.path / name).exists() for name in CHECKPOINTS)

    def latest(self):
        """The newest whole checkpoint, and its path. Raises Mistake if there is none."""
        try:
            return read_checkpoint(self.path / "latest.pth"), self.path / "latest.pth"
        except Lost:
            if not (self.path / "previous.pth").exists():
                raise
            return read_checkpoint(self.path / "previous.pth"), self.path / "previous.pth"

    def _is_ours(self):
        """True if train.py has written here: other programs have a config.json or latest.pth, too."""
        for read in (lambda: read_config(self.path), self.latest):
            with contextlib.suppress(Mistake):
                if read():
                    return True
        return False

    def lock(self):
        """Create the directory and keep other processes out of it until this one ends."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise Mistake(f"{self.path} is in use by another process: wait, or choose another --save") from error
        self._held = os.stat(self.path / ".lock")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._lock.release()

    def start(self, checkpoint):
        """Make the directory agree with ``checkpoint``, from which training goes on.

        A new run replaces an earlier one as soon as latest.pth is written. Other files of the earlier run are deleted
        after that, now or when the new run is resumed.
        """
        self.rows, self.epoch = checkpoint["metrics"], checkpoint["epoch"]
        for name in FILES:
            for unfinished in self.path.glob(f"{name}*.tmp"):  # of a killed process
                unfinished.unlink(missing_ok=True)
        self._write(checkpoint)

    def finish_epoch(self, checkpoint, new_rows):
        """Save the state after an epoch, then write the logs with its rows."""
        self.rows = {name: [*rows, *new_rows.get(name, ())] for name, rows in self.rows.items()}
        self._write(checkpoint, previous=self.path / "previous.pth")

    def _write(self, checkpoint, previous=None):
        """Write latest.pth, then the rest; a resumed run repeats what a kill in between has prevented."""
        lock = self.path / ".lock"
        if lock.exists() and not os.path.samestat(self._held, os.stat(lock)):
            self.epoch = None
            raise Mistake(f"{self.path} was deleted, and begun anew by another process: this run has ended")
        config = checkpoint["config"]
        arguments, valid = config["arguments"], [row["error"] for row in self.rows.get("valid", ())]
        waited = len(valid) - 1 - valid.index(min(valid)) if valid else 0  # epochs since the best
        self.stopped_early = 0 < arguments["patience"] <= waited and checkpoint["epoch"] < arguments["epochs"]
        config = config | {"stopped_early": self.stopped_early}
        checkpoint = checkpoint | {"metrics": self.rows, "config": config}
        write_checkpoint(self.path / "latest.pth", checkpoint, previous)
        self.epoch = checkpoint["epoch"]
        for stale in [path for name in FILES[1:] for path in self.path.glob(name)] if self.epoch == 0 else ():
            stale.unlink(missing_ok=True)
        if valid and waited == 0:
            write_checkpoint(self.path / "best.pth", checkpoint)
        if self.epoch and arguments["keep_every"] and self.epoch % arguments["keep_every"] == 0:
            write_checkpoint(self.path / f"epoch-{self.epoch:04}.pth", checkpoint)
        write(self.path / "config.json", json.dumps(config, indent=2) + "\n")
        for name, rows in self.rows.items():
            text = io.StringIO()
            log = csv.DictWriter(text, COLUMNS[name], lineterminator="\n")
            log.writeheader()
            log.writerows(rows)
            write(self.path / f"{name}.csv", text.getvalue())
        if arguments["tensorboard"]:
            self._write_events()

    def _write_events(self):
        """Write the rows of whole epochs for TensorBoard: at first all, which hide those of earlier processes."""
        from torch.utils.tensorboard import SummaryWriter

        first = self.events is None
        if first:
            self.events = SummaryWriter(self.path / "tensorboard", purge_step=0)
        for name, rows in self.rows.items():
            for row in rows if first else rows[-1:]:
                for column in COLUMNS[name][1:] if isinstance(row["epoch"], int) else ():
                    self.events.add_scalar(f"{column}/{name}", row[column], row["epoch"])
        self.events.flush()

    def best(self, name):
        """The first row with the lowest error in a log."""
        return min(self.rows[name], key=lambda row: row["error"])


def write(path, text):
    with written_whole(path) as file:
        file.write(text.encode())


class Figures:
    """Runs ``plot.py`` on a run directory while training goes on, one process at a time, at the lowest priority.

    As a context manager: leaving it without an exception draws the last state and waits until that is on disk.
    """

    EVERY = 60  # seconds

    def __init__(self, path, enabled=True):
        self.enabled, self.process, self.reported = enabled, None, False
        self.due = 0.0  # by time.monotonic()
        self.command = [sys.executable, str(ROOT / "plot.py"), "--", str(path)]

    def redraw(self):
        """Start drawing, unless the last drawing is not finished or was begun within ``EVERY`` seconds."""
        if not self.enabled or time.monotonic() < self.due or (self.process and self.process.poll() is None):
            return
        self.finish()
        self.due = time.monotonic() + self.EVERY
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        try:
            self.process = subprocess.Popen(self.command, **streams, text=True)
        except OSError as error:
            self.report(error)
            return
        with contextlib.suppress(OSError, AttributeError):  # forbidden, or missing on this system
            os.setpriority(os.PRIO_PROCESS, self.process.pid, 19)

    def finish(self):
        """Wait for the drawing that was begun last, if any."""
        if self.process:
            try:
                errors = self.process.communicate(timeout=600)[1].strip().splitlines()
            except subprocess.TimeoutExpired:
                self.process.kill()
                errors = [*self.process.communicate()[1].splitlines(), "it took longer than ten minutes"]
            if self.process.returncode:
                self.report(errors[-1] if errors else f"exit status {self.process.returncode}")
            self.process = None

    def report(self, reason):
        if not self.reported:
            print(f"plot.py failed, training goes on: {reason}", file=sys.stderr)
        self.reported = True

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.finish()  # which may miss the last rows
            self.due = 0.0
            self.redraw()
            self.finish()
        elif self.process:
            self.process.kill()


def provenance(device, launcher="python"):
    """What the numbers of a run depend on beside its arguments: command, commit, versions, hardware.

    ``launcher`` is the beginning of the command: python, or torchrun and its options.
    """
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # not a clone, or no git
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    command = f"{launcher} {shlex.join(sys.argv)}"
    return {"command": command, "commit": commit, "versions": versions(), "device": device_name(device)}


def versions():
    """Of Python, and of the installed packages on which numbers and speed depend."""
    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "triton", "numba", "numpy", "pillow"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
