"""Read the config.json of a run; convert what an older release wrote. Imports no torch."""

import json

from common.console import Mistake
from common.files import readable

# Arguments that early releases did not have, with the values that reproduce them.
ADDED = {
    **{"channels": 3, "white": None, "test_size": 0, "skip_unreadable": False, "cuda_graph": None},
    **{"init_from": None, "freeze": None, "head_lr": None, "recipe": None, "label_smoothing": 0.0, "cutout": 0},
    **{"mixup": 0.0, "warmup": 0.0, "ema": 0.0, "decay": "all", "accumulate": 1, "clip_grad": 0.0},
    **{"class_weights": None, "black": 0.0, "alpha": True, "flip": "horizontal", "shift": 4, "gamma": 0.1},
    **{"policy": None, "fold": None, "groups": None, "labels": None},
}


def stages(config):
    """Command, commit, hardware, … of a run's first process, and of each that resumed it."""
    return [config, *config["resumed"]]


def upgrade_config(config):
    """A run's config with all entries of this release. Raises KeyError or TypeError if another program wrote it."""
    config = {"resumed": [], **config, "arguments": ADDED | config["arguments"]}
    config["model"] = {"in_channels": 3, **config["model"]}
    config["resumed"] = [{"cuda_graph": False, **stage} for stage in config["resumed"]]
    return {"cuda_graph": False} | config


def read_config(directory):
    """The config.json of a run; {} if there is none, or another program wrote it. Raises Mistake if it is damaged."""
    path = readable(directory / "config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise Mistake(f"{path} is damaged ({type(error).__name__}): restore a copy, or move it away") from error
    try:
        return upgrade_config(config)
    except (KeyError, TypeError):
        return {}
