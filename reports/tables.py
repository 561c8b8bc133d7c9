"""What runs have come to, side by side, with intervals: as text, Markdown or CSV. Imports no torch."""

import csv
import datetime
import io

from reports.logs import differing, recipe

FORMATS = ("text", "markdown", "csv")
# Training and test images of the data sets: earlier releases did not write how many a run had.
IMAGES = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "svhn": (604_388, 26_032), "digits": (1_437, 360)}


def comparison(logs):
    """A header and a row per run of ``logs``, {label: Log}: what differs, and what came out; – where it is not known.

    The interval covers the choice of the test images; of a mean over seeds, there is the standard deviation instead.
    """
    recipes = [recipe(log.config) | seed_of(log) for log in logs.values()]
    columns = {"run": list(logs)} | differing(recipes)
    for name, values in results(list(logs.values())).items():
        columns[name] = ["–" if value is None else value for value in values]
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def seed_of(log):
    arguments = log.config.get("arguments", {}) if log.runs == 1 else {}
    return {name: value for name, value in arguments.items() if name == "seed"}


def results(logs):
    """{column: values}: errors in percent, training times. Of columns that no run has, only those of the test stay."""
    tests = [log.tables.get("test") for log in logs]
    errors = [final(log, "test") for log in logs]
    spans = [interval(log, error) for log, error in zip(logs, errors, strict=True)]
    optional = {
        "sd": [number(log.deviations["test"].error.iloc[-1]) if "test" in log.deviations else None for log in logs],
        "averaged weights (%)": [number(final(log, "test-ema")) for log in logs],
        "best valid (%)": [number(log.tables["valid"].error.min()) if "valid" in log.tables else None for log in logs],
        "training time": [training_time(log) for log in logs],
    }
    return {
        "epoch": [None if test is None else f"{test.epoch.iloc[-1]:.0f}" for test in tests],
        "test error (%)": list(map(number, errors)),
        "95 % low": [low for low, _ in spans],
        "95 % high": [high for _, high in spans],
    } | {name: values for name, values in optional.items() if any(values)}


def final(log, name):
    return log.tables[name].error.iloc[-1] if name in log.tables else None


def number(value):
    return None if value is None else f"{value:.2f}"


def images_of(log):
    """Training and test images of a run, each None where it is not known."""
    if not log.config or log.runs > 1:
        return None, None
    arguments = log.config["arguments"]
    train, test = IMAGES.get(str(arguments.get("dataset")), (0, 0))
    limited = {
        "train": min(train - count_of(arguments, "valid_size"), count_of(arguments, "limit_train") or train),
        "test": min(test, count_of(arguments, "limit_test") or test),
    }
    images = log.config.get("images", limited)  # what the run itself has counted
    return count_of(images, "train") or None, count_of(images, "test") or None


def count_of(values, name):
    """A number of images, 0 where there is none."""
    value = values.get(name) if isinstance(values, dict) else None
    return value if isinstance(value, int) and 0 < value < 10**9 else 0


def interval(log, error):
    """(low, high) as texts."""
    _, test = images_of(log)
    return tuple(map(number, wilson(error, test))) if test and error is not None else (None, None)


def training_time(log):
    """Of all epochs, evaluations left out."""
    train, _ = images_of(log)
    speeds = log.tables.get("train", {}).get("images_per_second")
    if not train or speeds is None or not speeds.between(1e-3, 1e9).all():  # none in a mean, or damaged
        return None
    return str(datetime.timedelta(seconds=round((train / speeds).sum())))


def formatted(header, rows, kind):
    """A table as one text, in one of FORMATS."""
    if kind == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        return text.getvalue().rstrip("\n")
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
