"""Reads the logs of runs as tables, and averages runs that differ in their seed. Imports no torch.

The runs are those of train.py, of bamos/densenet.pytorch (train.csv, test.csv without header) and of
gpleiss/efficient_densenet_pytorch (results.csv).
"""

import io
import itertools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from common.config import read_config
from common.console import Mistake
from common.files import readable

SPLITS = ("train", "valid", "test")
LOGS = (*SPLITS, "test-ema")  # of the averaged weights, which are not drawn
COLUMNS = ("epoch", "loss", "error")
OPTIONAL = ("lr", "test_error", "images_per_second")
DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN"}
# Arguments in which runs of one mean may differ: the seed, and what changes at most the rounding. Data is compared by
# its name, not by where it lives.
NOT_COMPARED = {
    *("seed", "data", "workers", "block", "device", "precision", "compile", "cuda_graph", "deterministic"),
    *("save", "resume", "overwrite", "log_every", "keep_every", "tensorboard", "plot", "progress"),
    "recipe",  # a name for other arguments
}
# The arguments of DenseNet in the paper, and what goes without saying.
NETWORK = {
    *("depth", "growth_rate", "reduction", "bottleneck", "drop_rate", "init_channels"),
    *("num_classes", "in_channels", "block_config", "stem"),
}
SEED = re.compile(r"([.\-_ ]*seed)?[.\-_ ]*\d*$")  # at the end of what the names of several seeds have in common


@dataclass
class Log:
    """The logs of one run: split → table with the columns epoch, loss, error (percent) and, if known, lr.

    ``fine`` holds rows within epochs; ``tables["train"]`` then holds the epochs' averages. ``config`` is the run's
    config.json, empty where another program wrote the logs. ``members`` are the Logs of which this is the mean, if any.
    """

    path: Path
    tables: dict
    fine: pd.DataFrame | None = None
    config: dict = field(default_factory=dict)
    members: list = field(default_factory=list)

    @property
    def headline(self):
        """The split whose error is reported: test, or validation if there is no test error per epoch."""
        if len(self.tables.get("test", ())) > 1:
            return "test"
        return next(split for split in ("valid", "test", "train") if split in self.tables)

    @property
    def title(self):
        return title_of(self.config) if self.config else ""

    def deviations(self, split, change=lambda table: table):
        """Standard deviations over the members, each of whose tables is changed first."""
        return over_runs([change(log.tables[split]) for log in self.members])[1]


def title_of(config):
    """Network and data of a run, and how many training images if not all."""
    limit = config["arguments"].get("limit_train")
    part = f", {limit:,} training images" if isinstance(limit, int) else ""
    return f"{network_name(config)}, {dataset_name(config['arguments'])}{part}"


def network_name(config):
    """As in the paper: DenseNet-BC-100 (k = 12), of ImageNet's networks DenseNet-121 (k = 32).

    Arguments that DenseNet has got since, and that are not off, follow: DenseNet-BC-100 (k = 12, activation = gelu).
    """
    model, arch = config["model"], str(config["arguments"].get("arch"))
    depth = model.get("depth")
    letters = ("B" if model.get("bottleneck") else "") + ("" if model.get("reduction") == 1 else "C")
    name = f"{letters}-{depth}".strip("-") if depth else arch.removeprefix("densenet")
    own = {key: value for key, value in model.items() if key not in NETWORK and value}
    settings = ", ".join(f"{key} = {value}" for key, value in ({"k": model.get("growth_rate")} | own).items())
    return f"DenseNet-{name} ({settings})"


def dataset_name(arguments):
    """The data set that a run's arguments name; an image folder has the name of its directory."""
    name = str(arguments.get("dataset"))
    return Path(str(arguments.get("data"))).name if name == "folder" else DATASETS.get(name, name)


def read_log(directory):
    """The Log of a run directory. Raises Mistake if it has none, or no row yet."""
    directory = Path(directory)
    if not directory.is_dir():
        raise Mistake(f"{directory} is not a run directory")
    found = {split: read_table(directory / f"{split}.csv", names=COLUMNS) for split in LOGS}
    tables = {split: table for split, table in found.items() if table is not None}
    tables = tables or read_results(directory / "results.csv")
    if not tables:
        raise Mistake(f"{directory} has no log with a row: train.csv, test.csv or results.csv")
    tables = {split: check(table, f"{directory}, {split}") for split, table in tables.items()}
    train, fine = tables.get("train"), None
    if train is not None and not (whole := train.epoch % 1 == 0).all():
        if "lr" not in train:  # of bamos: a row per iteration; epoch 2.0 begins the third epoch
            means = train.groupby(train.epoch.floordiv(1) + 1)[["loss", "error"]].mean()
            fine, tables["train"] = train, means.reset_index(names="epoch")
        elif whole.any():
            fine, tables["train"] = train[~whole], train[whole]
    return Log(directory, tables, fine, read_config(directory))


def read_results(path):
    """The tables of gpleiss/efficient_densenet_pytorch: errors are fractions, the last row holds the test error alone.

    Empty where the file is missing or has no row.
    """
    needed = [f"{split}_{quantity}" for split in ("train", "valid") for quantity in ("loss", "error")]
    results = read_table(path, needed=("epoch", *needed))
    if results is None:
        return {}
    tables = {}
    for split in ("train", "valid"):
        table = results[["epoch", f"{split}_loss", f"{split}_error"]].set_axis(COLUMNS, axis=1).dropna()
        tables[split] = table.assign(error=100 * table.error)
    if "test_error" in results:
        error = results.test_error.dropna().tail(1)
        tables["test"] = pd.DataFrame({"epoch": results.epoch.max(), "loss": np.nan, "error": 100 * error})
    return {split: table for split, table in tables.items() if len(table)}


