"""Networks and published weights for other projects, through torch.hub: a clone or its address will do.

    import torch
    network = torch.hub.load("CLONE", "run", "digits.bc16", source="local")     # a run that work/ publishes
    images = torch.stack([network.preprocess("seven.png")])                     # (1, 3, 32, 32)
    print(network.classes[network(images).argmax()])
    network = torch.hub.load("CLONE", "densenet_bc_100_12", source="local", num_classes=100)  # with random weights

torch.hub would import modules of this repository as ``data`` or ``cli``: names that a project may well use for its own,
which then would get ours, or we would get theirs. So they are imported as parts of a package that is named after this
directory. Their import statements, those within functions too, call the ``__import__`` of their own ``__builtins__``,
which is ``_import`` below and finds modules of this repository there.
"""

import builtins
import functools
import importlib.util
import os
import pathlib
import sys
import types
import zlib

import torch

dependencies = ["torch", "numpy", "PIL", "filelock", "psutil", "tqdm"]

_ROOT = pathlib.Path(__file__).resolve().parent
_PACKAGE = f"hub_{zlib.crc32(os.fsencode(_ROOT)):08x}"


def _path(name):
    """Where this repository has the module of that name; it may not exist."""
    path = _ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"


def _module(name):
    """A module of this repository, "fused.loops" say, imported once as a part of _PACKAGE."""
    full_name = f"{_PACKAGE}.{name}"
    if full_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(full_name, _path(name))
        module = sys.modules[full_name] = importlib.util.module_from_spec(spec)
        module.__builtins__ = vars(builtins) | {"__import__": _import}
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[full_name]
            raise
    return sys.modules[full_name]


def _import(name, globals=None, locals=None, fromlist=(), level=0):
    """``__import__`` for modules of this repository."""
    first = name.partition(".")[0]
    if level or not _path(first).exists():
        return __import__(name, globals, locals, fromlist, level)
    module = _module(name)
    for part in fromlist or ():
        if not hasattr(module, part) and _path(f"{name}.{part}").exists():
            setattr(module, part, _module(f"{name}.{part}"))
    return module if fromlist else _module(first)


sys.modules.setdefault(_PACKAGE, types.ModuleType(_PACKAGE))


class _Preprocess:
    """An image, opened by Pillow or a path, → (C, S, S) float32: read and normalised as evaluate.py does it."""

    def __init__(self, arguments, normalize):
        self.arguments, self.normalize = arguments, normalize

    def __call__(self, image):
        return _module("inference").preprocess(image, self.arguments, self.normalize)

    def __reduce__(self):
        """As a DataLoader's workers get it, which do not know this module."""
        load = functools.partial(torch.hub.load, source="local")
        return load, (str(_ROOT), "_Preprocess", self.arguments, self.normalize)


def run(name):
    """The network of a run that work/ publishes, such as "digits.bc16", in evaluation mode.

    With it come ``classes``, their names, and ``preprocess``: an image, opened by Pillow or the path of its file →
    (C, S, S) float32, read as evaluate.py reads it. That decodes large JPEG files at a reduced size: an image that has
    been decoded before gives slightly other values.
    """
    path = _ROOT / "work" / name / "weights.pth"
    if not path.exists():
        found = (path.parent.relative_to(_ROOT / "work").as_posix() for path in _ROOT.glob("work/**/weights.pth"))
        raise ValueError(f"work/ publishes no run {name!r}, but {', '.join(sorted(found))}")
    checkpoint = _module("workdir").read_checkpoint(path)
    model = _module("inference").load_model(checkpoint)
    model.classes = checkpoint["classes"]
    model.preprocess = _Preprocess(checkpoint["config"]["arguments"], checkpoint["normalize"])
    return model


def _architecture(name, options):
    def make(**given):
        return _module("densenet").DenseNet(**options | given)

    make.__doc__ = f"""{name} with random weights, for {options["num_classes"]} classes. Options are those of DenseNet:

    num_classes, in_channels, drop_rate, block ("naive", "checkpoint" or "fused") and what else its docstring lists.
    """
    return make


for _name, _options in _module("densenet").ARCHITECTURES.items():
    _classes = 1000 if _options.get("stem") == "imagenet" else 10
    globals()[_name] = _architecture(_name, _options | {"num_classes": _classes})
