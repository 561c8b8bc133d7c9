"""Tables of runs, their settings and results with intervals: as text, Markdown or CSV. Imports no torch."""

import pandas as pd

from common.console import duration
from reports.logs import differing, recipe

FORMATS = ("text", "markdown", "csv")
ALWAYS = ("epoch", "test error (%)", "95 % low", "95 % high")
COLUMNS = (*ALWAYS, "sd", "averaged weights (%)", "best valid (%)", "time without evaluation")  # if a run has them


def comparison(logs):
    """A header and a row per run of ``logs``, {label: Log}: arguments that differ, and results; – if not known.

    The interval covers the choice of the test images. A mean over seeds has a standard deviation instead.
    """
    recipes = [recipe(log.config) for log in logs.values()]
    for log, each in zip(logs.values(), recipes, strict=True):
        if log.config and not log.members:
            arguments = log.config["arguments"]
            each |= {"seed": arguments.get("seed"), "fold": arguments.get("fold") or "–"}
    columns, outcomes = {"run": list(logs)} | differing(recipes), [outcome(log) for log in logs.values()]
    for name in COLUMNS:
        values = [each.get(name) for each in outcomes]
        if any(values) or name in ALWAYS:
            columns[name] = [value or "–" for value in values]
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def outcome(log):
    """{column: text} of what is known of a run's results; "14 of 60" epochs if it is unfinished."""
    numbers, texts = {}, {}
    images = {} if log.members else log.config.get("images", {})  # early releases did not count them
    if "test" in log.tables:
        done, epochs = f"{log.tables['test'].epoch.iloc[-1]:.0f}", log.config.get("arguments", {}).get("epochs")
        unfinished = epochs and done != str(epochs) and not log.config.get("stopped_early")
        texts["epoch"] = f"{done} of {epochs}" if unfinished else done
        numbers["test error (%)"] = error = log.tables["test"].error.iloc[-1]
        if images:
            numbers["95 % low"], numbers["95 % high"] = wilson(error, images["test"])
        if log.members:
            numbers["sd"] = log.deviations("test").error.iloc[-1]
    if "test-ema" in log.tables:
        numbers["averaged weights (%)"] = log.tables["test-ema"].error.iloc[-1]
    if "valid" in log.tables:
        numbers["best valid (%)"] = log.tables["valid"].error.min()
    speeds = log.tables.get("train", {}).get("images_per_second")
    if images and speeds is not None and speeds.between(1e-3, 1e9).all():  # else damaged
        texts["time without evaluation"] = duration((images["train"] / speeds).sum())
    return texts | {name: f"{value:.2f}" for name, value in numbers.items()}


def formatted(header, rows, style):
    """A table as text, in one of FORMATS."""
    if style == "csv":
        return pd.DataFrame(rows, columns=header).to_csv(index=False, lineterminator="\n").rstrip("\n")
    if style == "markdown":
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in (header, *rows))


def wilson(error, count, z=1.96):
    """Wilson's score interval, (low, high), of an error on ``count`` images, all in percent; z = 1.96 for 95 %."""
    p = error / 100
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (p * (1 - p) / count + z * z / (4 * count * count)) ** 0.5
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)
