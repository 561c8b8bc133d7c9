"""Networks and published weights for other projects, through torch.hub: a clone or its address will do.

    import torch
    network = torch.hub.load("CLONE", "run", "digits.bc16", source="local")     # a run that work/ publishes
    images = torch.stack([network.preprocess("seven.png")])                     # (1, 3, 32, 32)
    print(network.classes[network(images).argmax()])
    network = torch.hub.load("CLONE", "densenet_bc_100_12", source="local", num_classes=100)  # with random weights

The modules of this repository are imported as parts of a package of their own, named after this directory: a project
may have modules that are called ``inputs`` or ``training``, too.
"""

import ast
import functools
import importlib.machinery
import os
import pathlib
import sys
import types
import zlib

import torch

dependencies = ["torch", "numpy", "PIL", "filelock", "psutil", "tqdm"]

_ROOT = pathlib.Path(__file__).resolve().parent
_PACKAGE = f"hub_{zlib.crc32(os.fsencode(_ROOT)):08x}"


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module whose imports from this repository are from ``_PACKAGE``, those within functions included."""

    def path_stats(self, path):
        raise OSError  # bytecode is neither read nor written: it is shared with the module under its plain name

    def source_to_code(self, data, path, **options):
        return super().source_to_code(ast.fix_missing_locations(_Renamed().visit(ast.parse(data))), path, **options)


class _Renamed(ast.NodeTransformer):
    def visit_Import(self, node):  # "import fused" → "from _PACKAGE import fused"
        ours = [name for name in node.names if _is_ours(name.name)]
        return ast.ImportFrom(_PACKAGE, ours, 0) if ours else node

    def visit_ImportFrom(self, node):
        node.module = f"{_PACKAGE}.{node.module}" if _is_ours(node.module) else node.module
        return node


def _is_ours(name):
    path = _ROOT / name.partition(".")[0]
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.startswith(f"{_PACKAGE}."):
            return importlib.machinery.FileFinder(path[0], (_Loader, [".py"])).find_spec(name)


def _module(name):
    """A module of this repository, "fused.loops" say."""
    return importlib.import_module(f"{_PACKAGE}.{name}")


if _PACKAGE not in sys.modules:  # torch.hub runs this file anew for every call
    sys.modules[_PACKAGE] = types.ModuleType(_PACKAGE)
    sys.modules[_PACKAGE].__path__ = [str(_ROOT)]
    sys.meta_path.insert(0, _Finder)


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
    checkpoint = _module("common.checkpoints").read_checkpoint(path)
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
