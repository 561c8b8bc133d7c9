"""Folders of images: which files belong to which split and class, what is passed over, and how they are loaded."""

import contextlib
import errno
import os
import re
import warnings
from collections import Counter
from pathlib import Path

import torch
from PIL import Image

from common.console import Mistake, counted
from common.files import readable
from inputs.batches import ImageTensors
from inputs.decoding import read_cached, unreadable
from inputs.image import STREAM_FROM, Unreadable, formats, patient
from inputs.splits import KINDS, NORMALIZE, Dataset, channel_statistics, check_memory, fingerprint, stratified
from inputs.streaming import ImageFiles

FIFTH = 0.2  # fraction of the images that is set apart for testing if nothing says otherwise
LIKE_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
OF_SYSTEMS = {  # in lower case: bins, thumbnails and snapshots of macOS, Windows, Linux and network storage
    *("__macosx", "$recycle.bin", "recycler", "system volume information", "lost+found"),
    *("#recycle", "#snapshot", "@eadir", "@recycle", "@recently-snapshot"),
}


def load_folder(root, reader, test_size=0, manifest=None, groups=None, labels=None):
    """The Dataset of a folder, in the splits of ``find_splits``; images of any format, size and mode.

    ``test_size`` is a number or fraction of images to set apart for testing, or a fold "I/K". ``groups``: a pattern of
    ``groups_of``; no group is in two splits. ``labels``: a table of ``read_labels``, instead of class folders. Raises
    Mistake.
    """
    table, passed = read_labels(root, labels), Counter()
    folders, test_size, notes = find_splits(root, test_size, manifest, table)
    found = table or {split: list_images(folder, passed) for split, folder in folders.items()}
    classes, train = list(found["train"]), folders["train"]
    if len(classes) < 2:
        raise Mistake(f"a classifier needs at least two classes, and {train} has {', '.join(classes) or 'none'}")
    if empty := [name for name in classes if not found["train"][name]]:
        raise Mistake(f"{train / empty[0]} holds no image that can be read{convert(passed)}fill it or delete it")
    notes += passed_over(passed)
    files = {split: interleave(folders[split], found[split], classes, reader) for split in folders}
    if not reader.streams:
        instead = f", or one of {STREAM_FROM} or more, which streams from disk"
        check_memory(sum(map(len, files.values())), reader, reader.channels, instead)
    test_files = manifest["test_files"] if manifest else []
    if test_size and not test_files:  # the same for every --seed
        flag, names = "--fold" if isinstance(test_size, str) else "--test-size", files["train"].names
        drawn = stratified(files["train"].labels, test_size, 0, flag, groups_of(names, root, groups))[1]
        test_files = [below(root, names[i]) for i in drawn]
    if test_files:
        files["test"] = set_apart(root, test_files, train, table, classes, reader)
        apart = set(map(Path, files["test"].names))  # Path: "./cat/0.png" is "cat/0.png"
        kept = [i for i, name in enumerate(files["train"].names) if Path(name) not in apart]
        files["train"] = files["train"].select(torch.tensor(kept))
    if groups:
        check_groups(files, root, groups)
    images = read_splits(root, files, classes, notes)
    notes += look_at(images["train"], reader)
    if reader.streams:
        mean, std = NORMALIZE["imagenet" if reader.channels == 3 else "imagenet in grey"]
    else:
        mean, std = channel_statistics(images["train"].pixels)
    normalize = mean, tuple(value or 1.0 for value in std)  # 0: the channel never varies
    manifest = {
        "folders": {split: folder.relative_to(root).as_posix() for split, folder in folders.items()},
        "test_files": test_files,
        "labels": labels,
        "fingerprints": {split: fingerprint(of_split, root) for split, of_split in images.items()},
    }
    return Dataset(**images, classes=classes, normalize=normalize, notes=notes, manifest=manifest)


