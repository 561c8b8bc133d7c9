"""Images that stay on disk and are decoded batch by batch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from common.console import Mistake
from inputs.batches import IGNORE_INDEX, ImageTensors, batch_positions, chosen, draw_newer, mix, normalizer, outside
from inputs.decoding import in_workers, leave_signals_to_parent, problem_of, read_all, unchanged, unreadable, without
from inputs.image import Reader, Unreadable, random_box


@dataclass(frozen=True)
class ImageFiles:
    """Image files and labels (N,) int64, decoded when a batch asks for them."""

    paths: list
    labels: torch.Tensor
    reader: Reader
    device: str | torch.device = "cpu"

    def __len__(self):
        return len(self.paths)

    def select(self, index):
        return replace(self, paths=chosen(self.paths, index), labels=self.labels[index])

    @property
    def names(self):
        return self.paths

    @property
    def pixels(self):
        """(N, S, S, C) uint8, as in evaluation, decoded anew."""
        return read_all(self.paths, self.reader)[0]

    def to(self, device):
        return replace(self, device=device)

    def sample(self, count):
        """ImageTensors of about so many images, small, evenly spaced, without those that cannot be read."""
        paths = self.paths[:: max(1, len(self) // count)]
        pixels, problems = read_all(paths, replace(self.reader, image_size=32, progress=False))
        return without(ImageTensors(pixels, torch.zeros(len(paths), dtype=torch.int64)), problems)

    def batches(self, batch_size, normalize, crop_fill=None, share=(0, 1), **newer):
        return StreamedBatches(self, batch_size, normalize, bool(crop_fill), share, **newer)


class StreamedBatches:
    """Batches decoded from files by a DataLoader, whose workers live on; the same interface as Batches.

    Augmentation and evaluation follow ImageNet practice: RandomResizedCrop and a flip; resize to 8/7 and centre crop.
    With mixup, every image is decoded twice: once more as a partner.
    """

    def __init__(self, files, batch_size, normalize, augment, share=(0, 1), cutout=0, mixup=0.0):
        self.files, self.batch_size, self.augment, self.share = files, batch_size, augment, share
        self.cutout, self.mixup = cutout, mixup
        self.normalized = normalizer(normalize, files.device)
        self.num_images = len(files)
        self.plan = []  # positions and seed of each batch of a pass
        self.loader = torch.utils.data.DataLoader(
            DecodedFiles(Paths(files.paths), files.labels, files.reader),
            batch_size=None,
            sampler=self.plan,
            num_workers=files.reader.workers,
            persistent_workers=files.reader.workers > 0,
            pin_memory="cuda" in str(files.device),
            worker_init_fn=leave_signals_to_parent,
            collate_fn=unchanged,
            generator=torch.Generator(),  # not torch's own: dropout must not depend on when the workers were started
        )
        if augment:  # before there are workers, which would each take seconds to import it
            import torchvision.transforms  # noqa: F401

    def __len__(self):
        return -(-self.num_images // self.batch_size)

    def in_order(self):
        parts = [part for part, _ in batch_positions(self.num_images, self.batch_size, self.share) if part]
        yield from self._load([(list(part), None) for part in parts])

    def shuffled(self, seed):
        generator, size = torch.Generator().manual_seed(seed), (self.files.reader.image_size,) * 2
        order = torch.randperm(self.num_images, generator=generator)
        draws = draw_newer(self.num_images, size, self.cutout, self.mixup, generator)
        parts = list(batch_positions(len(order), self.batch_size, self.share))
        shown = [torch.tensor(part or [0]) for part, _ in parts]
        if self.mixup:
            shown = [torch.cat((i, draws["partners"][i])) for i in shown]
        batches = self._load([(order[i].tolist(), seed if self.augment else None) for i in shown])
        for (part, batch_length), i, (images, labels) in zip(parts, shown, batches, strict=True):
            drawn = {name: values[i].to(images.device) for name, values in draws.items()}
            if self.cutout:
                images = images * outside(drawn["centres"], self.cutout, size)[:, None]
            labels = labels if part else torch.full_like(labels, IGNORE_INDEX)
            yield mix(images, labels, batch_length, drawn.get("shares"))

    def _load(self, plan):
        self.plan[:], device = plan, self.files.device
        for pixels, labels in self.loader:
            if isinstance(labels, Mistake):
                raise self._all_unreadable(labels) if isinstance(labels, Unreadable) else labels
            yield self.normalized(pixels.to(device, non_blocking=True)), labels.to(device, non_blocking=True)

    def _all_unreadable(self, first):
        """The Mistake about all files that cannot be read, of which one has been met."""
        found = in_workers(problem_of, self.files.paths, self.files.reader, "checking images")
        return unreadable([str(problem) for problem in found if isinstance(problem, Unreadable)] or [str(first)])


class Paths(Sequence):
    """Paths as one array of bytes: a million objects would be copied to every worker, one by one."""

    def __init__(self, paths):
        names = [os.fsencode(path) for path in paths]
        self.names = np.frombuffer(b"".join(names), np.uint8)
        self.ends = np.cumsum([0, *map(len, names)])

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        return os.fsdecode(self.names[self.ends[i] : self.ends[i + 1]].tobytes())


class DecodedFiles(torch.utils.data.Dataset):
    """Item (positions, seed): pixels (B, S, S, C) uint8 and labels (B,) of those files, or None and a Mistake.

    With a seed, images are augmented: what is random for image i depends on (seed, i) alone, not on workers.
    """

    def __init__(self, paths, labels, reader):
        self.paths, self.labels, self.reader = paths, labels, reader

    def __getitem__(self, batch):
        positions, seed = batch
        try:
            pixels = [self.read(i, seed) for i in positions]
        except Mistake as error:  # raised here, it would reach the parent with this process's traceback in its message
            return None, error
        return torch.from_numpy(np.stack(pixels)), self.labels[positions]

    def read(self, i, seed):
        reader, path = self.reader, self.paths[i]
        if seed is None:
            return reader.read(path)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the GPU, too, where the masks of dropout are drawn.
            torch.default_generator.manual_seed((seed * 1_000_003 + i) % 2**63)
            pixels = reader.read(path, random_box)
            return pixels[:, ::-1] if torch.rand(1) < 0.5 else pixels
