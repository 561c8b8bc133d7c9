"""Fine-tuning against training from scratch, on few images: scikit-learn's digits 0–4 first, then the digits 5–9.

Example: python bench/finetune.py data/digits    (writes folders of images, trains by train.py's commands; minutes)

Each seed draws five images of each of the digits 5–9 to train on, and tests on all others of them.
"""

import csv
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts of this folder run from anywhere

from cli import Parser, command, positive

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
FLAGS = "--dataset folder --image-size 16 --depth 16 --no-augment --precision fp32 --no-plot --overwrite"
PER_CLASS = 5
METHODS = ("", "--init-from FIRST", "--init-from FIRST --lr 0.01 --head-lr 0.1", "--init-from FIRST --freeze features")


def write_folders(root, seed):
    """root/0-4 and root/5-9, each with train and test, as 8×8 PNG files."""
    images, labels = load_digits(return_X_y=True)
    order, seen = np.random.default_rng(seed).permutation(len(labels)), [0] * 10
    for i in order:
        label, limit = labels[i], PER_CLASS if labels[i] > 4 else 140
        split = "train" if seen[label] < limit else "test"
        seen[label] += 1
        path = root / ("5-9" if label > 4 else "0-4") / split / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((images[i].reshape(8, 8) * (255 / 16)).round().astype(np.uint8)).save(path)


def train(data, save, seed, epochs, *flags):
    """The test error (%) after the last epoch."""
    where = ["--data", str(data), "--save", str(save), "--seed", str(seed), "--epochs", str(epochs)]
    subprocess.run([sys.executable, str(TRAIN), *FLAGS.split(), *where, *flags], check=True)
    with open(save / "test.csv", newline="") as file:
        return float(list(csv.DictReader(file))[-1]["error"])


@command
def main(argv=None):
    parser = Parser(prog="finetune.py", description=__doc__)
    parser.add_argument("root", type=Path, metavar="DIR", help="where to write images and runs")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=20, metavar="N", help="of each run (default: %(default)s)")
    args = parser.parse_args(argv)
    errors = {method: [] for method in METHODS}
    for seed in range(1, args.seeds + 1):
        root = args.root / f"seed{seed}"
        write_folders(root, seed)
        train(root / "0-4", root / "first", seed, args.epochs)
        first = str(root / "first/latest.pth")
        for i, method in enumerate(METHODS):
            flags = [first if flag == "FIRST" else flag for flag in ("--batch-size", "5", *method.split())]
            errors[method].append(train(root / "5-9", root / f"run{i}", seed, args.epochs, *flags))
    print("| flags | test error (%), mean ± standard deviation | by seed |\n|---|---|---|")
    for method, values in errors.items():
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        name = f"`{method}`" if method else "none: from scratch"
        print(f"| {name} | {statistics.mean(values):.1f}{spread} | {', '.join(f'{value:.1f}' for value in values)} |")


if __name__ == "__main__":
    sys.exit(main())
