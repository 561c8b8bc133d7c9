"""Batches on the device: shuffled, cropped, mirrored and shared out as they should be."""

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

import batches
from batches import ImageTensors

NORMALIZE = ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))


def random_images(count=64, size=32, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    return ImageTensors(pixels, torch.arange(count) % classes)


@pytest.mark.parametrize("fill", ["mean", "black"])
def test_crop_and_flip_equal_torchvision_for_every_shift(fill):
    images = random_images(1)
    batches = images.batches(64, NORMALIZE, fill)
    mean, std = ([value / 255 for value in values] for values in NORMALIZE)
    image = images.pixels[0].permute(2, 0, 1)
    for top in range(9):
        for left in range(9):
            for flip in (False, True):
                ours = batches.crop_and_flip(torch.tensor([0]), torch.tensor([[top - 4, left - 4]]), torch.tensor([flip]))
                expected = tv.to_dtype(image, torch.float32, scale=True)
                if fill == "black":  # pad, then normalise
                    expected = tv.normalize(tv.crop(tv.pad(expected, 4), top, left, 32, 32), mean, std)
                else:  # normalise, then pad
                    expected = tv.crop(tv.pad(tv.normalize(expected, mean, std), 4), top, left, 32, 32)
                expected = tv.horizontal_flip(expected) if flip else expected
                torch.testing.assert_close(ours[0], expected, rtol=1e-4, atol=1e-5)


def test_augmentation_is_distributed_as_torchvision_does_it():
    """All 162 outcomes of RandomCrop(10, padding=4) and RandomHorizontalFlip, each as often as torchvision draws it."""
    count, size = 40_000, 10
    one = random_images(1, size)
    many = ImageTensors(one.pixels.repeat(count, 1, 1, 1), one.labels.repeat(count))
    ours = torch.cat([x for x, *_ in many.batches(1000, ((0.0,) * 3, (1.0,) * 3), "black").shuffled(3)])
    transform = v2.Compose([v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip()])
    torch.manual_seed(0)
    theirs = torch.stack([transform(one.pixels[0].permute(2, 0, 1)) for _ in range(count // 4)]).float()
    outcomes, ours_drawn = ours.flatten(1).unique(dim=0, return_counts=True)
    their_outcomes, theirs_drawn = theirs.flatten(1).unique(dim=0, return_counts=True)
    assert len(outcomes) == 162
    assert torch.equal(outcomes, their_outcomes)
    for drawn in (ours_drawn.double(), theirs_drawn.double()):
        expected = drawn.sum() / 162
        chi_squared = ((drawn - expected) ** 2 / expected).sum()
        assert chi_squared < 161 + 4 * (2 * 161) ** 0.5  # 4 standard deviations above the mean


def test_every_image_once_in_an_order_that_the_seed_decides():
    images = random_images(50)
    images.pixels[:, 0, 0, 0] = torch.arange(50)
    batches = images.batches(16, ((0.0,) * 3, (1.0,) * 3))

    def order(seed):
        return torch.cat([x[:, 0, 0, 0] for x, *_ in batches.shuffled(seed)])

    assert sorted(order(1).tolist()) == list(range(50))
    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(1), order(2))
    assert [len(y) for _, y, _ in batches.shuffled(1)] == [16, 16, 16, 2]
    assert len(batches) == 4
    assert torch.equal(torch.cat([y for _, y in batches.in_order()]), images.labels)
    x, y, _ = next(iter(batches.shuffled(5)))
    assert torch.equal(y, images.labels[x[:, 0, 0, 0].long()])


@pytest.mark.parametrize("ranks", [2, 3])
def test_shares_of_the_ranks_make_the_batches_of_one_process(ranks):
    images = random_images(17)  # in batches of 8: 8, 8 and 1, which is fewer than the ranks
    whole = list(images.batches(8, NORMALIZE, "mean").shuffled(4))
    parts = [list(images.batches(8, NORMALIZE, "mean", (rank, ranks)).shuffled(4)) for rank in range(ranks)]
    for step, (x, labels, count) in enumerate(whole):
        assert count == len(x)
        for rank in range(ranks):
            part_x, part_labels, part_count = parts[rank][step]
            assert part_count == count
            if rank < count:
                assert torch.equal(part_x, x[rank::ranks]) and torch.equal(part_labels, labels[rank::ranks])
            else:
                assert part_labels.tolist() == [batches.IGNORE_INDEX]


def test_augmentation_does_not_depend_on_the_batch_size():
    images = random_images(50)
    small, large = (torch.cat([x for x, *_ in images.batches(n, NORMALIZE, "mean").shuffled(9)]) for n in (7, 50))
    assert torch.equal(small, large)


def test_on_mps_nothing_is_channels_last(monkeypatch):
    assert batches.memory_format("mps") is torch.contiguous_format
    monkeypatch.setattr(batches, "memory_format", lambda device: torch.contiguous_format)
    images, _ = next(random_images(8).batches(8, NORMALIZE).in_order())
    assert images.is_contiguous()


def test_normalized_batches_are_channels_last_floats():
    images = random_images(8)
    x, _ = next(images.batches(8, NORMALIZE).in_order())
    assert x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(values) for values in NORMALIZE)
    torch.testing.assert_close(x.permute(0, 2, 3, 1), (images.pixels - mean) / std)
