"""Networks and published weights for other projects, through torch.hub, from a clone or from GitHub.

    import torch
    network = torch.hub.load("CLONE", "run", "digits.bc16", source="local")     # a published run in work/
    images = torch.stack([network.preprocess("seven.png")])                     # (1, 3, 32, 32)
    print(network.classes[network(images).argmax()])
    network = torch.hub.load("CLONE", "densenet_bc_100_12", source="local", num_classes=100)  # with random weights

The modules of this repository are imported into a package of their own: a project may have other modules named
``inputs`` or ``training``.
"""

import ast
import functools
import importlib.machinery
import pathlib
import sys
import types
import zlib

import torch

dependencies = ["torch", "numpy", "PIL", "filelock", "psutil", "tqdm"]

_ROOT = pathlib.Path(__file__).resolve().parent
_OURS = {path.stem for path in _ROOT.glob("*.py")} | {path.parent.name for path in _ROOT.glob("*/__init__.py")}
_PACKAGE = f"hub_{zlib.crc32(bytes(_ROOT)):08x}"


class _Loader(importlib.machinery.SourceFileLoader):
    """Finds and loads the modules of ``_PACKAGE``, and lets them import each other from it."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.startswith(f"{_PACKAGE}."):
            return importlib.machinery.FileFinder(path[0], (cls, [".py"])).find_spec(name)

    def get_code(self, fullname):  # neither reads nor writes bytecode, which has the plain names
        tree = ast.parse(self.get_data(self.path))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module.partition(".")[0] in _OURS:
                node.module = f"{_PACKAGE}.{node.module}"
            for name in node.names if isinstance(node, ast.Import) else ():
                if name.name in _OURS:  # import fused → import _PACKAGE.fused as fused
                    name.name, name.asname = f"{_PACKAGE}.{name.name}", name.asname or name.name
        return compile(tree, self.path, "exec", dont_inherit=True)


if _PACKAGE not in sys.modules:  # torch.hub runs this file anew for every call
    sys.modules[_PACKAGE] = types.ModuleType(_PACKAGE)
    sys.modules[_PACKAGE].__path__ = [str(_ROOT)]
    sys.meta_path.insert(0, _Loader)


def _module(name):
    """A module of this repository, such as "fused.loops"."""
    return importlib.import_module(f"{_PACKAGE}.{name}")


class _Preprocess:
    """A picklable function: an image, as a path or opened by Pillow → (C, S, S) float32, as evaluate.py reads it."""

    def __init__(self, arguments, normalize):
        self.arguments, self.normalize = arguments, normalize

    def __call__(self, image):
        return _module("inference").preprocess(image, self.arguments, self.normalize)

    def __reduce__(self):
        """Lets a DataLoader's workers, which do not know this module, load it."""
        hub = functools.partial(torch.hub.load, str(_ROOT), "_Preprocess", source="local")
        return hub, (self.arguments, self.normalize)


def run(name):
    """The network of a published run in work/, such as "digits.bc16", or in another directory, in evaluation mode.

    Its attributes: ``classes``, their names; and ``preprocess``, a function: an image, as a path or opened by Pillow →
    (C, S, S) float32, as evaluate.py reads it. That decodes large JPEG files at a reduced size; an image that is
    already decoded gives slightly other values.
    """
    work = _ROOT / "work"
    path = (work / name if (work / name).is_dir() else pathlib.Path(name)) / "weights.pth"
    if not path.exists():
        names = ", ".join(path.parent.relative_to(work).as_posix() for path in sorted(work.glob("**/weights.pth")))
        raise ValueError(f"{path} is missing: python publish.py {path.parent} writes it; work/ has those of {names}")
    checkpoint = _module("common.checkpoints").read_checkpoint(path)
    model = _module("inference").load_model(checkpoint)
    model.classes = checkpoint["classes"]
    model.preprocess = _Preprocess(checkpoint["config"]["arguments"], checkpoint["normalize"])
    return model


_densenet = _module("densenet")
for _name, _options in _densenet.ARCHITECTURES.items():
    _classes = 1000 if _options.get("stem") == "imagenet" else 10
    globals()[_name] = functools.partial(_densenet.DenseNet, **_options, num_classes=_classes)
    globals()[_name].__doc__ = f"""{_name} with random weights, for {_classes} classes. Takes the options of DenseNet:

    num_classes, in_channels, drop_rate, block ("naive", "checkpoint" or "fused") and what else its docstring lists.
    """
