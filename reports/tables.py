"""Tables of runs, their settings and results with intervals: as text, Markdown or CSV. Imports no torch."""

import datetime

import pandas as pd

from reports.logs import differing, recipe

FORMATS = ("text", "markdown", "csv")
ALWAYS = ("epoch", "test error (%)", "95 % low", "95 % high")
COLUMNS = (*ALWAYS, "sd", "averaged weights (%)", "best valid (%)", "training time")  # others only where a run has them


def comparison(logs):
    """A header and a row per run of ``logs``, {label: Log}: what differs, and what came out; – if it is not known.

    The interval covers the choice of the test images; of a mean over seeds, there is the standard deviation instead.
    """
    recipes = [recipe(log.config) for log in logs.values()]
    for log, each in zip(logs.values(), recipes, strict=True):
        if log.config and not log.members:
            each["seed"] = log.config["arguments"].get("seed")
    columns, outcomes = {"run": list(logs)} | differing(recipes), [outcome(log) for log in logs.values()]
    for name in COLUMNS:
        values = [each.get(name) for each in outcomes]
        if any(values) or name in ALWAYS:
            columns[name] = [value or "–" for value in values]
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def outcome(log):
    """{column: text} of what is known of a run: errors in percent, the time of training."""
    numbers, images = {}, {} if log.members else log.config.get("images", {})  # early releases did not count them
    if "test" in log.tables:
        numbers["test error (%)"] = error = log.tables["test"].error.iloc[-1]
        if images:
            numbers["95 % low"], numbers["95 % high"] = wilson(error, images["test"])
        if log.members:
            numbers["sd"] = log.deviations("test").error.iloc[-1]
    if "test-ema" in log.tables:
        numbers["averaged weights (%)"] = log.tables["test-ema"].error.iloc[-1]
    if "valid" in log.tables:
        numbers["best valid (%)"] = log.tables["valid"].error.min()
    texts = {name: f"{value:.2f}" for name, value in numbers.items()}
    epoch = f"{log.tables['test'].epoch.iloc[-1]:.0f}" if "test" in log.tables else None
    return {"epoch": epoch} | texts | {"training time": training_time(log, images.get("train"))}


def training_time(log, images):
    """Of all epochs, evaluations left out. None if it is not known."""
    speeds = log.tables.get("train", {}).get("images_per_second")
    if not images or speeds is None or not speeds.between(1e-3, 1e9).all():  # none in a mean, or damaged
        return None
    return str(datetime.timedelta(seconds=round((images / speeds).sum())))


def formatted(header, rows, kind):
    """A table as one text, in one of FORMATS."""
    if kind == "csv":
        return pd.DataFrame(rows, columns=header).to_csv(index=False, lineterminator="\n").rstrip("\n")
    if kind == "markdown":
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in (header, *rows))


def wilson(error, count, z=1.96):
    """Wilson's score interval of an error measured on ``count`` images, errors in percent; z = 1.96 for 95 %."""
    share = error / 100
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)
