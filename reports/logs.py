"""Reads the logs of runs as tables, and averages runs that differ in their seed. Imports no torch.

The runs are those of train.py and of bamos/densenet.pytorch (train.csv, test.csv without header).
"""

import io
import itertools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from common.config import read_config
from common.console import Mistake
from common.files import readable

SPLITS = ("train", "valid", "test")
LOGS = (*SPLITS, "test-ema")  # of the averaged weights, which are not drawn
COLUMNS = ("epoch", "loss", "error")
OPTIONAL = ("lr", "images_per_second")
DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN"}
# Arguments in which runs of one mean may differ: the seed, and what changes at most the rounding. Data sets are
# compared by their names, not by their directories.
NOT_COMPARED = {
    *("seed", "data", "workers", "block", "device", "precision", "compile", "cuda_graph", "deterministic"),
    *("save", "resume", "overwrite", "log_every", "keep_every", "tensorboard", "plot", "progress"),
    "recipe",  # a name for other arguments
}
# The arguments of DenseNet that the paper has, or that the data and the name of the network imply.
NETWORK = {
    *("depth", "growth_rate", "reduction", "bottleneck", "drop_rate", "init_channels"),
    *("num_classes", "in_channels", "block_config", "stem"),
}
SEED = re.compile(r"([.\-_ ]*seed)?[.\-_ ]*\d*$")  # at the end of the prefix that the names of several seeds share


@dataclass
class Log:
    """The logs of one run, or their mean over several runs.

    ``tables``: split → table with the columns epoch, loss, error (percent) and, if known, those of OPTIONAL. ``fine``
    holds rows within epochs; ``tables["train"]`` then holds the epochs' averages. ``config`` is the run's config.json,
    empty if another program wrote the logs. ``members`` are the Logs that were averaged, if any.
    """

    path: Path
    tables: dict
    fine: pd.DataFrame | None = None
    config: dict = field(default_factory=dict)
    members: list = field(default_factory=list)

    @property
    def headline(self):
        """The split whose error is reported."""
        return next(split for split in ("test", "valid", "train") if split in self.tables)

    @property
    def title(self):
        return title_of(self.config) if self.config else ""

    def deviations(self, split, change=lambda table: table):
        """Standard deviations over the members, after a ``change`` of each member's table."""
        return over_runs([change(log.tables[split]) for log in self.members])[1]


def title_of(config):
    """Network and data of a run, and the number of training images if not all."""
    limit = config["arguments"].get("limit_train")
    part = f", {limit:,} training images" if isinstance(limit, int) else ""
    return f"{network_name(config)}, {dataset_name(config['arguments'])}{part}"


def network_name(config):
    """As in the paper: DenseNet-BC-100 (k = 12), or DenseNet-121 (k = 32) for ImageNet.

    Arguments that the paper's DenseNet lacks follow if they are on: DenseNet-BC-100 (k = 12, activation = gelu).
    """
    model, arch = config["model"], str(config["arguments"].get("arch"))
    depth = model.get("depth")
    letters = ("B" if model.get("bottleneck") else "") + ("" if model.get("reduction") == 1 else "C")
    name = f"{letters}-{depth}".strip("-") if depth else arch.removeprefix("densenet")
    own = {key: value for key, value in model.items() if key not in NETWORK and value}
    settings = ", ".join(f"{key} = {value}" for key, value in ({"k": model.get("growth_rate")} | own).items())
    return f"DenseNet-{name} ({settings})"


def dataset_name(arguments):
    """The name of a run's data set; for an image folder, that of its directory."""
    name = str(arguments.get("dataset"))
    return Path(str(arguments.get("data"))).name if name == "folder" else DATASETS.get(name, name)


def read_log(directory):
    """The Log of a run directory. Raises Mistake if it has no logs, or none with a row."""
    directory = Path(directory)
    tables = {split: read_table(directory / f"{split}.csv") for split in LOGS}
    tables = {split: table for split, table in tables.items() if table is not None}
    if not tables:
        raise Mistake(f"{directory} has no log with a row: train.csv or test.csv")
    train, fine = tables.get("train"), None
    if train is not None and not (whole := train.epoch % 1 == 0).all():
        if "lr" not in train:  # of bamos: a row per iteration; epoch 2.0 begins the third epoch
            means = train.groupby(train.epoch.floordiv(1) + 1)[["loss", "error"]].mean()
            fine, tables["train"] = train, means.reset_index(names="epoch")
        elif whole.any():
            fine, tables["train"] = train[~whole], train[whole]
    return Log(directory, tables, fine, read_config(directory))


