"""Images as uint8 tensors on the training device, and batches of them, augmented as a whole.

Shuffling, cropping and flipping are one gather per batch: no worker processes and no Python loop over images.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

PAD = 4  # augmentation shifts an image by at most so many pixels (section 4.2 of the paper)
FLIPS = {"horizontal": (1,), "vertical": (0,), "both": (1, 0), "none": ()}  # the mirrored axes of (rows, columns)
POLICIES = {"trivial": "TrivialAugmentWide", "rand": "RandAugment", "auto": "AutoAugment"}  # of torchvision
IGNORE_INDEX = -100  # the label that F.cross_entropy ignores


@dataclass(frozen=True)
class ImageTensors:
    """Pixels (N, H, W, C) uint8 and labels (N,) int64, on any device.

    ``names`` are the paths of the files, or else the positions in the set that ``select`` was first called on.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    names: Sequence | None = None

    def __len__(self):
        return len(self.labels)

    @property
    def device(self):
        return self.pixels.device

    @property
    def size(self):
        return self.pixels.shape[1:3]

    def select(self, index):
        """The images at ``index``, a slice or a tensor of positions."""
        names = range(len(self)) if self.names is None else self.names
        return ImageTensors(self.pixels[index], self.labels[index], chosen(names, index))

    def to(self, device):
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def batches(self, *args, **options):
        return Batches(self, *args, **options)


