"""Loss and error curves, drawn from logs. Imports no torch."""

import io
import os
import textwrap
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from common.console import Mistake
from common.files import written_whole
from reports.logs import SPLITS, leading

# Okabe and Ito's colours, which colour-blind readers can tell apart; of one run, the training curve is the lighter one.
SPLIT_COLORS = {"train": "#56B4E9", "valid": "#009E73", "test": "#D55E00"}
RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9")
SPLIT_STYLES = {
    "train": {"linestyle": "--", "linewidth": 1.1},
    "valid": {"linestyle": ":", "linewidth": 1.8},
    "test": {"linestyle": "-", "linewidth": 1.8},
}
DROP_STYLE = {"color": "0.6", "linestyle": (0, (1, 2)), "linewidth": 1}
FORMATS = ("png", "pdf", "svg")
FIGURES = {"loss": ("loss",), "error": ("error",), "loss-error": ("loss", "error")}
POSSIBLE = {"loss": (0, None), "error": (0, 100)}  # what a band of deviations may not leave


@dataclass
class View:
    """What of the logs is shown, and how. ``smooth``: epochs; ``xlim``, and ``ylim`` of each quantity: (low, high)."""

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
    """What tells the paths apart: their parts without those at the beginning and at the end that all of them have."""
    paths = [Path(os.path.abspath(path)).parts for path in paths]
    for _ in ("beginning", "end"):
        alike = min(leading(paths), min(map(len, paths)) - 1)  # so that something is left of each
        paths = [path[alike:][::-1] for path in paths]
    return ["/".join(path) for path in paths]


def smooth(table, epochs):
    """Rolling mean over the last ``epochs`` epochs."""
    if not epochs:
        return table
    starts = np.searchsorted(table.epoch, table.epoch - epochs, side="right")
    values = table[["loss", "error"]].to_numpy()
    means = [values[min(start, i) : i + 1].mean(0) for i, start in enumerate(starts)]
    return pd.DataFrame(means, columns=["loss", "error"]).assign(epoch=table.epoch.to_numpy())


def drops(log):
    """Epochs at whose start the learning rate fell to half or less."""
    table = log.tables.get("train", {})
    if "lr" not in table:
        return []
    before = table.lr.shift()
    steady = before == table.lr.shift(2).fillna(before)  # so that the end of a cosine is no drop
    return (table.epoch[steady & (table.lr < 0.5 * before)] - 1).tolist()


def summary(log):
    """Final and best error of the log, in words."""
    split = log.headline
    table = log.tables[split]
    final, best = table.iloc[-1], table.sort_values("error", kind="stable").iloc[0]
    if log.runs > 1:
        spread = log.deviations[split].error.iloc[-1]
        return f"{split} error, mean of {log.runs}: final {final.error:.2f} ± {spread:.2f} % (epoch {final.epoch:.0f})"
    text = f"{split} error: final {final.error:.2f} % (epoch {final.epoch:.0f})"
    if split != "train":
        text += f", best {'on test ' * (split == 'test')}{best.error:.2f} % (epoch {best.epoch:.0f})"
    if split == "valid" and "test" in log.tables:
        text += f"; test {log.tables['test'].error.iloc[-1]:.2f} %"
    return text


def line_styles(i, count):
    """Split → style of its line, of the i-th of ``count`` runs. More runs than there are colours differ in markers."""
    turn, color = divmod(i, len(RUN_COLORS))
    run = {"color": RUN_COLORS[color], "marker": (turn + 2, 0) if turn else None}  # triangles, then squares, …
    looks = {split: run if count > 1 else {"color": color} for split, color in SPLIT_COLORS.items()}
    return {split: style | looks[split] for split, style in SPLIT_STYLES.items()}


def draw_log(axes, log, quantity, view, styles):
    """Draw one quantity, "loss" or "error", of a log."""
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
        if log.runs > 1 and split == (view.only or log.headline):
            band = view.rows(smooth(log.deviations[split], view.smooth))[quantity]
            edges = [(line[quantity] + side * band).clip(*POSSIBLE[quantity]) for side in (-1, 1)]
            axes.fill_between(line.epoch, *edges, color=style["color"], alpha=0.2, linewidth=0)