def load_test_folder(root, reader, classes, manifest):
    """The test images of a folder, in the order of training, and lines to print. Needs no training images."""
    table, passed = read_labels(root, manifest.get("labels"), ["test"]), Counter()
    if manifest["test_files"]:
        train = root / manifest["folders"]["train"]
        files = set_apart(root, manifest["test_files"], train, table, classes, reader)
    else:
        folder = existing(root / manifest["folders"]["test"])
        files = interleave(folder, table.get("test", {}) if table else list_images(folder, passed), classes, reader)
    notes = passed_over(passed)
    return read_splits(root, {"test": files}, classes, notes)["test"], notes


# Which files there are: nothing is read but names.


def find_splits(root, test_size, manifest, table=None):
    """({split: folder}, test size, lines to print): train, test, and val for validation or, without test, for testing.

    With a test size, test images are taken from the training images, which may lie in ``root`` itself. It is a fifth
    for class folders alone and for a ``table`` without test images. The folders of a manifest stay.
    """
    if table:
        if test_size and "test" in table:
            raise Mistake("--labels names test images: leave out --test-size or --fold")
        fifth = not test_size and "test" not in table
        notes = ["the table has no test images: a fifth of each class is set apart (see --test-size)"] if fifth else []
        return dict.fromkeys(table, root), FIFTH if fifth else test_size, notes
    if manifest:
        folders = {split: existing(root / name) for split, name in manifest["folders"].items()}
        return folders, test_size or (0 if "test" in folders else FIFTH), []
    train, val, test = (root / name for name in ("train", "val", "test"))
    below = [path.name for path in root.glob("[!.]*") if path.is_dir()]
    if not test_size and len(below) > 1 and not any(name.lower() in LIKE_SPLITS for name in below):
        note = f"{root} has class folders alone: a fifth of each is set apart for testing (see --test-size)"
        return {"train": root}, FIFTH, [note]
    if test_size and not (train.is_dir() and any(path.is_dir() for path in train.iterdir())):  # a class may be a train
        return {"train": existing(root)}, test_size, []
    if test_size and test.is_dir():
        raise Mistake(f"{test} has test images: leave out --test-size or --fold")
    splits, notes = {"train": existing(train)}, []
    if val.is_dir() and (test_size or test.is_dir()):
        splits["valid"] = val
    elif val.is_dir():
        notes, test = [f"{val} is the test split, since there is no {test}"], val
    return splits if test_size else splits | {"test": existing(test)}, test_size, notes


def read_labels(root, labels, needed=tuple(KINDS)):
    """{split: {class: sorted paths}} of a CSV file ``root / labels`` with columns path, label and optionally split.

    Paths are relative to ``root``; without splits, all images are for training. The files of splits that are ``needed``
    have to be there. None without labels. Raises Mistake.
    """
    if not labels:
        return None
    import pandas as pd

    file, found = root / labels, {"train": {}}
    try:
        options = {"keep_default_na": False, "skipinitialspace": True, "skip_blank_lines": False}
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):  # of a cell too many
            table = pd.read_csv(readable(file), dtype=str, index_col=False, encoding="utf-8-sig", **options)
    except (OSError, ValueError, pd.errors.ParserWarning) as error:
        raise Mistake(f"--labels: {file} cannot be read ({error}): name a CSV file by its path below --data") from error
    if absent := {"path", "label"} - set(table):
        raise Mistake(f"{file} has no column {' nor '.join(sorted(absent))}: it needs path, label and optionally split")
    table = table.fillna("").query("path != '' or label != ''")  # a line may be blank
    paths = [os.path.relpath(os.path.join(root, path), root) for path in table.path]
    table = table.assign(split=table.get("split", "train"), path=paths)
    for problem, wrong in (
        ("has no label", table.label == ""),
        ("has a split that is not train, valid or test", ~table.split.isin(KINDS)),
        ("is in an earlier line, too", table.path.duplicated()),
        ("is missing", table.split.isin(needed) & ~table.path.map(lambda path: os.path.isfile(root / path))),
    ):
        for line, path in table.path[wrong].items():
            raise Mistake(f"{file}, line {line + 2}: {path} {problem}: correct the table")
    for (split, name), rows in table.sort_values("path").groupby(["split", "label"]):
        found.setdefault(split, {})[name] = [str(root / path) for path in rows.path]
    return found


