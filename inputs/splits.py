"""A data set's splits: images held out, limited, compared with those of an earlier run; dataset statistics."""

import hashlib
import os
import warnings
from dataclasses import dataclass, field, replace

import psutil
import torch

from common.console import Mistake
from inputs.batches import ImageTensors
from inputs.streaming import ImageFiles

# Mean and standard deviation of each channel, of 255. CIFAR-10: fb.resnet.torch, which the paper's code builds on.
NORMALIZE = {
    "cifar10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "cifar100": ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
    "svhn": ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),  # the paper divides SVHN by 255 and does no more
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "imagenet in grey": ((114.495,), (57.63,)),  # the averages over red, green and blue
}
KINDS = {"train": "training", "valid": "validation", "test": "test"}  # what the images of a split are called


@dataclass(frozen=True)
class Dataset:
    """Training and test images, names of the classes, and per-channel (mean, std) of 255.

    ``train``, ``test`` and ``valid`` are ImageTensors, or ImageFiles if images are streamed from disk. ``notes`` are
    lines to print. ``manifest`` says which folders the splits are, which files were set apart for testing, and has a
    fingerprint of each split: a later call finds the same splits and notices changes. ``measured`` is ``normalize``
    before ``normalized_as``.
    """

    train: ImageTensors | ImageFiles
    test: ImageTensors | ImageFiles
    classes: list
    normalize: tuple
    valid: ImageTensors | ImageFiles | None = None
    notes: list = field(default_factory=list)
    manifest: dict | None = None
    measured: tuple | None = None

    @property
    def splits(self):
        """The splits by name: "train", "valid" if images are held out, "test"."""
        splits = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}

    def to(self, device):
        return replace(self, **{name: split.to(device) for name, split in self.splits.items()})

    def normalized_as(self, normalize):
        """This data set, normalised as the weights that training starts from, if they have as many channels."""
        if not normalize or len(normalize[0]) != len(self.normalize[0]):
            return self
        return replace(self, normalize=tuple(map(tuple, normalize)), measured=self.normalize)

    def hold_out(self, count, seed, groups=None):
        """Move training images to ``valid``: see ``stratified``. Raises Mistake."""
        if self.valid is not None:
            raise Mistake(f"--valid-size {count}: the data set has validation images: leave it out")
        parts = stratified(self.train.labels, count, seed, "--valid-size", groups)
        train, valid = (self.train.select(torch.tensor(part)) for part in parts)
        return replace(self, train=train, valid=valid)

    def limit(self, train=None, test=None):
        """Keep the first ``train`` training images and the first ``test`` test (and validation) images."""
        counts = {"train": train, "valid": test, "test": test}
        return replace(self, **{name: split.select(slice(counts[name])) for name, split in self.splits.items()})


def stratified(labels, count, seed, flag, groups=None):
    """(positions of all other images, positions of ``count`` images), the same fraction of each class in both.

    ``count`` is a number, a fraction, or a fold "I/K". With ``groups``, the group of each image, no group is in both
    parts; of as many folds as ``count`` asks for, the one nearest to it is held out. ``seed`` alone decides. Raises
    Mistake.
    """
    from sklearn.model_selection import train_test_split

    labels = labels.cpu().numpy()
    try:
        if isinstance(count, str):
            i, k = map(int, count.split("/"))
            parts = folds_of(labels, k, seed, groups)[i - 1]
        elif groups:
            parts = nearest_fold(labels, len(labels) * count if isinstance(count, float) else count, seed, groups)
        else:
            parts = train_test_split(range(len(labels)), test_size=count, stratify=labels, random_state=seed)
    except (ValueError, ZeroDivisionError) as error:
        needs = "every part needs an image of every class, and a whole group, if there are groups"
        raise Mistake(f"{flag} {count}: cannot take the same fraction of each class: {needs}") from error
    return [sorted(part) for part in parts]


def folds_of(labels, k, seed, groups):
    """The (positions of all others, positions in the fold) of each of k folds."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    folds = (StratifiedGroupKFold if groups else StratifiedKFold)(k, shuffle=True, random_state=seed)
    with warnings.catch_warnings(action="ignore"):  # of classes that some folds lack, which read_splits tells
        return list(folds.split(labels, labels, groups))


def nearest_fold(labels, count, seed, groups):
    """The fold nearest to ``count`` images in size; for more than half of the images, what such a fold leaves."""
    smaller = min(count, len(labels) - count)
    k = min(round(len(labels) / smaller), len(set(groups)))
    others, fold = min(folds_of(labels, k, seed, groups), key=lambda parts: abs(len(parts[1]) - smaller))
    return (others, fold) if smaller == count else (fold, others)


def fingerprint(images, root):
    """A digest of labels and pixels, or of labels and names if images are streamed: reading them takes minutes."""
    key = hashlib.sha256(images.labels.numpy())
    if isinstance(images, ImageFiles):
        key.update(os.fsencode("\0".join(os.path.relpath(path, root) for path in images.names)))
    else:
        key.update(images.pixels.numpy())
    return key.hexdigest()


def changed(manifest, dataset):
    """The splits that have changed since the manifest of a run, which may be None, was made."""
    before = (manifest or {}).get("fingerprints", {})  # early runs have none
    return [split for split, digest in before.items() if digest != dataset.manifest["fingerprints"].get(split)]


def check_memory(count, reader, bytes_per_pixel, instead=""):
    """Raises Mistake if so many images do not fit in memory; ``instead`` is more advice."""
    size, available = reader.image_size, psutil.virtual_memory().available / 1e9
    needed = count * size**2 * bytes_per_pixel / 1e9
    if needed > available:
        raise Mistake(
            f"{count:,} images of {size}×{size} pixels need {needed:.1f} GB of memory, of which "
            f"{available:.1f} GB are available: choose a smaller --image-size{instead}"
        )


def channel_statistics(pixels):
    """Per-channel (mean, std), of 255, of (N, H, W, C) uint8: exact, from 256-bin histograms in float64."""
    values = torch.arange(256, dtype=torch.float64)
    means, stds = [], []
    for channel in range(pixels.shape[-1]):
        parts = pixels[..., channel].split(4096)  # bincount makes an int64 copy: keep it small
        counts = sum(torch.bincount(part.flatten(), minlength=256) for part in parts).double()
        weights = counts / counts.sum()
        mean = (weights * values).sum()
        means.append(mean.item())
        stds.append((weights * (values - mean) ** 2).sum().sqrt().item())
    return tuple(means), tuple(stds)
