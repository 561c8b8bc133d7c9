"""Which image files a folder holds: splits, classes, and what is passed over. Nothing is read here but names."""

import os
from collections import Counter
from pathlib import Path

import torch
from PIL import Image

from common.console import Mistake
from inputs.batches import ImageTensors
from inputs.decoding import find_unreadable, read_cached, unreadable, without
from inputs.image import STREAM_FROM, formats
from inputs.splits import NORMALIZE, Dataset, check_memory, fingerprint, measure, stratified
from inputs.streaming import ImageFiles

# From files to pixels.


def read_split(root, folder, paths, labels, reader):
    """The images of some files, ImageTensors or, to be streamed, ImageFiles; and {position: why} of unreadable ones.

    ``folder`` is the one of ``root`` that they are in, or ``root`` itself, where pixels are cached. Of streamed images,
    only --skip-unreadable finds out beforehand which are unreadable. Raises Mistake.
    """
    name = "all" if folder == root else folder.name
    if not reader.streams:
        cache = root / f".{name}-{reader.image_size}{'-grey' * (reader.channels == 1)}.cache"
        pixels, problems = read_cached(cache, paths, reader)
        return ImageTensors(pixels, labels, paths), problems
    problems = find_unreadable(root / f".{name}-unreadable.cache", paths, reader) if reader.skip_unreadable else {}
    return ImageFiles(paths, labels, reader), problems


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


def folders_of(root, manifest):
    """{split: folder} as a run has had them."""
    return {split: existing(root / name) for split, name in manifest["folders"].items()}


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


def load_folder(root, reader, test_size=0, manifest=None):
    """Class folders of images, in the splits that ``find_splits`` finds; images of any format, size and mode."""
    folders, notes = find_splits(root, bool(test_size)) if manifest is None else (folders_of(root, manifest), [])
    passed, listed = Counter(), {}
    for split, folder in folders.items():
        listed[split] = list_images(folder, passed)
        check_classes(folder, listed[split], folders["train"], list(listed["train"]))
    notes += passed_over(passed)
    classes = list(listed["train"])
    if not reader.streams:
        count = sum(len(paths) for found in listed.values() for paths in found.values())
        check_memory(count, reader, reader.channels, f", or one of {STREAM_FROM} or more, which streams from disk")
    images = read_splits(root, folders, listed, reader, notes)
    test_files = manifest["test_files"] if manifest else []
    if test_size and not manifest:
        test_files = draw_test(images["train"], root, test_size)
    if test_files:
        images["train"], images["test"] = divide(images["train"], root, test_files)
    notes += [line for split in images for line in absent_classes(split, images[split], classes)]
    notes += check_range(images["train"])
    mean, std = imagenet_normalize(reader.channels) if reader.streams else measure(images["train"].pixels)
    normalize = mean, tuple(value or 1.0 for value in std)  # 0: the channel never varies
    names = {split: folder.relative_to(root).as_posix() for split, folder in folders.items()}
    prints = {split: fingerprint(found, root) for split, found in images.items()}
    manifest = {"folders": names, "test_files": list(test_files), "fingerprints": prints}
    return Dataset(**images, classes=classes, normalize=normalize, notes=notes, manifest=manifest)


def read_splits(root, folders, listed, reader, notes):
    """{split: images} of the files listed by class, without those that are to be skipped."""
    images, problems, classes = {}, {}, list(listed["train"])
    for split, found in listed.items():
        paths, labels = interleave([found.get(name, []) for name in classes])
        images[split], problems[split] = read_split(root, folders[split], paths, labels, reader)
    damaged = [problem for found in problems.values() for problem in found.values()]
    if damaged and not reader.skip_unreadable:
        raise unreadable(damaged)
    for split, found in problems.items():
        if found:
            skipped = Counter(classes[images[split].labels[i]] for i in found)
            by_class = ", ".join(f"{name} {skipped[name]}" for name in classes if skipped[name])
            notes.append(f"{folders[split]}: skipped {len(found)} unreadable images: {by_class}")
        images[split] = without(images[split], found)
        if not len(images[split]):
            raise Mistake(f"{folders[split]} holds no image in a class folder that can be read: fill it or delete it")
    return images


def load_test_folder(root, reader, classes, manifest):
    """The test images of a folder, in the order of training, and lines to print. Needs no training images."""
    if manifest["test_files"]:
        return load_test_files(root, reader, classes, manifest)
    folder, passed = existing(root / manifest["folders"]["test"]), Counter()
    found = list_images(folder, passed)
    check_classes(folder, found, "the training", classes)
    by_class, notes = {name: found.get(name, []) for name in classes}, passed_over(passed)
    images = read_splits(root, {"train": folder}, {"train": by_class}, reader, notes)["train"]
    return images, notes + absent_classes("test", images, classes)


def load_test_files(root, reader, classes, manifest):
    """The images that were set apart for testing, by the names that the run has kept."""
    train, names = manifest["folders"]["train"], manifest["test_files"]
    paths = [str(root / name) for name in names]
    check_found(root, names, {name for name in names if (root / name).exists()})
    labels = torch.tensor([classes.index(Path(name).relative_to(train).parts[0]) for name in names])
    images, problems = read_split(root, root / "set-apart", paths, labels, reader)
    if problems and not reader.skip_unreadable:
        raise unreadable(problems.values())
    return without(images, problems), []


def check_found(root, names, found):
    missing = [name for name in names if name not in found]
    if missing:
        count = f"{len(missing)} of the run's {len(names)}"
        raise Mistake(f"{root}: {count} test images are missing, such as {missing[0]}")


def passed_over(passed):
    """A line to print about files that are no images, from a Counter of their suffixes."""
    kinds = ", ".join(f"{suffix} {count}" for suffix, count in passed.most_common())
    return [f"passed over {sum(passed.values())} files: {kinds}"] if passed else []


def draw_test(images, root, count):
    """Names of ``count`` files to test on, the same share of each class; always the same ones, whatever the seed."""
    chosen = stratified(images.labels, count, seed=0, flag="--test-size")[1]
    return [Path(images.names[i]).relative_to(root).as_posix() for i in chosen]


def divide(images, root, test_files):
    """Training and test images, from all images and the names of the files to test on."""
    position = {Path(path).relative_to(root).as_posix(): i for i, path in enumerate(images.names)}
    check_found(root, test_files, position)
    test = [position[name] for name in test_files]
    train = sorted(set(range(len(images))) - set(test))
    return images.select(torch.tensor(train)), images.select(torch.tensor(test))


def absent_classes(split, images, classes):
    """A line to print where a split has no image of some classes."""
    counts = images.labels.bincount(minlength=len(classes)).tolist()
    absent = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    return [f"no {split} image of {len(absent)} of the classes: {', '.join(absent[:10])}"] if absent else []


def check_range(images):
    """A line to print where training images use less than an eighth of their range: their white may be elsewhere."""
    if isinstance(images, ImageFiles):
        images = images.sample(64)
    if not len(images) or int(images.pixels.max()) - int(images.pixels.min()) >= 32:
        return []
    used = f"{int(images.pixels.min())} … {int(images.pixels.max())} of 0 … 255"
    return [f"the training images use only {used}: if their files have over 8 bits, say with --white what is white"]


def imagenet_normalize(channels):
    """ImageNet's mean and standard deviation; of grey images, the averages over red, green and blue."""
    values = NORMALIZE["imagenet"]
    return values if channels == 3 else tuple((round(sum(value) / 3, 3),) for value in values)
