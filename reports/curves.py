"""Loss and error curves, drawn from logs. Imports no torch."""

import io
import os
import textwrap
import warnings
from dataclasses import dataclass, field
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # no window is opened; a notebook's backend may not be installed here

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from common.console import Mistake, printable
from common.files import written_whole
from reports.logs import SPLITS, leading

# Okabe and Ito's colours, which colour-blind readers can tell apart. The training curve of a single run is lighter.
SPLIT_STYLES = {
    "train": {"color": "#56B4E9", "linestyle": "--", "linewidth": 1.1},
    "valid": {"color": "#009E73", "linestyle": ":", "linewidth": 1.8},
    "test": {"color": "#D55E00", "linestyle": "-", "linewidth": 1.8},
}
RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9")
DROP_STYLE = {"color": "0.6", "linestyle": (0, (1, 2)), "linewidth": 1}
FORMATS = ("png", "pdf", "svg")
FIGURES = {"loss": ("loss",), "error": ("error",), "loss-error": ("loss", "error")}
POSSIBLE = {"loss": (0, None), "error": (0, 100)}  # a band of deviations is clipped to this


@dataclass
class View:
    """Which part of the logs to show, and how. ``smooth``: epochs; ``xlim``, ``ylim`` of each quantity: (low, high)."""

    only: str | None = None
    smooth: float = 0
    xlim: tuple | None = None
    ylim: dict = field(default_factory=dict)
    scale: dict = field(default_factory=lambda: {"loss": "auto", "error": "linear"})

    def splits(self, log):
        return [split for split in SPLITS if split in log.tables and self.only in (None, split)]

    def rows(self, table):
        return table if self.xlim is None else table[table.epoch.between(*self.xlim)]


def labels(paths):
    """Names that tell paths apart: the paths without the directories that all begin with."""
    paths = [Path(os.path.abspath(path)).parts for path in paths]
    shared = min(leading(paths), min(map(len, paths)) - 1)  # keep at least one part of each
    return ["/".join(path[shared:]) for path in paths]


def smooth(table, epochs):
    """Rolling mean over the last ``epochs`` rows, one per epoch."""
    means = table[["loss", "error"]].rolling(max(1, int(epochs)), min_periods=1).mean()
    return means.assign(epoch=table.epoch)


def drops(log):
    """The last epochs before the learning rate falls to less than half."""
    table = log.tables.get("train", {})
    if "lr" not in table:
        return []
    before = table.lr.shift()
    steady = before == table.lr.shift(2).fillna(before)  # not so at the end of a cosine
    return (table.epoch[steady & (table.lr < 0.5 * before)] - 1).tolist()


def summary(log):
    """The log's final and best error, in words."""
    split = log.headline
    table = log.tables[split]
    final, best = table.iloc[-1], table.sort_values("error", kind="stable").iloc[0]
    if log.members:
        spread, runs = log.deviations(split).error.iloc[-1], len(log.members)
        return f"{split} error, mean of {runs}: final {final.error:.2f} ± {spread:.2f} % (epoch {final.epoch:.0f})"
    text = f"{split} error: final {final.error:.2f} % (epoch {final.epoch:.0f})"
    if split != "train":
        text += f", best {'on test ' if split == 'test' else ''}{best.error:.2f} % (epoch {best.epoch:.0f})"
    return text


def line_style(split, i, count):
    """The style of the i-th of ``count`` runs. If there are more runs than colours, markers tell them apart."""
    if count == 1:
        return SPLIT_STYLES[split]
    reused, color = divmod(i, len(RUN_COLORS))
    marker = (reused + 2, 0) if reused else None  # triangles, then squares, …
    return SPLIT_STYLES[split] | {"color": RUN_COLORS[color], "marker": marker}


