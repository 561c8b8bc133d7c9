"""Fine-tuning against training from scratch, on five images per class: scikit-learn's digits 0–4 first, then 5–9.

Example: python bench/few_images.py data/digits --csv bench/few-images.csv    (folders and runs go into data/digits)

Each seed draws the images to train on anew; all other images of the same digits are the test images.
"""

import csv
import itertools
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts of this folder run from anywhere

from common.console import Parser, command, positive

TRAIN = [sys.executable, str(Path(__file__).resolve().parent.parent / "train.py")]
FLAGS = "--dataset folder --image-size 16 --depth 16 --no-augment --precision fp32 --no-plot --overwrite"
METHODS = ("", "--init-from FIRST", "--init-from FIRST --lr 0.01 --head-lr 0.1", "--init-from FIRST --freeze features")


def write_folders(root, seed):
    """root/0-4, with 140 training images of each digit, and root/5-9, with 5: 8×8 PNG files."""
    images, labels = load_digits(return_X_y=True)
    seen = [0] * 10
    for i in np.random.default_rng(seed).permutation(len(labels)):
        digit = labels[i]
        split = "train" if seen[digit] < (140 if digit < 5 else 5) else "test"
        seen[digit] += 1
        path = root / ("0-4" if digit < 5 else "5-9") / split / str(digit) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((images[i].reshape(8, 8) * (255 / 16)).round().astype(np.uint8)).save(path)


def train(data, save, *flags):
    """The test error (%) after the last epoch."""
    subprocess.run([*TRAIN, *FLAGS.split(), "--data", str(data), "--save", str(save), *map(str, flags)], check=True)
    with open(save / "test.csv", newline="") as file:
        return float(list(csv.DictReader(file))[-1]["error"])


def table(rows):
    """Markdown: test errors (%), mean ± standard deviation over the seeds, by flags and epochs."""
    epochs = list(dict.fromkeys(int(row["epochs"]) for row in rows))
    lines = [f"| flags | {' | '.join(f'{n} epochs' for n in epochs)} |", "|---" * (1 + len(epochs)) + "|"]
    for flags in dict.fromkeys(row["flags"] for row in rows):
        found = [[float(r["error"]) for r in rows if (r["flags"], int(r["epochs"])) == (flags, n)] for n in epochs]
        cells = [f"{statistics.mean(e):.1f} ± {statistics.stdev(e) if len(e) > 1 else 0:.1f}" for e in found]
        lines.append(f"| {f'`{flags}`' if flags else 'none: from scratch'} | {' | '.join(cells)} |")
    return "\n".join(lines)


@command
def main(argv=None):
    parser = Parser(prog="few_images.py", description=__doc__)
    parser.add_argument("root", type=Path, metavar="DIR", help="where to write images and runs")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, nargs="+", default=[5, 10, 30], metavar="N",
        help="of each comparison; the first network takes the most of them (default: 5 10 30)")  # fmt: skip
    parser.add_argument("--csv", type=Path, metavar="FILE", help="where to write the errors (default: nowhere)")
    args = parser.parse_args(argv)
    rows = []
    for seed in range(1, args.seeds + 1):
        root = args.root / f"seed{seed}"
        write_folders(root, seed)
        train(root / "0-4", root / "first", "--epochs", max(args.epochs), "--seed", seed)
        for flags, epochs in itertools.product(METHODS, args.epochs):
            more = [root / "first/latest.pth" if flag == "FIRST" else flag for flag in flags.split()]
            more += ["--batch-size", 5, "--epochs", epochs, "--seed", seed]
            error = train(root / "5-9", root / "second", *more)
            rows.append({"flags": flags, "epochs": epochs, "seed": seed, "error": error})
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    print(table(rows))


if __name__ == "__main__":
    sys.exit(main())
