"""Checkpoints: dicts of plain values and tensors, written whole, verified when they are read.

All commands read them here. What an older release wrote is converted, so nothing else has to know older releases.
"""

import errno
import hashlib
import io
import json
import pickle
import textwrap
import zipfile

import torch

from common.config import upgrade_config
from common.console import Mistake, memory_problem
from common.files import readable, written_whole

# Of runs that are older than manifests.
FIRST_MANIFEST = {"folders": {"train": "train", "test": "test"}, "test_files": []}


class Lost(Mistake):
    """A checkpoint is missing or damaged: an older one may do."""


def write_checkpoint(path, checkpoint, previous=None):
    """Replace ``path`` in one step; with ``previous``, its old content takes that name. Raises OSError."""
    buffer = io.BytesIO()  # in memory first: on a full disk torch.save raises no OSError
    torch.save(checkpoint | {"digest": digest(checkpoint)}, buffer)
    with written_whole(path, previous=previous) as file:
        file.write(buffer.getbuffer())


def digest(checkpoint):
    """A hash of all but the numbers in tensors, which shows if a checkpoint was edited by hand."""
    plain = json.dumps(checkpoint, default=lambda tensor: [str(tensor.dtype), tensor.is_meta, *tensor.shape])
    return hashlib.sha256(plain.encode()).hexdigest()


def load_file(path):
    """Load a file of torch.save, of plain values and tensors. Raises Lost if it is missing or damaged, else Mistake."""
    try:
        with open(readable(path), "rb") as file:
            whole = zipfile.is_zipfile(file)  # not if torch before 1.6 wrote it, or it was cut short
            if whole and (damaged := zipfile.ZipFile(file).testzip()):  # torch.load compares no checksum
                raise Lost(f"{path} is damaged ({damaged} has another checksum): restore a copy")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise Lost(f"{path} is not a checkpoint file, such as latest.pth in a run: {error.strerror}") from None
    except Exception as error:  # zipfile and torch raise nearly anything for a damaged file, EINVAL if it is cut
        if isinstance(error, Mistake) or memory_problem(error):
            raise
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise Mistake(f"{path} cannot be read: {error.strerror or error}") from error
        problem = Mistake if isinstance(error, pickle.UnpicklingError) and whole else Lost
        raise problem(f"{path} is damaged, or holds other things than weights ({type(error).__name__})") from error


def read_checkpoint(path):
    """A run's checkpoint, its tensors on the CPU. Raises Lost if it is missing or damaged, else Mistake."""
    return upgrade(load_file(path), path)


def upgrade(checkpoint, path):
    """A checkpoint with all entries of this release. Raises Mistake if it was edited, or another program wrote it."""
    try:
        written = checkpoint.pop("digest", None)  # older releases and exported files have none
        if written is not None and written != digest(checkpoint):
            raise ValueError("edited by hand: delete its entry digest to use it as it is")
        config = upgrade_config(checkpoint["config"])
        weights = {name.removeprefix("module."): value for name, value in checkpoint["model"].items()}
        first = FIRST_MANIFEST if config["arguments"]["dataset"] == "folder" else None
        older = {"manifest": checkpoint.get("layout", first), "measured": checkpoint["normalize"], "averaged": False}
        checkpoint = older | checkpoint | {"config": config, "model": weights, "classes": [*checkpoint["classes"]]}
        statistics = torch.tensor([checkpoint["normalize"], checkpoint["measured"]])  # (2, mean and std, channels)
        sizes = (len(checkpoint["classes"]), *statistics.shape[1:])
        if sizes != (config["model"]["num_classes"], 2, config["model"]["in_channels"]):
            raise ValueError("its classes, or means and standard deviations, are not those of its network")
    except Exception as error:  # of nearly any type, if a value has another type
        if memory_problem(error):
            raise
        raise Mistake(f"{path} is not a checkpoint of train.py ({type(error).__name__}: {error})") from error
    return checkpoint


def load_weights(module, weights):
    """Load a state dict whose names and shapes have to fit. Raises Mistake."""
    try:
        module.load_state_dict(weights)
    except (TypeError, AttributeError, RuntimeError) as error:
        if memory_problem(error):
            raise
        reason = textwrap.shorten(str(error).strip().splitlines()[-1], 100, placeholder=" …")
        instead = "build the network of its config, as inference.load_model does"
        raise Mistake(f"the checkpoint's weights do not fit its network ({reason}): {instead}") from error
