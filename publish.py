"""Publish finished runs: write the weights of each to a small file, and print a table row for each.

Example: python publish.py work/digits.base
         python publish.py work/digits.base --export onnx    (for other programs, checked against torch)

Evaluates latest.pth again, compares the error with test.csv, and writes the network without the optimiser to
weights.pth: small, and all that evaluate.py needs. Then prints a Markdown table of the runs, such as that in
work/README.md. The weights are those of the last epoch, even with --valid-size; with --ema, their average. A run that
has no latest.pth, as in a clone, keeps its weights.pth.
"""

import os
import sys
from pathlib import Path

import torch

from common.checkpoints import read_checkpoint, write_checkpoint
from common.config import stages
from common.console import Mistake, Parser, command, counted, duration, nonempty
from common.hardware import choose_device, choose_precision, set_up_device
from inference.export import FORMATS, SIZES, export
from inference.network import averaged, load_split, predictions
from reports.logs import read_log
from reports.tables import formatted, wilson
from training.arguments import parse_again

COLUMNS = (
    "run", "command", "hardware", "wall time", "images/s",
    "final test error (%), 95 % interval", "best on test (%), not a result", "commit",
)  # fmt: skip
KEPT = ("model", "config", "normalize", "classes", "epoch", "seconds", "manifest", "measured", "averaged")
SAMPLE = 500  # the first test images: weights.pth says how many are misclassified, for a quick check


def finished(directory, ema=False):
    """The checkpoint of a finished run: latest.pth, with ``ema`` averaged, else weights.pth. Raises Mistake."""
    latest = (directory / "latest.pth").exists()
    path = directory / ("latest.pth" if latest else "weights.pth")
    checkpoint = read_checkpoint(path)
    if missing := {*KEPT, "metrics" if latest else "test"} - checkpoint.keys():
        raise Mistake(f"{path} has no {min(missing)}: another program or version wrote it")
    parse_again(checkpoint, path)
    config = checkpoint["config"]
    if checkpoint["epoch"] < config["arguments"]["epochs"] and not config.get("stopped_early"):
        done = counted(checkpoint["epoch"], "epoch")
        raise Mistake(f"{directory} has finished {done}, not all: go on with --resume first")
    return averaged(checkpoint) if ema and latest else checkpoint


def test_log(checkpoint):
    """The log that has the test errors of a checkpoint's weights: the last ones, or their average."""
    return "test-ema" if checkpoint["averaged"] else "test"


def publish(directory, checkpoint, images, device):
    """Write and return weights.pth of a finished run. Raises Mistake if the test error differs from the log's."""
    wrong = misclassified(checkpoint, images, device)
    count, error = len(wrong), checkpoint["metrics"][test_log(checkpoint)][-1]["error"]
    if abs(int(wrong.sum()) - error * count / 100) > 1 + count / 5000:  # close cases depend on the hardware
        raise Mistake(
            f"{directory}: latest.pth misclassifies {int(wrong.sum())} of {count} test images, but its log says "
            f"{error} %: say with --data where the data set of the training is"
        )
    sample = wrong[:SAMPLE]
    test = {"images": count, "error": error, "sample": len(sample), "wrong_in_sample": int(sample.sum())}
    weights = {name: checkpoint[name] for name in KEPT} | {"test": test}
    write_checkpoint(directory / "weights.pth", weights)
    return weights


def misclassified(checkpoint, images, device):
    """True for misclassified images, (images,) bool, evaluated as in training: blocks round differently in bf16."""
    trained = stages(checkpoint["config"])[-1]
    amp, _ = choose_precision(trained["precision"], device)
    batches = predictions(checkpoint, images, device, amp, block=trained["block"])
    return torch.cat([(logits.argmax(1) != labels).cpu() for logits, labels in batches])


def table_row(directory):
    """The cells of COLUMNS of a published run, from its logs and weights.pth, as Markdown."""
    weights, tables = read_checkpoint(directory / "weights.pth"), read_log(directory).tables
    epoch, error, processes = weights["epoch"], weights["test"]["error"], stages(weights["config"])
    commits = [process["commit"] or "unknown" for process in processes]
    train, test = tables.get("train", {}), tables.get(test_log(weights))
    if "images_per_second" not in train or test is None or (*test.iloc[-1][["epoch", "error"]],) != (epoch, error):
        raise Mistake(f"{directory}: the logs are not those of weights.pth: publish it where latest.pth is")
    name = Path(os.path.relpath(directory, Path(__file__).with_name("work"))).as_posix()  # as seen from work/README.md
    best, (low, high) = test.loc[test.error.idxmin()], wilson(error, weights["test"]["images"])
    return (
        f"[{name}]({name})",
        in_turn(f"`{process['command']}`" for process in processes),
        in_turn(process["device"] for process in processes) + f", {processes[-1]['precision']}",
        duration(weights["seconds"]),
        f"{train.images_per_second.median():.0f}",
        f"{error:.2f} ({low:.2f} … {high:.2f})" + (", averaged" if weights["averaged"] else ""),
        f"{best.error:.2f} (epoch {best.epoch:.0f})",
        in_turn(f"`{commit[:7]}{commit[40:]}`" for commit in commits),  # 40: where -dirty begins
    )


def in_turn(texts):
    """The different ones of texts about the processes of a run, in their order."""
    return ", then ".join(dict.fromkeys(texts))


@command
def main(argv=None):
    parser = Parser(prog="publish.py", description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="DIR", help="directories of finished runs")
    add("--data", type=nonempty, metavar="DIR",
        help="directory of the data set, which is downloaded if it is missing (default: as in training)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    add("--ema", action="store_true", help="averaged weights of runs with --ema (default: the last)")
    add("--export", choices=[suffix[1:] for suffix in FORMATS], action="append", default=[],
        help="also write the network to weights.onnx, … in its directory (may be repeated)")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    set_up_device(device)
    for directory, checkpoint in [(directory, finished(directory, args.ema)) for directory in args.runs]:
        if "optimizer" in checkpoint or args.export:
            images, _ = load_split(checkpoint, directory=args.data)
        if "optimizer" in checkpoint:
            checkpoint = publish(directory, checkpoint, images, device)
            print(f"{directory / 'weights.pth'}: written, for evaluate.py and torch.hub")
        for name in args.export:
            path = directory / f"weights.{name}"
            [(batch, _)] = images.select(slice(max(SIZES))).batches(max(SIZES), checkpoint["normalize"]).in_order()
            difference = export(checkpoint, path, batch)
            print(f"{path}: on {len(batch)} test images, logits differ from torch's by {difference:.1e} of the largest")
    print("\ntable of the runs, in Markdown:")
    print(formatted(COLUMNS, [table_row(directory) for directory in args.runs], "markdown"))


if __name__ == "__main__":
    sys.exit(main())
