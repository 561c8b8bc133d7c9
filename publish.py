"""Make finished runs fit to publish: their weights alone, and a row for each in a table.

Example: python publish.py work/digits.base
         python publish.py work/digits.base --export onnx    (for other programs, checked against torch)

Evaluates latest.pth once more, compares the error with test.csv, and writes the network without the optimiser to
weights.pth: small, and all that evaluate.py needs. Then prints a table of the runs in Markdown. The weights are those
of the last epoch, also of a run with --valid-size; with --ema, their average. Of a run that has no latest.pth, as in a
clone, weights.pth stays.
"""

import datetime
import os
import sys
from pathlib import Path

import torch

from common.checkpoints import read_checkpoint, write_checkpoint
from common.config import stages
from common.console import Mistake, Parser, command, counted, nonempty
from common.hardware import choose_device, choose_precision, set_up_device
from inference.export import FORMATS, SIZES, export
from inference.network import averaged, load_split, predictions
from reports.logs import read_table
from reports.tables import formatted, wilson
from training.arguments import parse_again

COLUMNS = (
    "run", "command", "hardware", "wall time", "images/s",
    "final test error (%), 95 % interval", "best on test (%), not a result", "commit",
)  # fmt: skip
KEPT = ("model", "config", "normalize", "classes", "epoch", "seconds", "manifest", "measured", "averaged")
SAMPLE = 500  # test images whose misclassified ones weights.pth counts apart, so that a quick check can count again


def finished(directory, ema=False):
    """The checkpoint of a finished run, latest.pth (with ``ema``: averaged), or else weights.pth. Raises Mistake."""
    if not directory.is_dir():
        raise Mistake(f"{directory} is not a run directory")
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
    """Write and return weights.pth of a finished run. Raises Mistake if the test images have another error now."""
    wrong = misclassified(checkpoint, images, device)
    count, error = len(wrong), checkpoint["metrics"][test_log(checkpoint)][-1]["error"]
    if abs(int(wrong.sum()) - error * count / 100) > 1 + count / 5000:  # close cases depend on the hardware
        raise Mistake(
            f"{directory}: latest.pth misclassifies {int(wrong.sum())} of {count} test images, but its log says "
            f"{error} %: name the data set of its training with --data"
        )
    sample = wrong[:SAMPLE]
    test = {"images": count, "error": error, "sample": len(sample), "wrong_in_sample": int(sample.sum())}
    weights = {name: checkpoint[name] for name in KEPT} | {"test": test}
    write_checkpoint(directory / "weights.pth", weights)
    return weights


def misclassified(checkpoint, images, device):
    """The images that the network takes for another class: (images,) bool, in the precision it was trained in."""
    amp, _ = choose_precision(stages(checkpoint["config"])[-1]["precision"], device)
    found = predictions(checkpoint, images, device, amp)
    return torch.cat([(logits.argmax(1) != labels).cpu() for logits, labels in found])


def table_row(directory):
    """The cells of COLUMNS of a published run, from its logs and weights.pth, as Markdown."""
    weights = read_checkpoint(directory / "weights.pth")
    config = weights["config"]
    train = read_table(directory / "train.csv", ("epoch", "images_per_second"))
    test = read_table(directory / f"{test_log(weights)}.csv")
    last = None if train is None or test is None else (test.epoch.iloc[-1], test.error.iloc[-1])
    if last != (weights["epoch"], weights["test"]["error"]):
        raise Mistake(f"{directory}: the logs are not those of weights.pth: publish it where latest.pth is")

    def each(name):
        return dict.fromkeys(stage[name] or "unknown" for stage in stages(config))

    name = Path(os.path.relpath(directory, Path(__file__).with_name("work"))).as_posix()  # as seen from work/README.md
    best, error = test.loc[test.error.idxmin()], weights["test"]["error"]
    low, high = wilson(error, weights["test"]["images"])
    return (
        f"[{name}]({name})",
        ", then ".join(f"`{command}`" for command in each("command")),
        ", then ".join(each("device")) + f", {stages(config)[-1]['precision']}",
        str(datetime.timedelta(seconds=round(weights["seconds"]))),
        f"{train.images_per_second.median():.0f}",
        f"{error:.2f} ({low:.2f} … {high:.2f})" + (", averaged" if weights["averaged"] else ""),
        f"{best.error:.2f} (epoch {best.epoch:.0f})",
        ", then ".join(f"`{commit[:7]}{commit[40:]}`" for commit in each("commit")),  # 40: where -dirty begins
    )


@command
def main(argv=None):
    parser = Parser(prog="publish.py", description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="DIR", help="directories of finished runs")
    add("--data", type=nonempty, metavar="DIR", help="where the data set lives (default: as in training)")
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
        for name in args.export:
            path = directory / f"weights.{name}"
            [(batch, _)] = images.select(slice(max(SIZES))).batches(max(SIZES), checkpoint["normalize"]).in_order()
            difference = export(checkpoint, path, batch)
            print(f"{path}: on {len(batch)} test images, logits differ from torch's by {difference:.1e} at most")
    print(formatted(COLUMNS, [table_row(directory) for directory in args.runs], "markdown"))


if __name__ == "__main__":
    sys.exit(main())
