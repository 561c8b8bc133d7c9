"""Draw the loss and error curves of one or more runs from their CSV logs.

Example: python plot.py work/digits.base
         python plot.py work/sgd work/adam --out figures --format svg --smooth 3
         python plot.py work/sgd work/adam --out sgd-vs-adam.png
         python plot.py --mean work/sgd.1 work/sgd.2 work/sgd.3 --mean work/adam.1 work/adam.2 work/adam.3

Reads the logs of train.py, of bamos/densenet.pytorch (train.csv, test.csv without header) and of
gpleiss/efficient_densenet_pytorch (results.csv).
"""

import io
import itertools
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from cli import Mistake, Parser, command, written_whole

# Okabe and Ito's colours, which colour-blind readers can tell apart; of one run, the training curve is the lighter one.
SPLIT_COLORS = {"train": "#56B4E9", "valid": "#009E73", "test": "#D55E00"}
RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9")
SPLIT_STYLES = {"train": "--", "valid": ":", "test": "-"}
FORMATS = ("png", "pdf", "svg")
FIGURES = {"loss": ("loss",), "error": ("error",), "loss-error": ("loss", "error")}


@dataclass
class Log:
    """The logs of one run: split → table with the columns epoch, loss, error (percent) and, if known, lr.

    ``fine`` holds rows within epochs; ``tables["train"]`` then holds the epochs' averages. Of a mean over several runs,
    ``deviations`` holds the standard deviations, split → table, and ``runs`` counts the runs.
    """

    name: str
    tables: dict
    fine: pd.DataFrame | None = None
    deviations: dict = field(default_factory=dict)
    runs: int = 1

    @property
    def headline(self):
        """The split whose error is reported: test, or validation where there is no test error per epoch."""
        return "test" if len(self.tables.get("test", ())) > 1 or "valid" not in self.tables else "valid"


