"""What newer recipes bring: validation errors of the paper's, of each ingredient alone, and of --recipe modern.

Example: python bench/recipes.py --data data/cifar10-jpeg --epochs 20 --limit-train 20000
         python bench/recipes.py --data data/cifar10-jpeg --epochs 20 --only paper mixup -- --cuda-graph --block fused

Trains one run after another below --out. A run that is there is not repeated, one that was cut short goes on: the same
command again continues the measurement. Then prints a table of validation errors. All runs have the same images, epochs
and seeds; a difference is paired by seed. Errors on the test images are logged, as by every run, and not looked at.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts of this folder run from anywhere

from common.console import Mistake, Parser, command, natural, positive

ROOT, PAPER = Path(__file__).resolve().parent.parent, "paper"
RECIPES = {
    PAPER: "",
    "cosine": "--schedule cosine",
    "warmup": "--warmup 1",
    "label smoothing": "--label-smoothing 0.1",
    "cutout": "--cutout 16",
    "mixup": "--mixup 0.2",
    "ema": "--ema 0.999",
    "decay weights": "--decay weights",
    "accumulate": "--accumulate 2",
    "clip": "--clip-grad 1",
    "class weights": "--class-weights balanced",
    "adamw": "--opt adamw --schedule cosine",
    "modern": "--recipe modern --warmup 1",
}


def parse_args(argv=None):
    parser = Parser(prog="recipes.py", description=__doc__)
    add = parser.add_argument
    add("--data", default="data/cifar10-jpeg", metavar="DIR", help="a folder of images (default: %(default)s)")
    add("--out", type=Path, default=ROOT / "work/recipes", metavar="DIR", help="of the runs (default: work/recipes)")
    add("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME",
        help=f"some of {', '.join(RECIPES)} (default: all)")  # fmt: skip
    add("--seeds", nargs="+", type=natural, default=[1, 2, 3], metavar="N", help="(default: 1 2 3)")
    add("--depth", type=positive, default=22, metavar="L", help="of the DenseNet-BC (default: %(default)s)")
    add("--epochs", type=positive, default=20, metavar="N", help="(default: %(default)s)")
    add("--valid-size", type=positive, default=5000, metavar="N", help="images to hold out (default: %(default)s)")
    add("--limit-train", type=positive, metavar="N", help="train on the first N images (default: all)")
    add("--image-size", type=positive, default=32, metavar="N", help="pixels (default: %(default)s)")
    add("--threads", type=positive, default=1, metavar="N", help="of a run (default: %(default)s)")
    add("flags", nargs="*", metavar="-- FLAG", help="flags of train.py, for every run")
    return parser.parse_args(argv)


def directory(args, name, seed):
    return args.out / f"{name.replace(' ', '-')}.{seed}"


def log(path, name):
    """A log of a run, None where there is none."""
    return pd.read_csv(path / f"{name}.csv") if (path / f"{name}.csv").exists() else None


def run(args, name, seed):
    """Train until the run is finished. Raises Mistake where it ends early."""
    path = directory(args, name, seed)
    valid = log(path, "valid")
    if valid is not None and len(valid) == args.epochs:
        return
    names = ("data", "depth", "epochs", "valid_size", "limit_train", "image_size")
    options = {name: getattr(args, name) for name in names} | {"seed": seed, "save": path}
    given = {name.replace("_", "-"): str(value) for name, value in options.items() if value is not None}
    flags = [text for name, value in given.items() for text in (f"--{name}", value)]
    state = ["--resume"] if (path / "latest.pth").exists() else []
    flags += [*RECIPES[name].split(), *args.flags, *state, "--no-plot"]
    call = [sys.executable, ROOT / "train.py", "--dataset", "folder", *flags]
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    if status := subprocess.run(call, env=env, stdout=sys.stderr).returncode:
        raise Mistake(f"{path} ended with status {status}: the same command goes on where it stopped")


def results(args, name):
    """Final validation errors (seeds,), of the averaged weights where there are some, and median images per second."""
    paths = [directory(args, name, seed) for seed in args.seeds]
    logs = [(log(path, "valid") if (averaged := log(path, "valid-ema")) is None else averaged) for path in paths]
    speeds = pd.concat([log(path, "train").images_per_second for path in paths])
    return np.array([each.error.iloc[-1] for each in logs]), speeds.median()


def row(name, errors, paper, speed):
    """Mean and standard deviation over the seeds, and the difference to the paper's recipe with its 95 % interval."""
    several, cells = len(errors) > 1, [name, f"`{RECIPES[name]}`" if RECIPES[name] else "–"]
    spread = f" ± {errors.std(ddof=1):.2f}" if several else ""
    cells += [f"{errors.mean():.2f}{spread}", "–", f"{speed:.0f}"]
    if paper is not None and name != PAPER:
        low, high = scipy.stats.ttest_rel(errors, paper).confidence_interval(0.95) if several else (None, None)
        interval = f" ({low:+.2f} … {high:+.2f})" if several else ""
        cells[3] = f"{(errors - paper).mean():+.2f}{interval}".replace("-", "−")
    return f"| {' | '.join(cells)} |"


@command
def main(argv=None):
    args = parse_args(argv)
    for seed in args.seeds:  # all recipes of a seed, before the next seed
        for name in args.only:
            run(args, name, seed)
    found = {name: results(args, name) for name in args.only}
    paper = found[PAPER][0] if PAPER in found else None
    print("| recipe | flags | validation error (%) | difference to the paper's, 95 % interval | images/s |")
    print("|---|---|---|---|---|")
    print(*(row(name, errors, paper, speed) for name, (errors, speed) in found.items()), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
