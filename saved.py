"""Whether what a checkpoint or a config.json says can be true: it may come from anywhere, altered by anyone.

What an earlier release did not write is no damage: an entry may be missing, but for those that every command needs.
"""

import argparse
import json
from pathlib import Path

import torch

from arguments import make_parser, model_options, resolve_defaults
from cli import Mistake, memory_problem
from densenet import ARCHITECTURES, BLOCKS, DenseNet
from device import PRECISIONS

NEEDED = ("dataset", "data", "image_size", "batch_size", "epochs", "limit_train", "limit_test", "valid_size", "seed")
LOGGED, COSTS = {"epoch", "loss", "error"}, {"lr", "images_per_second", "peak_memory_mib"}
ANEW = ("save", "resume", "overwrite", "progress")  # arguments that are not taken from a checkpoint


def is_number(value, low=-1e30, high=1e30, kinds=(int, float)):
    return type(value) in kinds and low <= value <= high  # which NaN is not, nor True


def is_count(value, low=0, high=10**9):
    return is_number(value, low, high, kinds=(int,))


def is_text(value):
    return type(value) is str and len(value) < 10_000 and "\0" not in value


STAGE = {  # what a process notes of itself in a config
    "command": is_text,
    "commit": lambda value: value is None or is_text(value),
    "device": is_text,
    "precision": lambda value: value in PRECISIONS,
    "block": lambda value: value in BLOCKS,
}


def stages(config):
    """Command, commit, hardware, … of a run's first process, and of each that resumed it."""
    return [config, *config["resumed"]]


def check_checkpoint(checkpoint):
    """Raises Mistake where an entry of a checkpoint cannot be one."""
    check_config(checkpoint["config"], "epoch" in checkpoint)
    for name, fits in CHECKS.items():
        if name in checkpoint and not holds(fits, checkpoint):
            raise Mistake(f"its entry {name!r} is damaged, or of another program")


def holds(fits, *args):
    try:
        return fits(*args)
    except Exception as error:  # nearly anything, where a value is of another type than is expected
        if memory_problem(error):
            raise
        return False


def check_config(config, of_run=True):
    """Raises Mistake where the config of a checkpoint cannot be one; without ``of_run``, of one that never trained."""
    if not holds(is_config, config, of_run):
        raise Mistake("its config is damaged, or of another program")
    check_arguments(config["arguments"])


def is_config(config, of_run):
    json.dumps(config)  # raises where it cannot be written as JSON
    ours = isinstance(config["arguments"], dict) and isinstance(config["model"], dict)
    if not of_run:
        return ours
    fits = all(STAGE[name](each[name]) for each in stages(config) for name in STAGE)
    return ours and is_count(config["parameters"]) and fits


def check_arguments(arguments):
    """Raises Mistake where a saved argument is none that the flags of train.py can give."""
    defaults = defaults_of(arguments)
    for action in make_parser()._actions:
        name = action.dest
        if name not in arguments or name in ANEW or (arguments[name] is None and defaults[name] is None):
            continue
        if not holds(can_give, action, arguments[name]):
            raise Mistake(f"its argument {name} is damaged, or of another program: {str(arguments[name])[:50]}")
    if missing := [name for name in NEEDED if name not in arguments]:
        raise Mistake(f"its argument {missing[0]} is missing")


def defaults_of(arguments):
    arch = arguments.get("arch")
    given = {"arch": arch} if type(arch) is str and arch in ARCHITECTURES else {}
    return resolve_defaults(vars(make_parser().parse_args([])), given)


def can_give(action, value):
    """Whether a value is one that a flag, an action of the parser, can give."""
    if action.nargs == 0:  # a switch
        return type(value) is bool
    known = is_text(value) or is_number(value)
    return known and (action.type or str)(str(value)) == value and (not action.choices or value in action.choices)


# Of each entry, whether it fits the others. What they raise counts as no.


def fits_classes(checkpoint):
    classes = checkpoint["classes"]
    return type(classes) is list and all(map(is_text, classes)) and len(set(classes)) == len(classes) > 0