def draw_log(axes, log, quantity, view, styles):
    """Draw one quantity, "loss" or "error", of a log; ``styles``: split → style of its line."""
    for split in view.splits(log):
        table, style = log.tables[split], styles[split]
        faint = {"color": style["color"], "linewidth": 0.5}
        if split == "train" and log.fine is not None:
            fine = view.rows(log.fine)
            axes.plot(fine.epoch, fine[quantity], alpha=0.3, **faint)
        if view.smooth and len(table) > 1:
            raw = view.rows(table)
            axes.plot(raw.epoch, raw[quantity], alpha=0.4, **faint)
        line = view.rows(smooth(table, view.smooth))
        points = {"marker": "o"} if len(table) == 1 else {"markevery": max(1, len(line) // 8)}
        axes.plot(line.epoch, line[quantity], **(style | points))
        if log.members and split == (view.only or log.headline):
            band = view.rows(log.deviations(split, lambda table: smooth(table, view.smooth)))[quantity]
            edges = [(line[quantity] + side * band).clip(*POSSIBLE[quantity]) for side in (-1, 1)]
            axes.fill_between(line.epoch, *edges, color=style["color"], alpha=0.2, linewidth=0)


def draw(axes, logs, quantity, view):
    """Draw one quantity of all logs."""
    for i, log in enumerate(logs):
        draw_log(axes, log, quantity, view, {split: line_style(split, i, len(logs)) for split in SPLITS})
    for epoch in sorted({epoch for log in logs for epoch in drops(log)}):
        axes.axvline(epoch, zorder=0, **DROP_STYLE)
    scale, limits = view.scale[quantity], view.ylim.get(quantity)
    if scale == "auto":  # a logarithmic axis of less than a decade has hardly any numbers
        low, high = limits or axes.dataLim.intervaly
        scale = "log" if high > 10 * low > 0 else "linear"
    axes.set(xlabel="epoch", ylabel="loss (nats)" if quantity == "loss" else "error (%)", yscale=scale)
    axes.set(xlim=view.xlim, ylim=limits)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def drawable(text):
    """Text for Matplotlib: $ starts no formula, and what cannot be printed, such as a stray byte, becomes its code."""
    return "\n".join(map(printable, text.split("\n"))).replace("$", r"\$")


def wrapped(text, inches, size):
    """Drawable text, wrapped to a width in ``inches`` with letters of ``size`` points."""
    width = max(10, int(inches * 72 / (0.6 * size)))  # the average letter is 0.6 of its size wide
    lines = (line for paragraph in text.split("\n") for line in textwrap.wrap(paragraph, width) or [""])
    return drawable("\n".join(lines))


def add_legend(figure, entries, width, **options):
    """Add a legend of (text, line style) in as many columns as fit into ``width`` inches. Returns its rows."""
    texts = [wrapped(text, width - 0.6, 9) for text, _ in entries]
    widths = [0.6 + 0.07 * max(map(len, text.split("\n"))) for text in texts]
    columns = len(texts) if sum(widths) < width else max(1, int(width / max(widths)))
    lines = [Line2D([], [], label=text, **style) for text, (_, style) in zip(texts, entries, strict=True)]
    legend = figure.legend(handles=lines, ncols=columns, frameon=False, fontsize=9, title_fontsize=10, **options)
    legend.get_title().set_multialignment("center")
    return sum(text.count("\n") + 1 for text in texts) / columns


def make_figure(logs, quantities, view, title=None, size=None):
    """A figure with a panel per quantity. ``logs``: label → Log; ``size``: (width, height) in inches.

    The legend above the panels says what the line styles mean. Its title names network and data if all runs share
    them, else the legend below does, which names several runs. Errors follow each name. ``title`` replaces the title
    and the errors.
    """
    runs, width = list(logs.values()), size[0] if size else 5.6 * len(quantities)
    figure = Figure(figsize=(width, 4), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, len(quantities), squeeze=False)[0], quantities, strict=True):
        draw(axes, runs, quantity, view)
    several, titles = len(runs) > 1, {log.title for log in runs}
    names = [f"{label}, {log.title}" if len(titles) > 1 and log.title else label for label, log in logs.items()]
    told = names if title else [f"{name}: {summary(log)}" for name, log in zip(names, runs, strict=True)]
    if not title and several:
        title = runs[0].title if len(titles) == 1 else ""
    elif not title:
        title = f"{': '.join(filter(None, (*names, *titles)))}\n{summary(runs[0])}"
    shown = [split for split in SPLITS if any(split in view.splits(log) for log in runs)]
    entries = [(split, SPLIT_STYLES[split] | ({"color": "0.3"} if several else {})) for split in shown]
    if any(map(drops, runs)):
        entries.append(("learning rate drops", DROP_STYLE))
    add_legend(figure, entries, width, title=wrapped(title, width, 10), loc="outside upper center")
    below = 0
    if several:
        entries = [(text, line_style("test", i, len(runs))) for i, text in enumerate(told)]
        below = add_legend(figure, entries, width, loc="outside lower center")
    figure.set_figheight(size[1] if size else min(4 + 0.2 * below, 50))
    return figure


def save(figure, path):
    """Write a figure in one step, the same bytes for the same logs. Raises Mistake if its texts leave no room."""
    suffix = path.suffix[1:].lower()
    metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(suffix)
    buffer = io.BytesIO()  # a drawing that fails or is killed leaves nothing on disk
    with matplotlib.rc_context({"svg.hashsalt": "densenet"}), warnings.catch_warnings(action="ignore"):
        warnings.filterwarnings("error", "constrained_layout not applied")  # others are about letters that no font has
        try:
            figure.savefig(buffer, format=suffix, dpi=150, metadata=metadata)
        except UserWarning as error:
            raise Mistake(f"{path}: the texts leave no room for curves: choose a larger --figsize") from error
    with written_whole(path, f".{os.getpid()}.tmp") as file:  # another process may draw the same figure
        file.write(buffer.getbuffer())