class Batches:
    """Batches of images that live on the device.

    ``crop_fill`` turns augmentation on and says what fills the border of a shifted image: "mean" (zero after
    normalisation, as in the paper's Lua code) or "black" (zero before it, as bamos and gpleiss do). ``share``, (rank,
    ranks): the rank gets every ranks-th image of each batch. ``flip``, of FLIPS, mirrors images; ``shift`` is in
    pixels. ``cutout``: side in pixels of a square that is filled likewise. ``mixup``: α of Beta(α, α). ``policy``, of
    POLICIES, changes streamed images.
    """

    def __init__(
        self, images, batch_size, normalize, crop_fill=None, share=(0, 1), cutout=0, mixup=0.0,
        flip="horizontal", shift=PAD, policy=None,
    ):  # fmt: skip
        self.images, self.batch_size, self.crop_fill, self.share = images, batch_size, crop_fill, share
        self.cutout, self.mixup, self.flip, self.shift, self.policy = cutout, mixup, flip, shift, policy
        self.normalized = normalizer(normalize, images.device)
        self.num_images = len(images)

    def __len__(self):
        return -(-self.num_images // self.batch_size)

    def in_order(self):
        """Yield every image once, in order and unaugmented: ((B, C, H, W) float32 channels last, (B,) int64)."""
        order = torch.arange(self.num_images, device=self.images.labels.device)
        parts = [part for part, _ in batch_positions(self.num_images, self.batch_size, self.share) if part]
        yield from self.load([{"order": order[part.start : part.stop : part.step]} for part in parts])

    def shuffled(self, seed):
        """Yield every image once, shuffled and, with ``crop_fill``, augmented. ``seed`` alone decides both.

        Each batch is (images, labels, number of images of all ranks together). A rank without an image in it gets one
        labelled IGNORE_INDEX, since it has to take part in the step. With mixup, an image is λ · itself + (1 − λ) ·
        its partner (arXiv 1710.09412), and the batch has the partners' labels (B,) and λ (B,), too.
        """
        draws = {name: values.to(self.images.labels.device) for name, values in self.draw(seed).items()}
        parts, plan = list(batch_positions(self.num_images, self.batch_size, self.share)), []
        for part, _ in parts:
            i = slice(part.start, part.stop, part.step) if part else slice(1)
            shown = {name: values[i] for name, values in draws.items()}
            if self.mixup:  # the images, then their partners, augmented as where they are images themselves
                shown = {name: torch.cat((values, draws[name][shown["partners"]])) for name, values in shown.items()}
            plan.append(shown)
        for (part, count), shown, (images, labels) in zip(parts, plan, self.load(plan, seed), strict=True):
            labels = labels if part else torch.full_like(labels, IGNORE_INDEX)
            if self.mixup:
                lam = shown["lam"].to(images.device)
                (images, partners), (labels, others), (lam, _) = (x.chunk(2) for x in (images, labels, lam))
                yield torch.lerp(partners, images, lam[:, None, None, None]), labels, count, others, lam
            else:
                yield images, labels, count

    def draw(self, seed):
        """All random numbers of an epoch, drawn on the CPU: they do not depend on device or batch size.

        "centres" of squares are rows and columns, uniform over the pixels. "partners" is a permutation: every image is
        the partner of one. "lam", λ ≥ 1/2, is the weight of an image in its mixture: max(x, 1 − x), x ~ Beta(α, α).
        """
        generator, count = torch.Generator().manual_seed(seed), self.num_images
        draws = {"order": torch.randperm(count, generator=generator)} | self.draw_crops(generator)
        if self.cutout:
            centres = [torch.randint(side, (count,), generator=generator) for side in self.images.size]
            draws["centres"] = torch.stack(centres, 1)
        if self.mixup:
            draws["partners"] = torch.randperm(count, generator=generator)
            seed = int(torch.randint(2**62, (), generator=generator))
            lam = torch.from_numpy(np.random.default_rng(seed).beta(self.mixup, self.mixup, count))
            draws["lam"] = torch.maximum(lam, 1 - lam).float()
        return draws

    def draw_crops(self, generator):
        offsets = torch.randint(-self.shift, self.shift + 1, (self.num_images, 2), generator=generator)  # rows, columns
        flips = torch.zeros(self.num_images, 2, dtype=torch.bool)
        for axis in FLIPS[self.flip]:
            flips[:, axis] = torch.randint(0, 2, (self.num_images,), generator=generator)
        return {"offsets": offsets, "flips": flips} if self.crop_fill else {}

    def load(self, plan, seed=None):
        """Yield (images, labels) for the random numbers of each batch; "order" says which images they are."""
        for shown in plan:
            yield self.augmented(**shown), self.images.labels[shown["order"]]

    def augmented(self, order, offsets=None, flips=None, centres=None, **_):
        """The images at ``order`` (B,), augmented and normalised: (B, C, H, W).

        They are shifted by ``offsets`` (B, 2), then mirrored along the axes of ``flips`` (B, 2), in one gather: image i
        shows at (row, column) its pixel (±row + offset, ±column + offset). Pixels outside, and those in a square
        around ``centres`` (B, 2), are filled.
        """
        pixels = self.images.pixels
        _, height, width, channels = pixels.shape
        seen = None if centres is None else outside(centres, self.cutout, (height, width))  # (B, H, W); None: all
        if offsets is None:
            pixels = pixels[order]
        else:
            rows, columns = (torch.arange(side, device=pixels.device) for side in (height, width))
            rows = torch.where(flips[:, :1], rows.flip(0), rows) + offsets[:, :1]  # (B, H)
            columns = torch.where(flips[:, 1:], columns.flip(0), columns) + offsets[:, 1:]  # (B, W)
            inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
            source = (order[:, None] * height + rows.clamp(0, height - 1))[:, :, None] * width
            source = source + columns.clamp(0, width - 1)[:, None, :]  # (B, H, W), into rows of pixels
            pixels, seen = pixels.view(-1, channels)[source], inside if seen is None else inside & seen
        if seen is None:
            return self.normalized(pixels)
        if self.crop_fill == "black":
            return self.normalized(pixels * seen[..., None])
        return self.normalized(pixels) * seen[:, None]


def outside(centres, side, size):
    """(B, H, W) bool: False in the squares around ``centres`` (B, 2), cut at the border (arXiv 1708.04552)."""
    first = centres - side // 2
    rows, columns = (torch.arange(n, device=first.device) - first[:, i, None] for i, n in enumerate(size))
    within = [(distance >= 0) & (distance < side) for distance in (rows, columns)]  # (B, H), (B, W)
    return ~(within[0][:, :, None] & within[1][:, None, :])


def memory_format(device):
    """The memory format of images and convolutions: channels last, which is faster.

    Not on MPS, where batch norm's backward pass in it is wrong, or fails, in many releases of torch.
    """
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


def chosen(names, index):
    """The items of a sequence at ``index``, a slice or a tensor of positions."""
    return names[index] if isinstance(index, slice) else [names[i] for i in index.tolist()]


def normalizer(normalize, device):
    """A function (B, H, W, C) uint8 → (B, C, H, W) float32, from per-channel (mean, std) of 255."""
    mean, std = torch.tensor(normalize, device=device)  # (C,) each
    scale, shift, layout = 1 / std, -mean / std, memory_format(device)
    return lambda pixels: torch.addcmul(shift, pixels, scale).permute(0, 3, 1, 2).contiguous(memory_format=layout)


def batch_positions(count, batch_size, share):
    """For each batch of ``count`` images: the range of positions that a rank has in it, and the length of the batch."""
    rank, ranks = share
    for start in range(0, count, batch_size):
        stop = min(start + batch_size, count)
        yield range(start + rank, stop, ranks), stop - start
