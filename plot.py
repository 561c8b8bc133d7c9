"""Draw the loss and error curves of one or more runs from their CSV logs.

Example: python plot.py work/digits.base
         python plot.py work/sgd work/adam --out figures --format svg --smooth 3
         python plot.py work/sgd work/adam --out sgd-vs-adam.png --labels SGD Adam --only test --ylim 0 20
         python plot.py --mean work/sgd.1 work/sgd.2 work/sgd.3 --mean work/adam.1 work/adam.2 work/adam.3
         python plot.py work/digits.* --table markdown    (arguments that differ, and results; draws nothing)

Reads the logs of train.py and of bamos/densenet.pytorch (train.csv, test.csv without header).
"""

import sys
from pathlib import Path

from common.console import Mistake, Parser, between, command, counted, nonempty
from reports.curves import FIGURES, FORMATS, Figure, View, labels, make_figure, save
from reports.logs import SPLITS, mean_log, read_log
from reports.tables import FORMATS as TABLES
from reports.tables import comparison, formatted


def make_parser():
    parser = Parser(prog="plot.py", description=__doc__)
    add, number = parser.add_argument, between(-1e6, 1e6)
    add("runs", nargs="*", type=nonempty, metavar="DIR", help="run directories; several are drawn over each other")
    add("--mean", nargs="+", type=nonempty, action="append", default=[], metavar="DIR",
        help="runs that differ in their seed: draw their mean and a band of one standard deviation")
    add("--unlike", action="store_true",
        help="--mean: allow runs that differ in more, over the epochs that all of them have (default: refuse)")
    add("--table", choices=TABLES, nargs="?", const="text",
        help="print the arguments that differ and the results, and draw nothing (default: draw; text)")
    add("--out", type=nonempty, metavar="PATH",
        help="directory of the figures (default: DIR; for several runs, the current one), or a file such as "
        "sgd-vs-adam.png for a single figure of loss and error")
    add("--format", choices=FORMATS, default="png", help="(default: %(default)s)")
    add("--title", metavar="TEXT", help="text above the figure (default: network, data and errors)")
    add("--labels", nargs="+", metavar="TEXT",
        help="names of the runs, then of the means, in this order (default: what differs in their paths)")
    add("--only", choices=SPLITS, help="draw one curve per run (default: all)")
    add("--smooth", type=between(0, 1e6), default=0, metavar="EPOCHS", help="rolling mean (default: none)")
    add("--loss-scale", choices=("auto", "log", "linear"), default="auto",
        help="auto: log if the losses span a decade (default: %(default)s)")
    add("--error-scale", choices=("log", "linear"), default="linear", help="(default: %(default)s)")
    add("--xlim", nargs=2, type=number, metavar=("LOW", "HIGH"), help="epochs to show (default: all)")
    add("--ylim", nargs=2, type=number, metavar=("LOW", "HIGH"), help="errors to show, in %% (default: all)")
    add("--loss-ylim", nargs=2, type=number, metavar=("LOW", "HIGH"), help="losses to show, in nats (default: all)")
    add("--figsize", nargs=2, type=between(2, 50), metavar=("W", "H"), help="inches (default: by panels and runs)")
    return parser


def read_logs(args, view):
    """{label: Log} of the runs and the means."""
    logs = [read_log(run) for run in args.runs]
    logs += [mean_log([read_log(run) for run in group], args.unlike) for group in args.mean]
    names = args.labels or labels([log.path for log in logs])
    if len(names) != len(logs):
        raise Mistake(f"--labels {' '.join(names)}: {counted(len(names), 'name')} for {len(logs)} runs and means")
    for name, log in zip(names, logs, strict=True):
        if names.count(name) > 1:
            raise Mistake(f"two runs would be labelled {name}: name each run once, or tell them apart with --labels")
        if not any(len(view.rows(log.tables[split])) for split in view.splits(log)):
            raise Mistake(f"{log.path} has nothing to draw with this --only or --xlim")
    return dict(zip(names, logs, strict=True))


def figures(args):
    """The figures to write: {path: quantities}."""
    out = Path(args.out or (args.runs[0] if len(args.runs) == 1 and not args.mean else "."))
    kind = out.suffix[1:].lower() if args.out and not out.is_dir() else None
    if kind in FORMATS:
        return {out: FIGURES["loss-error"]}
    if kind in Figure().canvas.get_supported_filetypes():
        raise Mistake(f"--out {out}: a figure is written as {', '.join(FORMATS)}, not as {kind}")
    return {out / f"{name}.{args.format}": quantities for name, quantities in FIGURES.items()}


@command
def main(argv=None):
    args = make_parser().parse_args(argv)
    if not args.runs and not args.mean:
        raise Mistake("name a run directory, such as work/cifar10.base")
    if args.table and args.out:
        raise Mistake(f"--out {args.out}: a table is printed; > FILE at the end of the command writes it to a file")
    ylim = {"loss": args.loss_ylim, "error": args.ylim}
    view = View(args.only, args.smooth, args.xlim, ylim, {"loss": args.loss_scale, "error": args.error_scale})
    logs = read_logs(args, view)
    if args.table:
        print(formatted(*comparison(logs), args.table))
        return
    for path, quantities in figures(args).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        save(make_figure(logs, quantities, view, args.title, args.figsize), path)
        print(path)


if __name__ == "__main__":
    sys.exit(main())
