"""Checkpoints: dicts of plain values and tensors, written whole, read with their checksums compared.

A file that was cut short or altered by a disk is found here, once for all commands. What an older release wrote is
brought up to date here, too, so that nothing else has to know about older releases.
"""

import errno
import io
import json
import pickle
import zipfile

import torch

from common.config import stages, upgrade_config
from common.console import Mistake, memory_problem
from common.files import readable, written_whole
from common.hardware import PRECISIONS

# Of runs that are older than manifests: what else a folder held was not looked at.
FIRST_MANIFEST = {"folders": {"train": "train", "test": "test"}, "test_files": []}


class Lost(Mistake):
    """A checkpoint is missing, or not what was written: an older one may do."""


def write_checkpoint(path, checkpoint, previous=None):
    """Replace ``path`` in one step; with ``previous``, its old content takes that name. Raises OSError."""
    buffer = io.BytesIO()  # in memory first: a full disk is to be an OSError, which torch.save does not raise
    torch.save(checkpoint, buffer)
    with written_whole(path, previous=previous) as file:
        file.write(buffer.getbuffer())


def load_file(path, device="cpu"):
    """What ``torch.save`` wrote, of plain values and tensors. Raises Lost if it is missing or damaged, else Mistake."""
    try:
        with open(readable(path), "rb") as file:
            whole = zipfile.is_zipfile(file)  # not so files of torch before 1.6, or what was cut short
            if whole and (damaged := zipfile.ZipFile(file).testzip()):  # torch.load compares no checksum
                raise Lost(f"{path} is damaged ({damaged} has another checksum): restore a copy")
            file.seek(0)
            return torch.load(file, map_location=device, weights_only=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise Lost(f"{path} is not a checkpoint file, such as latest.pth in a run: {error.strerror}") from None
    except Exception as error:  # a damaged file makes zipfile and torch raise nearly anything, EINVAL where it is cut
        if isinstance(error, Mistake) or memory_problem(error):
            raise
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise Mistake(f"{path} cannot be read: {error.strerror or error}") from error
        kind = Mistake if isinstance(error, pickle.UnpicklingError) and whole else Lost
        raise kind(f"{path} is damaged, or holds other things than weights ({type(error).__name__})") from error


def read_checkpoint(path, device="cpu"):
    """A run's checkpoint, tensors on ``device``. Raises Lost if it is missing or damaged, else Mistake."""
    return upgrade(load_file(path, device), path)


def upgrade(checkpoint, path):
    """A checkpoint with all that later releases write. Raises Mistake if another program wrote it, or a hand."""
    try:
        config = upgrade_config(checkpoint["config"])
        weights = {name.removeprefix("module."): value for name, value in checkpoint["model"].items()}
        first = FIRST_MANIFEST if config["arguments"]["dataset"] == "folder" else None
        older = {"manifest": checkpoint.get("layout", first), "measured": checkpoint["normalize"], "averaged": False}
        checkpoint = older | checkpoint | {"config": config, "model": weights, "classes": [*checkpoint["classes"]]}
        if not could_be(checkpoint):
            raise ValueError("edited by hand")
    except Exception as error:  # of nearly any kind, where a value has another type
        if memory_problem(error):
            raise
        raise Mistake(f"{path} is not a checkpoint of train.py ({type(error).__name__}: {error})") from error
    return checkpoint


def could_be(checkpoint):
    """True if a run can have written the small entries. Weights, optimiser and arguments are checked where they go.

    Raises nearly anything where a value has another type.
    """
    config, classes, manifest = (checkpoint[name] for name in ("config", "classes", "manifest"))
    statistics = torch.tensor([checkpoint["normalize"], checkpoint["measured"]])  # (2, mean and std, channels)
    texts = [*classes, *(stage.get(name) or "" for stage in stages(config) for name in ("command", "commit", "device"))]
    ema = checkpoint.get("ema", {"updates": 0, "model": {}})
    numbers = [checkpoint.get("seconds", 0), config.get("parameters", 0), ema["updates"], len(ema["model"].keys())]
    numbers += (checkpoint.get("scaler") or {}).values()
    epochs = list(range(1, 1 + min(checkpoint.get("epoch", 0), 10**6)))
    for rows in checkpoint.get("metrics", {}).values():
        numbers += [row[name] for row in rows for name in {"epoch", "loss", "error"} | row.keys()]
        if [row["epoch"] for row in rows if row["epoch"] % 1 == 0] != epochs:
            return False
    return (
        "\\u0000" not in json.dumps([config, classes, manifest])  # of which no config.json can be written
        and all(isinstance(text, str) for text in texts)
        and len({*classes}) == config["model"]["num_classes"]
        and (manifest is None or {"folders", "test_files"} <= manifest.keys())
        and statistics.shape == (2, 2, config["model"]["in_channels"])
        and bool(statistics.isfinite().all() and (statistics[:, 1] > 0).all())
        and all(0 <= number < 1e30 for number in numbers)
        and all({"command", "commit", "device"} <= stage.keys() for stage in stages(config) if "epoch" in checkpoint)
        and all(stage.get("precision") in PRECISIONS for stage in stages(config) if "epoch" in checkpoint)
    )


def load_weights(module, weights):
    """Load a state dict that has to fit: names, shapes and types. Raises Mistake."""
    try:
        for name, value in module.state_dict().items():
            if weights[name].dtype != value.dtype:
                raise TypeError(f"{name} is {weights[name].dtype}, not {value.dtype}")
        module.load_state_dict(weights)
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        if memory_problem(error):
            raise
        reason = str(error).strip().splitlines()[-1].strip()
        raise Mistake(f"the checkpoint's weights do not fit its network ({reason})") from error
