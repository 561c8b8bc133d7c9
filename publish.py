"""Make finished runs fit to publish: their weights alone, and a row for each in a table.

Example: python publish.py work/digits.base

Evaluates latest.pth once more, refuses it where test.csv says another error, and writes the network without the
optimiser to weights.pth: small, and all that evaluate.py needs. Then prints a table of the runs in Markdown. Of a run
that has no latest.pth, as in a clone, weights.pth stays as it is.
"""

import argparse
import datetime
import json
import os
import sys
from pathlib import Path

import pandas as pd
import torch

import data
from evaluate import choose_device, choose_precision, load_model, load_test_images, predict, set_up_device, wilson
from workdir import RunError, read_checkpoint, write_checkpoint

COLUMNS = ("run", "command", "hardware", "wall time", "images/s", "final error (%)", "best on test", "commit")
KEPT = ("model", "config", "normalize", "classes", "epoch", "seconds")
SAMPLE = 500  # test images whose errors are counted in weights.pth, so that a quick check can count them again


def publish(directory, device, folder=None):
    """Write weights.pth of the finished run in ``directory`` (a Path). Raises RunError where it is not finished.

    ``folder`` says where the data set lives, if not where it was in training.
    """
    checkpoint = read_checkpoint(directory / "latest.pth")
    epochs = checkpoint["config"]["arguments"]["epochs"]
    if checkpoint["epoch"] < epochs:
        raise RunError(f"{directory} has finished {checkpoint['epoch']} of {epochs} epochs: --resume it first")
    wrong = mistakes(checkpoint, load_test_images(checkpoint, folder), device)
    error, logged = 100 * wrong.float().mean().item(), checkpoint["metrics"]["test"][-1]["error"]
    if abs(error - logged) > 0.1:  # other hardware may decide an image or two in ten thousand otherwise
        raise RunError(f"{directory}: latest.pth gives a test error of {error:.2f} %, but {logged:.2f} % was logged")
    sample = {"images": len(wrong[:SAMPLE]), "wrong": int(wrong[:SAMPLE].sum())}
    write_checkpoint(directory / "weights.pth", {name: checkpoint[name] for name in KEPT} | {"sample": sample})


def mistakes(checkpoint, images, device):
    """Which of the images the network takes for another class: (images,) bool, in the precision it was trained in."""
    amp, _ = choose_precision(checkpoint["config"]["precision"], device)
    model = load_model(checkpoint).to(device, memory_format=torch.channels_last)
    batches = images.to(device).batches(checkpoint["config"]["arguments"]["batch_size"], checkpoint["normalize"])
    return torch.cat([(logits.argmax(1) != labels).cpu() for logits, labels in predict(model, batches, amp)])


def table_row(directory):
    """The cells of COLUMNS of a published run, from its config.json, logs and weights.pth, as Markdown."""
    weights = read_checkpoint(directory / "weights.pth")
    name = Path(os.path.relpath(directory, Path(__file__).with_name("work"))).as_posix()  # from work/README.md
    try:
        config = json.loads((directory / "config.json").read_text())
        train, test = (pd.read_csv(directory / f"{name}.csv") for name in ("train", "test"))
        final, best = test.iloc[-1], test.loc[test.error.idxmin()]
        low, high = (100 * bound for bound in wilson(final.error / 100, config["images"]["test"]))
        return (
            f"[{name}]({name})",
            f"`{config['command']}`",
            f"{config['device']}, {config['precision']}",
            str(datetime.timedelta(seconds=round(weights["seconds"]))),
            f"{train.images_per_second.median():.0f}",
            f"{final.error:.2f} ({low:.2f} … {high:.2f})",
            f"{best.error:.2f} (epoch {best.epoch:.0f})",
            f"`{config['commit'][:7]}`",
        )
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{directory} is not a published run ({type(error).__name__}: {error})") from error


def markdown(rows):
    """A table with COLUMNS as its header."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="directories of finished runs")
    parser.add_argument("--data", metavar="DIR", help="where the data set lives (default: as in training)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        device = choose_device(args.device)
        set_up_device(device)
        for directory in args.runs:
            if (directory / "latest.pth").exists() or not (directory / "weights.pth").exists():
                publish(directory, device, args.data)
        print(markdown(table_row(directory) for directory in args.runs))
    except (RunError, data.DataError, ValueError) as error:
        print(f"publish.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"publish.py: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
