"""Images as uint8 tensors on the training device, and batches of them, augmented as a whole.

Shuffling, cropping and flipping are one gather per batch: no worker processes and no Python loop over images.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

PAD = 4  # pixels by which the augmentation shifts an image at most (section 4.2 of the paper)
IGNORE_INDEX = -100  # the label that F.cross_entropy passes over


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

    def select(self, index):
        """The images at ``index``, a slice or a tensor of positions."""
        names = range(len(self)) if self.names is None else self.names
        return ImageTensors(self.pixels[index], self.labels[index], chosen(names, index))

    def to(self, device):
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def batches(self, batch_size, normalize, crop_fill=None, share=(0, 1)):
        return Batches(self, batch_size, normalize, crop_fill, share)


class Batches:
    """Batches of images that live on the device.

    ``crop_fill`` turns augmentation on and says what a shifted image shows beyond its border: "mean" (zero after
    normalisation, as in the paper's Lua code) or "black" (zero before it, as bamos and gpleiss do). ``share``, (rank,
    ranks), gives a rank every ranks-th image of each batch, so that all together see the batches of a single process.
    """

    def __init__(self, tensors, batch_size, normalize, crop_fill=None, share=(0, 1)):
        self.tensors, self.batch_size, self.crop_fill, self.share = tensors, batch_size, crop_fill, share
        self.normalized = normalizer(normalize, tensors.pixels.device)
        self.num_images = len(tensors)

    def __len__(self):
        return -(-self.num_images // self.batch_size)

    def in_order(self):
        """Yield every image once, in order and unaugmented: ((B, C, H, W) float32 channels last, (B,) int64)."""
        for part, _ in batch_positions(self.num_images, self.batch_size, self.share):
            if part:
                batch = self.tensors.select(slice(part.start, part.stop, part.step))
                yield self.normalized(batch.pixels), batch.labels

    def shuffled(self, seed):
        """Yield every image once, shuffled and, with ``crop_fill``, augmented. ``seed`` alone decides both.

        With each batch comes the number of images that all ranks together have in it. A rank whose share is empty gets
        an image labelled IGNORE_INDEX, since it has to take part in the step.
        """
        # All draws of an epoch are made at once and on the CPU, so that they do not depend on device or batch size.
        generator = torch.Generator().manual_seed(seed)
        count, device = self.num_images, self.tensors.labels.device
        order = torch.randperm(count, generator=generator).to(device)
        offsets = torch.randint(-PAD, PAD + 1, (count, 2), generator=generator).to(device)  # rows, columns
        flips = torch.randint(0, 2, (count,), generator=generator).bool().to(device)
        for part, batch_length in batch_positions(count, self.batch_size, self.share):
            i = slice(part.start, part.stop, part.step) if part else slice(1)
            if self.crop_fill:
                batch = self.crop_and_flip(order[i], offsets[i], flips[i])
            else:
                batch = self.normalized(self.tensors.pixels[order[i]])
            labels = self.tensors.labels[order[i]]
            yield batch, labels if part else torch.full_like(labels, IGNORE_INDEX), batch_length

    def crop_and_flip(self, index, offsets, flips):
        """The images at ``index``, shifted by ``offsets`` (B, 2), then mirrored where ``flips`` (B,) says.

        Shuffling, cropping and flipping are one gather of pixels: image i shows at (row, column) its source pixel
        (row + offset, ±column + offset), or the fill where that lies outside.
        """
        pixels = self.tensors.pixels
        _, height, width, channels = pixels.shape
        columns = torch.arange(width, device=pixels.device)
        rows = torch.arange(height, device=pixels.device) + offsets[:, :1]  # (B, H)
        columns = torch.where(flips[:, None], columns.flip(0), columns) + offsets[:, 1:]  # (B, W)
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
        source = (index[:, None] * height + rows.clamp(0, height - 1))[:, :, None] * width
        source = source + columns.clamp(0, width - 1)[:, None, :]  # (B, H, W), into rows of pixels
        batch = pixels.view(-1, channels)[source]
        if self.crop_fill == "black":
            return self.normalized(batch * inside[..., None])
        return self.normalized(batch) * inside[:, None]


def memory_format(device):
    """That of images and convolutions: channels last, in which all but MPS is faster.

    There, batch norm's backward pass in channels-last memory is wrong, or fails, in many releases of torch.
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