def draw(axes, logs, quantity, view):
    """Draw one quantity of all logs."""
    for i, log in enumerate(logs):
        draw_log(axes, log, quantity, view, line_styles(i, len(logs)))
    for epoch in sorted({epoch for log in logs for epoch in drops(log)}):
        axes.axvline(epoch, zorder=0, **DROP_STYLE)
    scale, limits = view.scale[quantity], view.ylim.get(quantity)
    if scale == "auto":  # less than a decade on a logarithmic axis has hardly a number beside it
        low, high = limits or axes.dataLim.intervaly
        scale = "log" if high > 10 * low > 0 else "linear"
    axes.set(xlabel="epoch", ylabel="cross-entropy loss (nats)" if quantity == "loss" else "error (%)", yscale=scale)
    axes.set(xlim=view.xlim, ylim=limits)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def plain(text, inches, size):
    """Text that can be drawn, in lines that are not wider than so many inches in letters of ``size`` points."""
    text = "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)
    width = max(10, int(inches * 72 / (0.6 * size)))  # letters are 0.6 of their size wide, on average
    return "\n".join(line for paragraph in text.split("\n") for line in textwrap.wrap(paragraph, width) or [""])


def add_legend(owner, entries, columns=1, **options):
    """A legend of (text, style of its line), in reading order. Nothing in a text is markup: neither $ nor a first _."""
    entries = [entry for column in range(columns) for entry in entries[column::columns]]  # as Matplotlib fills columns
    lines = [Line2D([], [], **style) for _, style in entries]
    legend = owner.legend(lines, [" "] * len(lines), ncols=columns, frameon=False, fontsize=9, **options)
    for text, (label, _) in zip(legend.get_texts(), entries, strict=True):
        text.set(text=label, parse_math=False)


def split_entries(logs, view):
    """What a legend says of line styles."""
    shown = {split for log in logs for split in view.splits(log)}
    color = {} if len(logs) == 1 else {"color": "0.3"}
    entries = [(split, style | color) for split, style in line_styles(0, 1).items() if split in shown]
    return entries + [("learning rate drops", DROP_STYLE)] * any(map(drops, logs))


def run_entries(logs):
    """What a legend says of several runs: label, errors, and network and data unless these are the same for all."""
    titled = len({log.title for log in logs.values()}) > 1
    names = [f"{label}, {log.title}" if titled and log.title else label for label, log in logs.items()]
    texts = [f"{name}: {summary(log)}" for name, log in zip(names, logs.values(), strict=True)]
    return [(text, line_styles(i, len(logs))["test"]) for i, text in enumerate(texts)]


def heading(logs, title):
    """The lines above a figure: its title, or else network and data if all runs share them; of a single run, errors."""
    titles = {log.title for log in logs.values()}
    shared = titles.pop() if len(titles) == 1 else ""
    if len(logs) > 1:
        return title or shared
    [(label, log)] = logs.items()
    return f"{title or ': '.join(filter(None, (label, shared)))}\n{summary(log)}"


def make_figure(logs, quantities, view, title=None, size=None):
    """A figure with a panel per quantity. ``logs``: label → Log; ``size``: (width, height) in inches."""
    runs, width = list(logs.values()), size[0] if size else 5.6 * len(quantities)
    below, columns = split_entries(runs, view), 4
    if len(runs) > 1:
        below = [(plain(text, width - 0.6, 9), style) for text, style in run_entries(logs)]
        columns = max(1, int(width / (0.6 + 0.07 * max(len(text) for text, _ in below))))
    lines = sum(text.count("\n") + 1 for text, _ in below) / columns
    figure = Figure(figsize=size or (width, min(4 + 0.2 * lines, 50)), layout="constrained")
    panels = figure.subplots(1, len(quantities), squeeze=False)[0]
    for axes, quantity in zip(panels, quantities, strict=True):
        draw(axes, runs, quantity, view)
    figure.suptitle(plain(heading(logs, title), width, 10), fontsize=10, parse_math=False)
    add_legend(figure, below, columns, loc="outside lower center")
    if len(runs) > 1:
        add_legend(panels[-1], split_entries(runs, view), loc="upper right")
    return figure


def save(figure, path):
    """Write a figure in one step, the same bytes for the same logs. Raises Mistake where its texts leave no room."""
    kind = path.suffix[1:].lower()
    metadata = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[kind]
    buffer = io.BytesIO()  # drawn in memory first: a drawing that fails or is killed then leaves nothing
    with matplotlib.rc_context({"svg.hashsalt": "densenet"}), warnings.catch_warnings():
        warnings.filterwarnings("error", "constrained_layout not applied")
        try:
            figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
        except UserWarning as error:
            raise Mistake(f"{path}: the texts leave no room for curves: choose a larger --figsize") from error
    with written_whole(path, f".{os.getpid()}.tmp") as file:  # another process may draw the same figure
        file.write(buffer.getbuffer())