def read_table(path, needed=COLUMNS, names=None):
    """The columns ``needed`` of a CSV file, and of OPTIONAL those that it has, as numbers; an empty cell is NaN.

    ``names`` are the columns of a file that has no header. A last line without its newline counts if it is whole. None
    where the file is missing or has no row. Raises Mistake if it is no such file.
    """
    if not path.exists():
        return None
    try:
        lines = readable(path).read_text(encoding="utf-8-sig").split("\n")  # spreadsheets write a byte-order mark
        if lines[-1] and (lines[-1].count(",") < lines[0].count(",") or not lines[-1][-1].isdigit()):
            lines.pop()  # a row that is being written
        if not any(lines):
            return None
        header = {"header": None, "names": names} if names and "epoch" not in lines[0] else {}
        table = pd.read_csv(io.StringIO("\n".join(lines)), dtype=object, skipinitialspace=True, **header)
        if not isinstance(table.index, pd.RangeIndex):  # what pandas makes of more cells than names
            raise ValueError("the first row has more cells than there are columns")
        if missing := [name for name in needed if name not in table]:
            raise ValueError(f"it has no column {missing[0]}")
        wanted = dict.fromkeys(name for name in (*needed, *OPTIONAL) if name in table)
        # By Python's float: the rounding of read_csv's own differs between releases.
        table = table.dropna(how="all")[[*wanted]].astype(float)
    except ValueError as error:  # of decoding, too
        raise Mistake(f"{path} is not a log: {str(error).strip()}") from error
    return table if len(table) else None


def check(table, name):
    """The table by epoch; where a resumed run has logged one twice, the last row counts. An infinite loss is a gap.

    Raises Mistake if a number cannot be one of a log.
    """
    for values, high in ((table.epoch, 1e6), (table.error.dropna(), 100)):
        for value in values[~values.between(0, high)]:
            raise Mistake(f"{name}: a damaged log: {values.name} {value:g} is not in 0 … {high:g}")
    table = table.assign(loss=table.loss.where(table.loss.abs() < 1e100))
    return table.drop_duplicates("epoch", keep="last").sort_values("epoch", ignore_index=True)


def mean_log(logs, unlike=False):
    """The mean of several runs as a Log, over the epochs that all of them have.

    Raises Mistake if they differ in more than their seed, their epochs included; ``unlike`` allows that.
    """
    names = ", ".join(str(log.path) for log in logs)
    if len({log.path.resolve() for log in logs}) < max(2, len(logs)):
        raise Mistake(f"--mean {names}: needs two runs or more, each of them once")
    different = differences(logs)
    if different and not unlike:
        raise Mistake(f"--mean {names}: they differ in {', '.join(different)}: leave some out, or add --unlike")
    splits = [split for split in LOGS if all(split in log.tables for log in logs)]
    tables = {split: over_runs([log.tables[split] for log in logs])[0] for split in splits}
    tables = {split: table for split, table in tables.items() if len(table)}
    if not tables:
        raise Mistake(f"--mean {names}: they have no epochs in common")
    config = logs[0].config if len({log.title for log in logs}) == 1 else {}
    return Log(mean_path([log.path for log in logs]), tables, None, config, logs)


def over_runs(tables):
    """Mean and standard deviation of tables, by the epochs that all have; a loss that one lacks has neither."""
    epochs = pd.concat(tables, join="inner").groupby("epoch")
    known, common = epochs.count() == len(tables), epochs.size() == len(tables)
    return [table.where(known)[common].reset_index() for table in (epochs.mean(), epochs.std())]


def differences(logs):
    """In what runs differ beside their seed, the rows of their logs included: texts such as "depth (16, 40)"."""
    found = {name: list(dict.fromkeys(each)) for name, each in differing([recipe(log.config) for log in logs]).items()}
    for split in SPLITS:
        epochs = dict.fromkeys(tuple(log.tables[split].epoch) if split in log.tables else () for log in logs)
        found[f"epochs of {split}"] = [str(len(each)) for each in epochs]
    return [f"{name} ({', '.join(each)})" for name, each in found.items() if len(each) > 1]


def differing(recipes):
    """{name: its value in each, as text} of what is not the same in all of the dicts."""
    names = dict.fromkeys(itertools.chain(*recipes))
    values = {name: [str(recipe.get(name, "–")) for recipe in recipes] for name in names}
    return {name: each for name, each in values.items() if len(set(each)) > 1}


def recipe(config):
    """What a run's results depend on, but for its seed: arguments that are not off, and an image folder's name."""
    arguments = config.get("arguments", {})
    kept = {name: value for name, value in arguments.items() if name not in NOT_COMPARED and value}
    return kept | ({"data": dataset_name(arguments)} if arguments.get("dataset") == "folder" else {})


def leading(sequences):
    """The length of the prefix that all sequences share."""
    return sum(1 for _ in itertools.takewhile(lambda items: len(set(items)) == 1, zip(*sequences, strict=False)))


def mean_path(paths):
    """The common name of the paths of several seeds: a/sgd for a/sgd.1 and a/sgd.2, or for a/1/sgd and a/2/sgd."""
    columns = zip(*(Path(os.path.abspath(path)).parts for path in paths), strict=False)
    return Path(*(c[0] if len(set(c)) == 1 else SEED.sub("", c[0][: leading(c)]) for c in columns))
