"""Batches on the device: shuffled, cropped, mirrored and shared out as they should be."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import NORMALIZE, random_images
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from inputs import batches
from inputs.batches import ImageTensors


@pytest.mark.parametrize("fill", ["mean", "black"])
def test_crop_and_flip_equal_torchvision_for_every_shift(fill):
    images = random_images(1)
    batches, image = images.batches(64, NORMALIZE, fill), images.pixels[0].permute(2, 0, 1) / 255
    mean, std = ([value / 255 for value in values] for values in NORMALIZE)
    for top, left, down, flip in itertools.product(range(9), range(9), (False, True), (False, True)):
        ours = batches.augmented(torch.tensor([0]), torch.tensor([[top - 4, left - 4]]), torch.tensor([[down, flip]]))
        if fill == "black":  # pad, then normalise
            expected = tv.normalize(tv.crop(tv.pad(image, 4), top, left, 32, 32), mean, std)
        else:  # normalise, then pad
            expected = tv.crop(tv.pad(tv.normalize(image, mean, std), 4), top, left, 32, 32)
        expected = tv.horizontal_flip(expected) if flip else expected
        expected = tv.vertical_flip(expected) if down else expected
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
    assert len(outcomes) == 162 and torch.equal(outcomes, their_outcomes)
    assert all(scipy.stats.chisquare(drawn).pvalue > 1e-4 for drawn in (ours_drawn, theirs_drawn))


def test_every_image_once_in_an_order_that_the_seed_decides():
    images = random_images(50)
    images.pixels[:, 0, 0, 0] = torch.arange(50)
    batches = images.batches(16, ((0.0,) * 3, (1.0,) * 3))

    def order(seed):
        return torch.cat([x[:, 0, 0, 0] for x, *_ in batches.shuffled(seed)])

    assert sorted(order(1).tolist()) == list(range(50))
    assert torch.equal(order(1), order(1)) and not torch.equal(order(1), order(2))
    assert [len(y) for _, y, _ in batches.shuffled(1)] == [16, 16, 16, 2] and len(batches) == 4
    assert torch.equal(torch.cat([y for _, y in batches.in_order()]), images.labels)
    x, y, _ = next(iter(batches.shuffled(5)))
    assert torch.equal(y, images.labels[x[:, 0, 0, 0].long()])


@pytest.mark.parametrize("newer", [{}, {"cutout": 9, "mixup": 0.5}], ids=str)
@pytest.mark.parametrize("ranks", [2, 3])
def test_shares_of_the_ranks_make_the_batches_of_one_process(ranks, newer):
    images = random_images(17)  # in batches of 8: 8, 8 and 1, which is fewer than the ranks
    whole = list(images.batches(8, NORMALIZE, "mean", **newer).shuffled(4))
    parts = [list(images.batches(8, NORMALIZE, "mean", (rank, ranks), **newer).shuffled(4)) for rank in range(ranks)]
    for step, (x, labels, count, *mixed) in enumerate(whole):
        assert count == len(x) and len(mixed) == 2 * bool(newer)
        for rank in range(ranks):
            part_x, part_labels, part_count, *part_mixed = parts[rank][step]
            assert part_count == count
            if rank < count:
                for part, tensor in zip((part_x, part_labels, *part_mixed), (x, labels, *mixed), strict=True):
                    assert torch.equal(part, tensor[rank::ranks])
            else:
                assert part_labels.tolist() == [batches.IGNORE_INDEX] and part_mixed[:1] in ([], [part_labels])
    [(at_once, *_)] = images.batches(17, NORMALIZE, "mean", **newer).shuffled(4)
    assert torch.equal(at_once, torch.cat([x for x, *_ in whole]))  # whatever the batch size


def test_cutout_hides_a_square_around_each_pixel_equally_often():
    """All 7·7 centres of a 3×3 square, at the border with less of it in the image; the rest of the image is as it was."""
    images = random_images(1, 7).select(torch.zeros(20_000, dtype=torch.int64))
    plain, cut = (next(iter(images.batches(20_000, NORMALIZE, cutout=n).shuffled(3)))[0] for n in (0, 3))
    hidden = (cut != plain).all(1)  # (N, 7, 7): no channel of a random pixel is the mean exactly
    assert (cut[(cut != plain)] == 0).all()
    rows, columns = (hidden.any(dim).float() for dim in (2, 1))
    assert torch.equal(hidden, (rows[:, :, None] * columns[:, None, :]).bool())
    middle = [torch.where(side.sum(1) == 3, (side * torch.arange(7)).sum(1) / 3, 6 * side[:, -1]) for side in (rows, columns)]
    centres = (middle[0] * 7 + middle[1]).long()
    assert scipy.stats.chisquare(centres.bincount(minlength=49)).pvalue > 1e-3
    black = next(iter(images.batches(20_000, NORMALIZE, "black", cutout=3).shuffled(3)))[0]
    shifted, both = (next(iter(images.batches(20_000, NORMALIZE, "mean", cutout=n).shuffled(3)))[0] for n in (0, 3))
    assert (both[both != shifted] == 0).all() and torch.equal((both == 0).all(1), (shifted == 0).all(1) | hidden)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALIZE)
    assert torch.allclose(black.amin((0, 2, 3)), (-mean / std).flatten())


def test_mixup_s_draws_are_beta_and_every_image_is_a_partner_once():
    images = random_images(20_000, 4, classes=20_000)
    images.pixels[:] = torch.arange(20_000).view(-1, 1, 1, 1) % 251
    plain, mixed = (images.batches(20_000, ((0.0,) * 3, (1.0,) * 3), mixup=alpha) for alpha in (0, 0.4))
    [(x, labels, _)], [(mixture, own, count, partners, share)], [(*_, other)] = plain.shuffled(3), mixed.shuffled(3), mixed.shuffled(4)
    assert count == 20_000 and torch.equal(own, labels) and torch.equal(x[:, 0, 0, 0], own % 251.0)
    assert sorted(partners.tolist()) == list(range(20_000)) and (partners != own).float().mean() > 0.99
    torch.testing.assert_close(mixture[:, 0, 0, 0], share * (own % 251) + (1 - share) * (partners % 251))
    assert share.min() >= 0.5  # the larger one of two shares, whose distribution function is F(x) - F(1 - x)
    beta = scipy.stats.beta(0.4, 0.4)
    assert scipy.stats.kstest(np.double(share), lambda x: beta.cdf(x) - beta.cdf(1 - x)).pvalue > 1e-3
    assert mixture.is_contiguous(memory_format=torch.channels_last) and not torch.equal(other, share)


def test_batches_lie_in_memory_as_is_best_for_the_device(monkeypatch):
    images = random_images(8)
    [(x, _)] = images.batches(8, NORMALIZE).in_order()
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(values) for values in NORMALIZE)
    torch.testing.assert_close(x.permute(0, 2, 3, 1), (images.pixels - mean) / std)
    assert batches.memory_format("mps") is torch.contiguous_format
    monkeypatch.setattr(batches, "memory_format", lambda device: torch.contiguous_format)
    assert next(images.batches(8, NORMALIZE).in_order())[0].is_contiguous()