def existing(folder):
    if folder.is_dir():
        return folder
    raise Mistake(
        f"{folder} is missing: --dataset folder needs DIR/train/<class>/* and DIR/test/<class>/*, "
        "or class folders alone"
    )


def list_images(folder, passed):
    """{class: sorted paths} of the images below ``folder/<class>``, at any depth. Raises Mistake, OSError.

    Names that begin with a dot are skipped. ``passed``, a Counter, counts the suffixes of other files that Pillow does
    not decode, and folders of systems.
    """
    found = {}
    for name, kind in listed(folder, passed):
        if kind == "folder":
            found[name] = images_below(os.path.join(folder, name), passed)
        else:
            passed[kind] += 1
    return found


def find_images(paths, passed):
    """The paths of files to classify: those named and, of folders named, those of ``list_images``. Raises Mistake."""
    found = []
    for path in paths:
        images = images_below(path, passed) if os.path.isdir(path) else [path]
        if not images:
            raise Mistake(f"{path} holds no image{convert(passed)}name a folder that has some")
        found += images
    return found


def images_below(top, passed):
    """Sorted paths of the images below a folder, at any depth."""
    if os.path.islink(top) and any(os.path.samefile(top, above) for above in Path(top).parents):
        raise Mistake(f"{top} is a link to a folder that it is in: delete it")
    images = []
    for name, kind in listed(top, passed):
        path = os.path.join(top, name)
        if kind == "folder":
            images += images_below(path, passed)
        elif Image.registered_extensions().get(kind) in formats():
            images.append(path)
        else:
            passed[kind] += 1
    return sorted(images)


def listed(folder, passed):
    """Yield (name, kind) of what a folder holds; ``passed`` counts the folders of systems, which are left out."""
    for name, kind in entries_of(folder):
        if kind == "folder" and name.lower() in OF_SYSTEMS:
            passed[name] += 1  # once: a snapshot holds a copy of everything
        else:
            yield name, kind


@patient
def entries_of(folder):
    """[(name, kind)], sorted, without what is hidden; links are followed. A file's kind is its suffix, as ".png"."""
    with os.scandir(folder) as entries:
        return sorted((entry.name, kind_of(entry)) for entry in entries if not entry.name.startswith("."))


def kind_of(entry):
    try:
        if entry.is_file():
            return os.path.splitext(entry.name)[1].lower() or "no suffix"
        return "folder" if entry.is_dir() else "broken link or pipe"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "broken link or pipe"
        raise


def passed_over(passed):
    """A list of one line about files that are no images, from a Counter of their kinds; empty if there are none."""
    kinds = ", ".join(f"{kind} {count}" for kind, count in passed.most_common())
    return [f"passed over {counted(passed.total(), 'file')}: {kinds}"] if passed else []


def convert(passed):
    """The start of advice about a folder without images; ``passed`` counts its other files."""
    return f" ({passed_over(passed)[0]}): convert or rename them, " if passed else ": "


def interleave(folder, found, classes, reader):
    """ImageFiles from {class: paths} of a folder: the first path of each class, then the second of each, …

    So the first N images are a fair sample of the classes. Raises Mistake if a class is not in ``classes``.
    """
    if unknown := [name for name in found if name not in classes]:
        raise Mistake(f"{folder} has classes that the training images have not: {', '.join(unknown[:5])}")
    entries = sorted((i, label, p) for label, name in enumerate(classes) for i, p in enumerate(found.get(name, [])))
    labels = torch.tensor([label for _, label, _ in entries], dtype=torch.int64)
    return ImageFiles([path for _, _, path in entries], labels, reader)


