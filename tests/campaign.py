"""Harm small runs at random, resume them, and compare what they become with the run that nobody harmed.

Example: python tests/campaign.py --count 50 --seed 1

Needs fork, so not Windows. A run has survived if weights, optimiser and logs are equal bit for bit at its end.
"""

import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with several threads cannot fork

from conftest import TINY, assert_same_run  # noqa: E402

import train  # noqa: E402
from common.console import Parser, positive  # noqa: E402
from inputs import datasets  # noqa: E402

FLAGS = [*TINY, "--block", "naive", "--valid-size", "100", "--no-plot", "--no-progress", "--save"]
RESUME = ("--resume", "if-any")


def child(run, *flags, before=lambda: None):
    """The exit status of a process that calls ``before``, then trains in ``run``; negative if a signal ended it."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with open("output.txt", "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    before()
    os._exit(train.main([*FLAGS, run, *flags]))


def at_operation(number, action):
    """Call ``action`` just before the process opens, renames or deletes a file of a run for the n-th time."""
    left = [number]

    def hook(event, args):
        if event in ("open", "os.rename", "os.remove") and "run" in Path(str(args[0])).parts:
            left[0] -= 1
            if left[0] == 0:
                action()

    sys.addaudithook(hook)


def is_whole():
    """True if the run, resumed, ends like the one that nobody harmed."""
    if child("run", *RESUME) != 0:
        return False
    try:
        assert_same_run("whole", "run", ("train.csv", "valid.csv", "test.csv"))
        assert_same_run("whole", "run", (), name="best.pth")
    except AssertionError:
        return False
    return True


# The harms. Each returns True if the run survived, None if nothing happened to it.


def moments(dice, seconds):
    """Killed at random moments, up to five times in a row."""
    timers = [partial(signal.setitimer, signal.ITIMER_REAL, dice.uniform(1e-3, seconds)) for _ in range(dice.randint(1, 5))]
    killed = [child("run", *RESUME, before=timer) < 0 for timer in timers]  # SIGALRM ends a process as SIGKILL does
    return is_whole() if any(killed) else None


def killed_at(number, *flags):
    """True if a process was killed just before its n-th operation on a file."""
    return child("run", *flags, before=partial(at_operation, number, partial(signal.raise_signal, signal.SIGKILL))) < 0


def operations(dice, seconds):
    """SIGKILL just before a random operation on a file, up to five times in a row."""
    killed = [killed_at(dice.randint(1, 60), *RESUME) for _ in range(dice.randint(1, 5))]
    return is_whole() if any(killed) else None


def replacements(dice, seconds):
    """SIGKILL while --overwrite replaces a finished run: afterwards the old run is whole, or the new one goes on."""
    shutil.copytree("other", "run")
    if not killed_at(dice.randint(1, 30), "--overwrite"):
        return None
    old = (path for path in Path("other").iterdir() if path.suffix in (".pth", ".json", ".csv"))
    same = (Path("run", path.name).exists() and Path("run", path.name).read_bytes() == path.read_bytes() for path in old)
    return all(same) or is_whole()


def bits(dice, seconds):
    """One bit of latest.pth is flipped, after a SIGKILL."""
    path = Path("run/latest.pth")
    if not killed_at(dice.randint(60, 120)) or not path.exists() or not path.with_name("previous.pth").exists():
        return None
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)
    return is_whole()


def full(dice, seconds):
    """No file may grow beyond a random size, from a random operation on, as if the disk were full."""
    size = dice.randint(0, Path("whole/latest.pth").stat().st_size)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    status = child("run", before=partial(at_operation, dice.randint(1, 60), limit))
    return status == 1 and is_whole() if status else None


def main(argv=None):
    parser = Parser(prog="campaign.py", description=__doc__)
    parser.add_argument("--count", type=positive, default=50, help="runs for each harm (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="(default: random, and printed)")
    args = parser.parse_args(argv)
    failures = 0
    datasets.load("digits", None)  # imports what each process would have to
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        begin = time.monotonic()
        assert child("whole") == child("other", "--seed", "2") == 0
        seconds = (time.monotonic() - begin) / 2
        for harm in (moments, operations, replacements, bits, full):
            outcomes, name = [], harm.__name__
            for i in range(args.count):
                shutil.rmtree("run", ignore_errors=True)
                Path("output.txt").unlink(missing_ok=True)
                outcomes.append(harm(random.Random(f"{args.seed} {name} {i}"), seconds))
                text = Path("output.txt").read_text()
                if outcomes[-1] is False or "Traceback" in text:
                    failures += 1
                    print(f"{name} {i} of seed {args.seed} failed:\n{text[-300:]}")
            harmed = [outcome for outcome in outcomes if outcome is not None]
            print(f"{name}: {len(harmed)} of {args.count} runs harmed, {sum(harmed)} survived (seed {args.seed})", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
