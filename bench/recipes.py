"""What newer recipes bring: validation errors of the paper's, of each ingredient alone, and of --recipe modern.

Example: python bench/recipes.py --data data/cifar10-jpeg --epochs 20 -- --limit-train 20000
         python bench/recipes.py --data data/cifar10-jpeg --epochs 20 --only mixup -- --cuda-graph --block fused

Trains one run after another below --out. A run that is there is not repeated, one that was cut short goes on: the same
command again continues the measurement. Then prints a table of validation errors. All runs have the same images, epochs
and seeds; a difference is paired by seed. The network is DenseNet-BC-22, 5,000 images are held out; flags of train.py
after -- say otherwise. Errors on the test images are logged, as by every run, and not looked at.
"""

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
    add("--epochs", type=positive, default=20, metavar="N", help="(default: %(default)s)")
    add("flags", nargs="*", metavar="-- FLAG", help="flags of train.py, for every run")
    return parser.parse_args(argv)


def directory(args, name, seed):
    return args.out / f"{name.replace(' ', '-')}.{seed}"


def train(args, name, seed):
    """Train until the run is finished. Raises Mistake if it ends early."""
    path = directory(args, name, seed)
    if (path / "valid.csv").exists() and len(pd.read_csv(path / "valid.csv")) == args.epochs:
        return
    flags = ["--dataset", "folder", "--data", args.data, "--depth", "22", "--valid-size", "5000", "--no-plot"]
    flags += ["--epochs", str(args.epochs), "--seed", str(seed), *RECIPES[name].split(), *args.flags]
    flags += ["--save", str(path), "--resume", "if-any"]
    if status := subprocess.run([sys.executable, ROOT / "train.py", *flags], stdout=sys.stderr).returncode:
        raise Mistake(f"{path} ended with status {status}: the same command goes on where it stopped")


def results(args, name):
    """Final validation errors (seeds,), of the averaged weights if there are some, and median images per second."""
    errors, speeds = [], []
    for path in (directory(args, name, seed) for seed in args.seeds):
        valid = path / "valid-ema.csv"
        errors.append(pd.read_csv(valid if valid.exists() else path / "valid.csv").error.iloc[-1])
        speeds.append(pd.read_csv(path / "train.csv").images_per_second)
    return np.array(errors), pd.concat(speeds).median()


def row(name, errors, paper, speed):
    """Mean and standard deviation over the seeds, and the difference to the paper's recipe with its 95 % interval."""
    several, difference, flags = len(errors) > 1, "–", "–"
    spread = f" ± {errors.std(ddof=1):.2f}" if several else ""
    if name != PAPER:
        low, high = scipy.stats.ttest_rel(errors, paper).confidence_interval(0.95) if several else (None, None)
        interval = f" ({low:+.2f} … {high:+.2f})" if several else ""
        difference, flags = f"{(errors - paper).mean():+.2f}{interval}".replace("-", "−"), f"`{RECIPES[name]}`"
    return f"| {name} | {flags} | {errors.mean():.2f}{spread} | {difference} | {speed:.0f} |"


@command
def main(argv=None):
    args = parse_args(argv)
    names = list(dict.fromkeys([PAPER, *args.only]))  # what the others are compared with
    for seed in args.seeds:  # all recipes of a seed, before the next seed
        for name in names:
            train(args, name, seed)
    paper, _ = results(args, PAPER)
    print("| recipe | flags | validation error (%) | difference to the paper's, 95 % interval | images/s |")
    print("|---|---|---|---|---|")
    for name in names:
        errors, speed = results(args, name)
        print(row(name, errors, paper, speed))


if __name__ == "__main__":
    sys.exit(main())