def read_table(path, names=None):
    """A CSV file as numbers, without a half-written last line; None where the file is missing or has no row."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise Mistake(f"{path} cannot be read ({error})") from error
    text = text[: text.rfind("\n") + 1]
    has_header = text.startswith("epoch")
    try:
        table = pd.read_csv(io.StringIO(text), header=0 if has_header else None, names=None if has_header else names)
        table = table.astype(float)
    except pd.errors.EmptyDataError:
        return None
    except (ValueError, pd.errors.ParserError) as error:
        raise Mistake(f"{path} is not a log: {str(error).splitlines()[0]}") from error
    if "epoch" not in table:
        raise Mistake(f"{path} is not a log: it has no header that begins with epoch")
    return table if len(table) else None


def read_log(directory):
    """The Log of a run directory. Raises Mistake where it has none, or no row yet."""
    directory = Path(directory)
    if not directory.is_dir():
        raise Mistake(f"{directory} is not a run directory")
    results = read_table(directory / "results.csv")
    if results is not None and "train_loss" in results:
        return read_results(directory.name, results)
    tables = {}
    for split in ("train", "valid", "test"):
        table = read_table(directory / f"{split}.csv", names=["epoch", "loss", "error"])
        if table is not None:
            missing = {"loss", "error"} - set(table)
            if missing:
                raise Mistake(f"{directory / split}.csv is not a log: it has no column {missing.pop()}")
            tables[split] = table
    if not tables:
        raise Mistake(f"{directory} has no log with a row: train.csv, test.csv or results.csv")
    fine = None
    if "train" in tables:
        whole = tables["train"].epoch == tables["train"].epoch.round()
        if "lr" not in tables["train"] and not whole.all():
            fine, tables["train"] = tables["train"], average_epochs(tables["train"])
        elif not whole.all():
            fine = tables["train"][~whole]
            tables["train"] = tables["train"][whole]
    return Log(directory.name, tables, fine)


def average_epochs(table):
    """One row per epoch of a table with a row per iteration, as bamos writes it: epoch 2.0 begins the third epoch."""
    epoch = table.epoch.floordiv(1) + 1
    return table.groupby(epoch)[["loss", "error"]].mean().reset_index(names="epoch")


def read_results(name, results):
    """The Log of gpleiss/efficient_densenet_pytorch: errors are fractions, the last row holds the test error alone."""
    tables = {}
    for split in ("train", "valid"):
        table = results[["epoch", f"{split}_loss", f"{split}_error"]].dropna()
        table.columns = ["epoch", "loss", "error"]
        tables[split] = table.assign(error=100 * table.error)
    test = results.test_error.dropna()
    if len(test):
        last = tables["train"].epoch.max()
        tables["test"] = pd.DataFrame({"epoch": [last], "loss": [float("nan")], "error": [100 * test.iloc[-1]]})
    return Log(name, tables)


def mean_log(logs):
    """The mean of several runs, over the epochs that all of them have, as a Log."""
    names = [log.name for log in logs]
    alike = sum(1 for _ in itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False)))
    name = re.sub(r"([.\-_ ]+seed)?[.\-_ ]*\d*$", "", names[0][:alike]) or ", ".join(names)
    tables, deviations = {}, {}
    for split in ("train", "valid", "test"):
        parts = [log.tables[split] for log in logs if split in log.tables]
        if len(parts) < len(logs):
            continue
        grouped = pd.concat(parts).groupby("epoch")
        whole = grouped.size() == len(logs)
        if not whole.any():
            raise Mistake(f"{', '.join(names)}: --mean needs runs that have epochs in common")
        tables[split] = grouped.mean()[whole].reset_index()
        deviations[split] = grouped[["loss", "error"]].std()[whole].reset_index()
    return Log(f"{name}, mean of {len(logs)}", tables, deviations=deviations, runs=len(logs))


def smooth(table, epochs):
    """Rolling mean over the last ``epochs`` epochs."""
    if not epochs:
        return table
    days = pd.to_timedelta(table.epoch, unit="D")  # pandas rolls over a span only along a time axis
    rolled = table.set_index(days)[["loss", "error"]].rolling(pd.Timedelta(days=epochs)).mean().reset_index(drop=True)
    return rolled.assign(epoch=table.epoch.to_numpy())


def drops(table):
    """Epochs at whose start the learning rate fell to half or less."""
    if "lr" not in table:
        return []
    before = table.lr.shift()
    steady = before == table.lr.shift(2).fillna(before)  # so that the end of a cosine is no drop
    return (table.epoch[steady & (table.lr < 0.5 * before)] - 1).tolist()


def summary(log):
    """Final and best error of the log, in words."""
    split = log.headline
    if split not in log.tables:
        return log.name
    table = log.tables[split]
    if log.runs > 1:
        final, spread = table.iloc[-1], log.deviations[split].iloc[-1]
        return f"{split} error: final {final.error:.2f} ± {spread.error:.2f} % (epoch {final.epoch:.0f})"
    final, best = table.iloc[-1], table.loc[table.error.idxmin()]
    text = f"{split} error: final {final.error:.2f} % (epoch {final.epoch:.0f}), "
    text += f"best {'on test ' if split == 'test' else ''}{best.error:.2f} % (epoch {best.epoch:.0f})"
    if split == "valid" and "test" in log.tables:
        text += f"; test {log.tables['test'].error.iloc[-1]:.2f} %"
    return text


def draw(axes, logs, quantity, scale, smooth_epochs):
    """Draw one quantity, "loss" or "error", of all logs."""
    for i, log in enumerate(logs):
        for split, table in log.tables.items():
            color = SPLIT_COLORS[split] if len(logs) == 1 else RUN_COLORS[i % len(RUN_COLORS)]
            label = split if len(logs) == 1 else f"{log.name}, {split}"
            style = {"color": color, "linestyle": SPLIT_STYLES[split], "linewidth": 1.1 if split == "train" else 1.8}
            if split == "train" and log.fine is not None:
                axes.plot(log.fine.epoch, log.fine[quantity], color=color, linewidth=0.5, alpha=0.3)
            if smooth_epochs and len(table) > 1:
                axes.plot(table.epoch, table[quantity], color=color, linewidth=0.5, alpha=0.4)
            marker = "o" if len(table) == 1 else None
            line = smooth(table, smooth_epochs)
            axes.plot(line.epoch, line[quantity], label=label, marker=marker, **style)
            if split in log.deviations and split == log.headline:
                band = smooth(log.deviations[split], smooth_epochs)[quantity]
                low, high = line[quantity] - band, line[quantity] + band
                axes.fill_between(line.epoch, low, high, color=color, alpha=0.2, linewidth=0)
    for epoch in sorted({epoch for log in logs for epoch in drops(log.tables.get("train", pd.DataFrame()))}):
        axes.axvline(epoch, color="0.6", linestyle=(0, (1, 2)), linewidth=1, zorder=0)
    if scale == "auto":  # less than a decade on a logarithmic axis has hardly a number beside it
        low, high = axes.dataLim.intervaly
        scale = "log" if high > 10 * low > 0 else "linear"
    axes.set(xlabel="epoch", ylabel="cross-entropy loss (nats)" if quantity == "loss" else "error (%)", yscale=scale)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def make_figure(logs, quantities, scales, smooth_epochs, title=None):
    figure = Figure(figsize=(5.6 * len(quantities), 4.2), layout="constrained")
    panels = figure.subplots(1, len(quantities), squeeze=False)[0]
    for axes, quantity in zip(panels, quantities, strict=True):
        draw(axes, logs, quantity, scales[quantity], smooth_epochs)
    if len(logs) == 1:
        figure.suptitle(f"{title or logs[0].name}\n{summary(logs[0])}", fontsize=10)
    else:
        figure.suptitle("\n".join([title or "", *(f"{log.name}: {summary(log)}" for log in logs)]).strip(), fontsize=8)
    handles, labels = panels[-1].get_legend_handles_labels()
    if any(drops(log.tables.get("train", pd.DataFrame())) for log in logs):
        handles.append(panels[0].axvline(float("nan"), color="0.6", linestyle=(0, (1, 2)), linewidth=1))
        labels.append("learning rate drops")
    columns = 4 if len(logs) == 1 else min(4, len(logs))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return figure


def save(figure, path):
    """Write a figure in one step, the same bytes for the same logs."""
    kind = path.suffix[1:].lower()
    metadata = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[kind]
    with matplotlib.rc_context({"svg.hashsalt": "densenet"}), written_whole(path) as file:
        figure.savefig(file, format=kind, dpi=150, metadata=metadata)


def parse_args(argv=None):
    parser = Parser(prog="plot.py", description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="DIR", help="run directories; several are drawn over each other")
    parser.add_argument("--mean", nargs="+", action="append", default=[], metavar="DIR",
        help="runs that differ in their seed: draw their mean and a band of one standard deviation")
    parser.add_argument("--out", metavar="PATH",
        help="where figures go (default: DIR; of several, here); a file such as sgd-vs-adam.png: one figure of both")
    parser.add_argument("--title", metavar="TEXT", help="a line above the figure: data set, network, …")
    parser.add_argument("--format", choices=FORMATS, default="png", help="(default: %(default)s)")
    parser.add_argument("--smooth", type=float, default=0, metavar="EPOCHS", help="rolling mean (default: none)")
    parser.add_argument("--loss-scale", choices=("auto", "log", "linear"), default="auto",
        help="auto is log from a decade on (default: %(default)s)")
    parser.add_argument("--error-scale", choices=("log", "linear"), default="linear", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.runs and not args.mean:
        raise Mistake("name a run directory, such as work/cifar10.base")
    return args


def figures(args):
    """What to draw: {path: quantities}."""
    out = Path(args.out or (args.runs[0] if len(args.runs) == 1 and not args.mean else "."))
    kind = out.suffix[1:].lower() if args.out and not out.is_dir() else None
    if kind in FORMATS:
        return {out: FIGURES["loss-error"]}
    if kind in Figure().canvas.get_supported_filetypes():
        raise Mistake(f"--out {out}: a figure is written as {', '.join(FORMATS)}, not as {kind}")
    return {out / f"{name}.{args.format}": quantities for name, quantities in FIGURES.items()}


@command
def main(argv=None):
    args = parse_args(argv)
    logs = [read_log(run) for run in args.runs]
    logs += [mean_log([read_log(run) for run in group]) for group in args.mean]
    scales = {"loss": args.loss_scale, "error": args.error_scale}
    for path, quantities in figures(args).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        save(make_figure(logs, quantities, scales, args.smooth, args.title), path)
        print(path)


if __name__ == "__main__":
    sys.exit(main())
