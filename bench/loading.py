"""Images per second of the loader alone, streamed for training at 224 pixels, in turns with torchvision's ImageFolder.

Example: python bench/loading.py                              (500 photos of 500×375, made here)
         python bench/loading.py --size 4000 3000 --images 64 (12 megapixels)
         python bench/loading.py --data DIR --workers 0 2 --csv bench/cpu-loading.csv
"""

import csv
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts of this folder run from anywhere

from common.console import Parser, command, natural, positive
from inputs.folders import list_images
from inputs.image import Reader
from inputs.streaming import ImageFiles
from training.run import provenance

SIZE, BATCH, NORMALIZE = 224, 64, ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


def write_photos(folder, count, size):
    """JPEG files of random shapes at every scale, quality 92, in two classes."""
    rng, (width, height) = np.random.default_rng(0), size
    for i in range(count):
        image = np.zeros((height, width, 3), np.float32)
        for octave in range(3, 10):
            noise = Image.fromarray(rng.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8))
            image += np.asarray(noise.resize(size, Image.Resampling.BICUBIC), np.float32) / 2 ** (octave - 2)
        path = folder / f"class {i % 2}" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((255 * (image - image.min()) / np.ptp(image)).astype(np.uint8)).save(path, quality=92)


def ours(folder, workers):
    """A function that goes once through the images as train.py does."""
    paths = [path for paths in list_images(folder, Counter()).values() for path in paths]
    images = ImageFiles(paths, torch.zeros(len(paths), dtype=torch.int64), Reader(SIZE, workers=workers))
    batches = images.batches(BATCH, NORMALIZE, "mean")
    return lambda: sum(len(x) for x, *_ in batches.shuffled(1))


def torchvision(folder, workers):
    """The same with torchvision's ImageFolder and transforms, as its reference scripts use them."""
    from torchvision import datasets, transforms

    mean, std = ([value / 255 for value in values] for values in NORMALIZE)
    augment = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
    finish = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    images = datasets.ImageFolder(folder, transforms.Compose(augment + finish))
    loader = torch.utils.data.DataLoader(images, BATCH, shuffle=True, num_workers=workers)
    return lambda: sum(len(x) for x, _ in loader)


def measure(folder, workers, turns):
    """{candidate: images/s in each turn}."""
    candidates = {"ours": ours(folder, workers), "torchvision": torchvision(folder, workers)}
    found = {name: [] for name in candidates}
    for _ in range(turns):
        for name, run in candidates.items():
            start = time.perf_counter()
            count = run()
            found[name].append(count / (time.perf_counter() - start))
    return found


@command
def main(argv=None):
    parser = Parser(prog="loading.py", description=__doc__)
    parser.add_argument("--data", type=Path, metavar="DIR", help="class folders of images (default: made here)")
    parser.add_argument("--images", type=positive, default=500, metavar="N", help="to make (default: %(default)s)")
    parser.add_argument("--size", type=positive, nargs=2, default=(500, 375), metavar=("W", "H"),
        help="of those that are made (default: 500 375)")
    parser.add_argument("--workers", type=natural, nargs="+", default=[0, 2], metavar="N", help="(default: 0 2)")
    parser.add_argument("--turns", type=positive, default=5, metavar="N", help="of each (default: %(default)s)")
    parser.add_argument("--csv", metavar="FILE", help="add the rows there, too")
    args = parser.parse_args(argv)
    origin = provenance(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as made:
        if not args.data:
            write_photos(Path(made), args.images, args.size)
        rows = []
        for workers in args.workers:
            found = measure(args.data or Path(made), workers, args.turns)
            ratio = statistics.median(a / b for a, b in zip(found["ours"], found["torchvision"], strict=True))
            row = {"photos": args.data or "×".join(map(str, args.size)), "workers": workers}
            row |= {name: round(statistics.median(values), 1) for name, values in found.items()}
            rows.append(row | {"times_as_fast": round(ratio, 2), "device": origin["device"],
                               "torch": origin["versions"]["torch"], "commit": origin["commit"]})  # fmt: skip
            print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    if args.csv:
        new = not Path(args.csv).exists()
        with open(args.csv, "a", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
