"""Which image files a folder holds: splits, classes, and what is passed over. Nothing is read here but names."""

import os

import torch
from PIL import Image

from cli import Mistake
from reader import formats


def find_splits(root, set_apart):
    """({split: folder}, lines to print): train, test, and val for validation or, without a test folder, for testing.

    With ``set_apart``, test images are to be taken from the training images, which may lie in ``root`` itself.
    """
    train, val, test = (root / name for name in ("train", "val", "test"))
    if set_apart and not (train.is_dir() and any(path.is_dir() for path in train.iterdir())):  # a class may be a train
        return {"train": existing(root)}, []
    splits, notes = {"train": existing(train)}, []
    if set_apart and test.is_dir():
        raise Mistake(f"--test-size: {test} has test images: leave out one of the two")
    if set_apart or (test.is_dir() and val.is_dir()):
        splits |= {"valid": val} if val.is_dir() else {}
    elif val.is_dir() and not test.is_dir():
        notes.append(f"{val} is the test split, since there is no {test}")
        test = val
    return splits if set_apart else splits | {"test": existing(test)}, notes


def folders_of(root, layout):
    """{split: folder} as a run has had them."""
    return {split: existing(root / name) for split, name in layout["folders"].items()}


def existing(folder):
    if folder.is_dir():
        return folder
    raise Mistake(
        f"{folder} is missing: --dataset folder needs DIR/train/<class>/* and DIR/test/<class>/*, "
        "or class folders alone and --test-size N"
    )


def check_classes(folder, found, train, classes):
    """Raises Mistake where the class folders found in a split's folder are not those of training, or too few."""
    unknown = [name for name in found if name not in classes]
    if unknown:
        raise Mistake(f"{folder} has class folders that {train} images have not: {', '.join(unknown[:5])}")
    if len(classes) < 2:
        names = f"one class, {classes[0]}" if classes else "no class folder"
        raise Mistake(f"{folder}: found {names}; a classifier needs at least two class folders")
    empty = [name for name in classes if folder == train and not found[name]]
    if empty:
        raise Mistake(f"{folder / empty[0]} holds no image that can be read: fill it or delete it")


def list_images(folder, passed):
    """{class: sorted paths} of the images below ``folder/<class>``, at any depth. Raises Mistake.

    Every format that Pillow decodes counts; names that begin with a dot do not. ``passed``, a Counter, is told the
    suffixes of all other files.
    """
    classes, above = {}, (identity(folder),)
    for entry in scan(folder):
        if kind_of(entry) == "folder":
            classes[entry.name] = images_below(entry.path, passed, above)
        else:
            passed[suffix_of(entry.path) or "no suffix"] += 1
    return classes


def find_images(paths, passed):
    """The paths of files to classify: those named and, of folders named, those of ``list_images``. Raises Mistake."""
    found = []
    for path in paths:
        images = images_below(path, passed) if os.path.isdir(path) else [path]
        if not images:
            raise Mistake(f"{path} holds no image: name a folder that has some")
        found += images
    return found


def images_below(folder, passed, above=()):
    """Sorted paths of the images below a folder, at any depth; ``above`` identifies the folders that it is in."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in formats()}
    files = sorted(walk(folder, above))
    passed.update(suffix_of(path) or "no suffix" for path in files if suffix_of(path) not in suffixes)
    return [path for path in files if suffix_of(path) in suffixes]


def walk(folder, above):
    """The paths of all files below a folder; ``above`` identifies the folders that it is in."""
    if identity(folder) in above:
        raise Mistake(f"{folder} is a link to a folder that it is in: delete it")
    for entry in scan(folder):
        kind = kind_of(entry)
        if kind == "folder":
            yield from walk(entry.path, (*above, identity(folder)))
        elif kind == "file":
            yield entry.path


def scan(folder):
    """The entries of a folder whose names do not begin with a dot, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise Mistake(f"{folder} cannot be read: {error.strerror}") from error


def kind_of(entry):
    """"folder", "file", or None for what is neither, such as a pipe. Raises Mistake for a link to nowhere."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        entry.stat()  # a link to nowhere has none
    except OSError as error:
        raise Mistake(f"{entry.path} is a broken link ({error.strerror}): delete or mend it") from error
    return None


def identity(folder):
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def suffix_of(path):
    return os.path.splitext(path)[1].lower()


def interleave(classes):
    """Paths and labels from the lists of paths of all classes: the first of each class, then the second of each, …

    The first N images are then a fair sample of the classes.
    """
    entries = sorted((i, label, path) for label, paths in enumerate(classes) for i, path in enumerate(paths))
    return [path for _, _, path in entries], torch.tensor([label for _, label, _ in entries], dtype=torch.int64)
