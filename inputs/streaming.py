"""Images that stay on disk and are decoded batch by batch."""

import os
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from common.console import forget_workers
from inputs.batches import FLIPS, POLICIES, Batches, chosen, outside
from inputs.decoding import attempt, make_loader, read_all, unreadable
from inputs.image import Reader, Unreadable, random_box


@dataclass(frozen=True)
class ImageFiles:
    """Image files, by their paths, and labels (N,) int64, decoded when a batch asks for them."""

    names: list
    labels: torch.Tensor
    reader: Reader
    device: str | torch.device = "cpu"

    def __len__(self):
        return len(self.names)

    def select(self, index):
        return replace(self, names=chosen(self.names, index), labels=self.labels[index])

    @property
    def size(self):
        return (self.reader.image_size,) * 2

    @property
    def pixels(self):
        """(N, S, S, C) uint8, as in evaluation, decoded anew."""
        return read_all(self.names, self.reader)[0]

    def to(self, device):
        return replace(self, device=device)

    def batches(self, *args, **options):
        return StreamedBatches(self, *args, **options)


class StreamedBatches(Batches):
    """Batches decoded from files by a DataLoader, whose workers live on.

    As usual for ImageNet, augmentation, on with any ``crop_fill``, is RandomResizedCrop, a flip and the ``policy``, if
    any; evaluation is a resize to 8/7 and a centre crop. With mixup, every image is decoded twice: also as a partner.
    """

    def __init__(self, files, *args, **options):
        super().__init__(files, *args, **options)
        self.plan = []  # positions and seed of each batch of a pass
        decoded, workers = DecodedFiles(files, self.flip, self.policy), files.reader.workers
        options = {"persistent_workers": workers > 0, "pin_memory": "cuda" in str(files.device)}
        self.loader = make_loader(decoded, workers, sampler=self.plan, **options)
        if self.crop_fill:  # now, or each worker would take seconds to import it
            import torchvision.transforms.v2  # noqa: F401

    def draw_crops(self, generator):  # DecodedFiles draws them
        return {}

    def load(self, plan, seed=None):
        files, seed = self.images, seed if self.crop_fill else None
        self.plan[:] = [(shown["order"].tolist(), seed) for shown in plan]
        for shown, batch in zip(plan, self.loader, strict=True):
            if isinstance(batch, Unreadable):  # name all of them, not only the first
                raise unreadable(read_all(files.names, files.reader, keep=False)[1].values() or [str(batch)])
            if isinstance(batch, Exception):
                forget_workers()  # which may still be waiting to try again
                raise batch
            pixels, labels = (part.to(files.device, non_blocking=True) for part in batch)
            images = self.normalized(pixels)
            if "centres" in shown:
                images = images * outside(shown["centres"].to(images.device), self.cutout, files.size)[:, None]
            yield images, labels


class DecodedFiles(torch.utils.data.Dataset):
    """Item (positions, seed): pixels (B, S, S, C) uint8 and labels (B,) of those files, or the error.

    With a seed, images are augmented: what is random for image i depends on (seed, i) alone, not on workers.
    """

    def __init__(self, files, flip="horizontal", policy=None):
        # One array of bytes: a million objects would be copied to every worker, one by one.
        self.paths = np.array([os.fsencode(path) for path in files.names])
        self.labels, self.reader, self.flip, self.policy = files.labels, files.reader, flip, policy

    def __getitem__(self, batch):
        return attempt(self.decode, *batch)

    def decode(self, positions, seed):
        return torch.from_numpy(np.stack([self.read(i, seed) for i in positions])), self.labels[positions]

    def read(self, i, seed):
        reader, path = self.reader, os.fsdecode(self.paths[i])
        if seed is None:
            return reader.read(path)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the GPU, too, which draws the masks of dropout.
            torch.default_generator.manual_seed((seed * 1_000_003 + i) % 2**63)
            pixels = reader.read(path, cache(random_box))  # a second attempt takes the same box
            pixels = np.flip(pixels, [axis for axis in FLIPS[self.flip] if torch.rand(1) < 0.5])
            return by_policy(self.policy, pixels) if self.policy else pixels


def by_policy(name, pixels):
    """(S, S, C) uint8, changed by one of POLICIES, which draws from torch's generator."""
    from torchvision.transforms import v2

    policy = getattr(v2, POLICIES[name])(interpolation=v2.InterpolationMode.BILINEAR)
    return np.array(policy(v2.functional.to_pil_image(pixels))).reshape(pixels.shape)