def fits_model(checkpoint):
    """The network is the one that the arguments describe, computes on their images, and has weights of its shapes."""
    arguments, model = checkpoint["config"]["arguments"], checkpoint["config"]["model"]
    arguments = argparse.Namespace(**defaults_of(arguments) | arguments)
    described = model_options(arguments, len(checkpoint["classes"]))
    for name, value in model.items():
        if json.dumps(value) != json.dumps(described[name]):  # JSON, as in an exported file, has no tuples
            return False
    shape = 2, arguments.channels, arguments.image_size, arguments.image_size
    if isinstance(checkpoint["model"], torch.nn.Module):  # of another program, which has to be asked
        return checkpoint["model"](torch.zeros(shape)).shape == (2, len(checkpoint["classes"]))
    with torch.device("meta"):
        network = DenseNet(**model)
        network(torch.empty(shape))
    weights = {name.removeprefix("module."): value for name, value in checkpoint["model"].items()}
    expected = network.state_dict()
    return weights.keys() == expected.keys() and all(alike(weights[name], expected[name]) for name in expected)


def alike(one, other):
    return (one.shape, one.dtype, one.layout) == (other.shape, other.dtype, other.layout)


def fits_normalize(checkpoint):
    channels = checkpoint["config"]["arguments"].get("channels", 3)
    for mean, std in (checkpoint["normalize"], checkpoint.get("measured", checkpoint["normalize"])):
        numbers = all(is_number(value, -1e6, 1e6) for value in (*mean, *std))
        if not (numbers and len(mean) == len(std) == channels and min(std) > 1e-6):
            return False
    return True


def fits_ema(checkpoint):
    """Averaged weights, of the same shapes, with a log of their own where there are logs."""
    ema, logs = checkpoint["ema"], checkpoint.get("metrics", {"test-ema"})
    return is_count(ema["updates"]) and "test-ema" in logs and fits_model(checkpoint | {"model": ema["model"]})


def fits_epoch(checkpoint):
    return is_count(checkpoint["epoch"], 0, checkpoint["config"]["arguments"]["epochs"])


def fits_seconds(checkpoint):
    return is_number(checkpoint["seconds"], 0, 1e12)


def fits_metrics(checkpoint):
    """Every log has its rows, those within an epoch aside one per epoch."""
    metrics, epochs = checkpoint["metrics"], list(range(1, checkpoint["epoch"] + 1))
    for name, rows in metrics.items():
        most = LOGGED | COSTS if name == "train" else LOGGED
        if not all(LOGGED <= row.keys() <= most and all(map(is_number, row.values())) for row in rows):
            return False
        if [row["epoch"] for row in rows if row["epoch"] % 1 == 0] != epochs:
            return False
    return {"train", "test"} <= metrics.keys()


def fits_layout(checkpoint):
    layout, classes = checkpoint["layout"], checkpoint["classes"]
    folders, files, prints = layout["folders"], layout["test_files"], layout.get("fingerprints", {})
    below = all(Path(name).relative_to(folders["train"]).parts[0] in classes for name in files)
    texts = all(map(is_text, (*folders.values(), *files, *prints.keys(), *prints.values())))
    splits = {"train"} | (set() if files else {"test"})
    return below and texts and splits <= folders.keys() and checkpoint["config"]["arguments"]["dataset"] == "folder"


def fits_scaler(checkpoint):
    scaler = checkpoint["scaler"]
    known = torch.amp.GradScaler("cpu").state_dict().keys()
    return scaler == {} or (scaler.keys() == known and all(is_number(value, 0) for value in scaler.values()))


def fits_test(checkpoint):
    test = checkpoint["test"]
    counts = all(is_count(test[name]) for name in ("images", "sample", "wrong_in_sample"))
    return counts and test["images"] > 0 and is_number(test["error"], 0, 100)


CHECKS = {
    "classes": fits_classes,
    "model": fits_model,
    "ema": fits_ema,
    "averaged": lambda checkpoint: type(checkpoint["averaged"]) is bool,
    "normalize": fits_normalize,
    "epoch": fits_epoch,
    "seconds": fits_seconds,
    "metrics": fits_metrics,
    "layout": fits_layout,
    "scaler": fits_scaler,
    "test": fits_test,
}
