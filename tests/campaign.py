"""Harm small runs at random, let them go on, and compare what they become with the run that nobody harmed.

Example: python tests/campaign.py --count 50 --seed 1

Needs fork, so not Windows. A run counts as survived where weights, optimiser and logs are equal bit for bit at its end.
"""

import functools
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with several threads cannot fork

from conftest import TINY, assert_same_run  # noqa: E402

import train  # noqa: E402
from common.console import Parser, positive  # noqa: E402
from inputs import datasets  # noqa: E402

FLAGS = [*TINY, "--block", "naive", "--valid-size", "100", "--no-plot", "--no-progress", "--save"]
kills = Counter()  # by whether a process was killed


def start(run, *flags, before=lambda: None):
    """Fork a process that trains in the directory ``run`` after it has called ``before``. Returns its id."""
    process = os.fork()
    if process:
        return process
    with open("output.txt", "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    before()
    os._exit(train.main([*FLAGS, run, *flags]))


def status_of(process):
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    kills.update([status == -signal.SIGKILL])
    return status


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
    """Whether the run ends like the one that nobody harmed."""
    if status_of(start("run", "--resume", "if-any")) != 0:
        return False
    try:
        assert_same_run("whole", "run", ("train.csv", "valid.csv", "test.csv"))
        assert_same_run("whole", "run", (), name="best.pth")
    except AssertionError:
        return False
    return True


# The kinds of harm. Each returns whether the run survived, None where there was nothing to survive.


def moments(dice, seconds):
    """SIGKILL at random moments, up to five times in a row."""
    killed = 0
    for _ in range(dice.randint(1, 5)):
        process = start("run", "--resume", "if-any")
        time.sleep(dice.uniform(0, seconds))
        os.kill(process, signal.SIGKILL)
        killed += status_of(process) == -signal.SIGKILL
    return is_whole() if killed else None


def killed_at(dice, first, last, *flags):
    """True if a process was killed just before one of its operations on files, drawn at random."""
    before = functools.partial(at_operation, dice.randint(first, last), lambda: os.kill(os.getpid(), signal.SIGKILL))
    return status_of(start("run", *flags, before=before)) == -signal.SIGKILL


def operations(dice, seconds):
    """SIGKILL just before a random operation on a file, up to five times in a row."""
    killed = [killed_at(dice, 1, 60, "--resume", "if-any") for _ in range(dice.randint(1, 5))]
    return is_whole() if any(killed) else None


def replacements(dice, seconds):
    """SIGKILL while --overwrite replaces a finished run: afterwards the old run is whole, or the new one goes on."""
    shutil.copytree("other", "run")
    if not killed_at(dice, 1, 30, "--overwrite"):
        return None
    old = (path for path in Path("other").iterdir() if path.suffix in (".pth", ".json", ".csv"))
    same = (Path("run", path.name).exists() and Path("run", path.name).read_bytes() == path.read_bytes() for path in old)
    return all(same) or is_whole()


def bits(dice, seconds):
    """One bit of latest.pth is flipped, after a SIGKILL."""
    path = Path("run/latest.pth")
    if not killed_at(dice, 60, 120) or not path.exists() or not path.with_name("previous.pth").exists():
        return None
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)
    return is_whole()


def full(dice, seconds):
    """No file may grow beyond a random size, from a random operation on, as if the disk were full."""
    size = dice.randint(0, Path("whole/latest.pth").stat().st_size)
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    status = status_of(start("run", before=functools.partial(at_operation, dice.randint(1, 60), limit)))
    return status == 1 and is_whole() if status else None


KINDS = {kind.__name__: kind for kind in (moments, operations, replacements, bits, full)}


def main(argv=None):
    parser = Parser(prog="campaign.py", description=__doc__)
    parser.add_argument("--count", type=positive, default=50, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="(default: random, and printed)")
    parser.add_argument("--only", choices=KINDS, help="one kind (default: all)")
    args = parser.parse_args(argv)
    failures = 0
    datasets.load("digits", None)  # imports what each process would have to
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        begin = time.monotonic()
        assert status_of(start("whole")) == 0 and status_of(start("other", "--seed", "2")) == 0
        seconds = (time.monotonic() - begin) / 2
        for name in [args.only] if args.only else KINDS:
            outcomes = []
            kills.clear()
            for i in range(args.count):
                shutil.rmtree("run", ignore_errors=True)
                Path("output.txt").unlink(missing_ok=True)
                outcomes.append(KINDS[name](random.Random(f"{args.seed} {name} {i}"), seconds))
                text = Path("output.txt").read_text()
                if outcomes[-1] is False or "Traceback" in text:
                    failures += 1
                    print(f"{name} {i} of seed {args.seed} failed:\n{text[-300:]}")
            harmed = [outcome for outcome in outcomes if outcome is not None]
            print(f"{name}: {len(harmed)} of {args.count} runs harmed, {sum(harmed)} survived ({kills[True]} kills, seed {args.seed})", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