def read_table(path):
    """A log by epoch: its COLUMNS, and those of OPTIONAL that it has, as numbers. None if it is missing or has no row.

    A file without a header has COLUMNS alone. A last line without its newline counts if it is whole. If a resumed run
    logged an epoch twice, the last row counts. Empty cells and infinite losses are NaN. Raises Mistake if the file is
    not a log, or an epoch or an error is out of range.
    """
    if not path.exists():
        return None
    try:
        lines = readable(path).read_text(encoding="utf-8-sig").split("\n")  # spreadsheets write a byte-order mark
        if lines[-1] and (lines[-1].count(",") < lines[0].count(",") or not lines[-1][-1].isdigit()):
            lines.pop()  # a row that is being written
        if not any(lines):
            return None
        header = {} if "epoch" in lines[0] else {"header": None, "names": COLUMNS}
        table = pd.read_csv(io.StringIO("\n".join(lines)), dtype=object, skipinitialspace=True, **header)
        if not isinstance(table.index, pd.RangeIndex):  # what pandas makes of more cells than names
            raise ValueError("the first row has more cells than there are columns")
        if missing := [name for name in COLUMNS if name not in table]:
            raise ValueError(f"it has no column {missing[0]}")
        # Python's float converts: the rounding of read_csv's own differs between releases.
        table = table.dropna(how="all")[[name for name in (*COLUMNS, *OPTIONAL) if name in table]].astype(float)
    except ValueError as error:  # of decoding, too
        raise Mistake(f"{path} is not a log: {str(error).strip()}") from error
    for values, high in ((table.epoch, 1e6), (table.error.dropna(), 100)):
        for value in values[~values.between(0, high)]:
            raise Mistake(f"{path}: a damaged log: {values.name} {value:g} is not in 0 … {high:g}")
    table = table.assign(loss=table.loss.where(table.loss.abs() < 1e100))
    table = table.drop_duplicates("epoch", keep="last").sort_values("epoch", ignore_index=True)
    return table if len(table) else None


def mean_log(logs, unlike=False):
    """The mean of several runs as a Log, over the epochs that all of them have.

    Raises Mistake if they differ in more than their seed, such as in their epochs, unless ``unlike``.
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
    """Mean and standard deviation of tables, over the epochs that all have; NaN if one of them lacks the value."""
    epochs = pd.concat(tables, join="inner").groupby("epoch")
    known, common = epochs.count() == len(tables), epochs.size() == len(tables)
    return [table.where(known)[common].reset_index() for table in (epochs.mean(), epochs.std())]


def differences(logs):
    """The arguments other than the seed, and the epochs, that differ: texts such as "depth (16, 40)"."""
    values = {name: dict.fromkeys(each) for name, each in differing([recipe(log.config) for log in logs]).items()}
    for split in SPLITS:
        epochs = dict.fromkeys(tuple(log.tables[split].epoch) if split in log.tables else () for log in logs)
        if len(epochs) > 1:
            values[f"epochs of {split}"] = [str(len(each)) for each in epochs]
    return [f"{name} ({', '.join(each)})" for name, each in values.items()]


def differing(recipes):
    """{name: its value in each dict, as text} of the values that are not the same in all dicts."""
    names = dict.fromkeys(itertools.chain(*recipes))
    values = {name: [str(recipe.get(name, "–")) for recipe in recipes] for name in names}
    return {name: each for name, each in values.items() if len(set(each)) > 1}


def recipe(config):
    """The arguments that a run's results depend on, other than the seed, if they are on; an image folder by name."""
    arguments = config.get("arguments", {})
    kept = {name: value for name, value in arguments.items() if name not in NOT_COMPARED and value}
    if "fold" in kept:  # I/K: a mean over all K is what they are for
        kept["folds"] = kept.pop("fold").partition("/")[2]
    return kept | ({"data": dataset_name(arguments)} if arguments.get("dataset") == "folder" else {})


def leading(sequences):
    """The length of the prefix that all sequences share."""
    return sum(1 for _ in itertools.takewhile(lambda items: len(set(items)) == 1, zip(*sequences, strict=False)))


def mean_path(paths):
    """The common name of the paths of several seeds: a/sgd for a/sgd.1 and a/sgd.2, or for a/1/sgd and a/2/sgd."""
    columns = zip(*(Path(os.path.abspath(path)).parts for path in paths), strict=False)
    return Path(*(c[0] if len(set(c)) == 1 else SEED.sub("", c[0][: leading(c)]) for c in columns))