def set_apart(root, names, train, table, classes, reader):
    """ImageFiles of the files that are set apart for testing, from their names below ``root``.

    Their classes are those of ``table`` or, without it, the names of their folders below ``train``. Raises Mistake.
    """
    labelled = table and {Path(path): name for name, listed in table["train"].items() for path in listed}
    paths = [root / name for name in names]
    if missing := [path for path in paths if not path.exists()]:
        raise Mistake(f"{len(missing)} of the run's {len(names)} test images are missing, such as {missing[0]}")
    try:
        labels = torch.tensor([classes.index(labelled[p] if table else p.relative_to(train).parts[0]) for p in paths])
    except (ValueError, LookupError) as error:
        raise Mistake(f"the run's test images are not in its classes any more ({error})") from error
    return ImageFiles(list(map(str, paths)), labels, reader)


def below(root, path):
    """A path relative to ``root``, with forward slashes."""
    return Path(os.path.relpath(path, root)).as_posix()


def groups_of(names, root, pattern):
    """The patient, scene or writer of each image: the first group of a regular expression in its path below ``root``.

    None without a pattern. Raises Mistake.
    """
    if pattern is None:
        return None
    paths = [below(root, name) for name in names]
    try:
        groups = [match and match[1] for match in (re.search(pattern, path) for path in paths)]
    except (re.error, IndexError) as error:
        raise Mistake(f"--groups {pattern}: {error}: write a regular expression with a group in parentheses") from error
    if None in groups:
        raise Mistake(f"--groups {pattern} does not match {paths[groups.index(None)]}: every image needs a group")
    return groups


def check_groups(files, root, pattern):
    """Raises Mistake if images of one group, see ``groups_of``, are in two of {split: ImageFiles}."""
    first = {}
    for split, part in files.items():
        for group in groups_of(part.names, root, pattern):
            if first.setdefault(group, split) != split:
                parts = f"{KINDS[first[group]]} and {KINDS[split]} images"
                raise Mistake(f"--groups {pattern}: {group} is in {parts}: move all images of a group into one split")


# From files to pixels.


def read_splits(root, files, classes, notes):
    """{split: ImageTensors or, to be streamed, ImageFiles} from {split: ImageFiles}.

    --skip-unreadable leaves out unreadable images; without it, streamed images are not checked here. Adds to ``notes``
    what is left out, and which classes have no image. Raises Mistake.
    """
    images, problems, reader = dict(files), {}, files["test"].reader
    if not reader.streams or reader.skip_unreadable:
        kind = "unreadable" if reader.streams else f"{reader.image_size}{'-grey' if reader.channels == 1 else ''}"
        for split, part in files.items():
            pixels, problems[split] = read_cached(root / f".{split}-{kind}.cache", part.names, reader)
            images[split] = part if reader.streams else ImageTensors(pixels, part.labels, part.names)
    every = [problem for of_split in problems.values() for problem in of_split.values()]
    if every and not reader.skip_unreadable:
        raise unreadable(every)
    for split, part in images.items():
        if skipped := problems.get(split):
            counts = Counter(classes[label] for label in part.labels[list(skipped)])
            by_class = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
            notes.append(f"skipped {counted(len(skipped), f'unreadable {KINDS[split]} image')}: {by_class}")
            kept = [i for i in range(len(part)) if i not in skipped]
            images[split] = part.select(torch.tensor(kept, dtype=torch.int64))
        if not len(images[split]):
            raise Mistake(f"{root}: no {KINDS[split]} image in a class folder can be read: add some")
        seen = set(images[split].labels.tolist())
        if absent := [name for label, name in enumerate(classes) if label not in seen]:
            notes.append(f"no {split} image of {len(absent)} of the classes: {', '.join(absent[:10])}")
    return images


def look_at(images, reader):
    """Lines to print about what reading loses of some 64 training images. Raises as Reader.read."""
    paths, counts = images.names[:: max(1, len(images) // 64)], Counter()
    for path in paths:
        with contextlib.suppress(Unreadable):  # reported with all others
            counts.update(reader.losses(path))
    return [f"{count} of {len(paths)} training images that were looked at: {loss}" for loss, count in counts.items()]
