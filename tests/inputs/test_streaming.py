"""Images that stay on disk, behind the interface of those in memory."""

import multiprocessing
import os
import pickle
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import NORMALIZE, photo, random_images, write_folder
from PIL import Image, ImageOps
from test_decoding import damage
from torchvision.transforms import v2

import train
from inputs import datasets, streaming
from inputs.batches import POLICIES
from inputs.image import Reader


def load(root, size=(140, 130), **options):
    return datasets.load("folder", write_folder(root, size=size), Reader(128, **options))


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_evaluate_every_image_once(ranks, tmp_path):
    for images in (random_images(17), load(tmp_path).train):
        shares = [images.batches(4, NORMALIZE, share=(rank, ranks)) for rank in range(ranks)]
        labels = torch.cat([y for batches in shares for _, y in batches.in_order()])
        assert torch.equal(labels.sort()[0], images.labels.sort()[0])


def test_streamed_images_are_cut_out_and_mixed(tmp_path):
    """As those in memory, of which test_batches.py has more; several ranks make the batches of one process."""
    dataset = load(tmp_path, (300, 200))

    def batches(share=(0, 1), **newer):
        return list(dataset.train.batches(6, dataset.normalize, "mean", share, **newer).shuffled(1))

    [(x, labels, _)], [(cut, *_)] = batches(), batches(cutout=40)
    assert (cut[cut != x] == 0).all() and 0 < (cut != x).any(1).sum((1, 2)).amax() <= 40 * 40
    [(mixed, own, count, partners, lam)] = batches(cutout=40, mixup=0.5)
    assert torch.equal(own, labels) and count == 6 and lam.min() >= 0.5
    all_pairs = torch.lerp(cut[None], cut[:, None], lam.view(-1, 1, 1, 1, 1))
    is_pair = (mixed[:, None] - all_pairs).abs().amax((2, 3, 4)) < 1e-5
    assert (is_pair & (labels == partners[:, None])).any(1).all()
    assert all(torch.equal(batches((rank, 2), cutout=40, mixup=0.5)[0][0], mixed[rank::2]) for rank in (0, 1))


@pytest.mark.parametrize("policy", [None, "rand"])
def test_large_images_are_streamed_behind_the_same_interface(tmp_path, policy):
    dataset = load(tmp_path, (300, 200))
    batches = dataset.train.batches(4, dataset.normalize, "mean", policy=policy)
    assert len(batches) == 2
    first = list(batches.shuffled(1))
    assert [x.shape for x, *_ in first] == [(4, 3, 128, 128), (2, 3, 128, 128)]
    # The same images and augmentation whatever the batch size and the number of workers, others for another seed.
    other = datasets.load("folder", tmp_path, Reader(128, workers=2)).train.batches(6, dataset.normalize, "mean", policy=policy)
    [(x, y, _)] = other.shuffled(1)
    assert torch.equal(x, torch.cat([x for x, *_ in first])) and torch.equal(y, torch.cat([y for _, y, _ in first]))
    assert not torch.equal(x, next(other.shuffled(2))[0])
    largest = (2**32 - 1) * 1_000_003 + 300  # what train.py makes of the largest --seed
    assert len(list(batches.shuffled(largest))) == 2
    assert sorted(torch.cat([y for _, y, _ in first]).tolist()) == [0, 0, 0, 1, 1, 1]
    labels = torch.cat([y for _, y in dataset.limit(train=3).train.batches(4, dataset.normalize).in_order()])
    assert labels.tolist() == [0, 1, 0]


def test_workers_live_on_from_epoch_to_epoch(tmp_path):
    dataset = load(tmp_path, workers=2)
    batches, before = dataset.train.batches(2, dataset.normalize), set(multiprocessing.active_children())
    state, passes, workers = torch.get_rng_state(), [], []
    for _ in range(2):
        passes.append(torch.cat([x for x, _ in batches.in_order()]))
        workers.append(set(multiprocessing.active_children()) - before)
    pixels, labels = next(iter(batches.loader))  # left before its end
    assert not pixels.is_shared() and not labels.is_shared()  # /dev/shm has 64 MB in a container
    assert torch.equal(torch.cat([x for x, _ in batches.in_order()]), passes[0])
    assert torch.equal(*passes) and workers[0] == workers[1] and len(workers[0]) == 2
    assert torch.equal(torch.get_rng_state(), state)  # the masks of dropout are drawn from it


def test_a_worker_gets_paths_in_one_array():
    names = [f"train/class{i % 1000}/image{i:05}.jpeg" for i in range(10_000)] + ["ä/ü.png", os.fsdecode(b"\xff.png")]
    decoded = streaming.DecodedFiles(streaming.ImageFiles(names, torch.zeros(0), Reader(128)))
    assert [os.fsdecode(path) for path in decoded.paths] == names
    assert len(pickle.dumps(decoded)) < len(names) * max(map(len, names)) + 1000


@pytest.mark.parametrize("damaged", [True, False])
def test_a_streamed_file_that_cannot_be_read_ends_training_in_one_line(tmp_path, capfd, monkeypatch, damaged):
    """One line names what is damaged, or what the system says; --skip-unreadable goes on without the first alone."""
    root = write_folder(tmp_path / "images", size=(130, 130))
    if damaged:
        damage(root)
    else:
        monkeypatch.setattr(Image.Image, "resize", Mock(side_effect=OSError(5, "Input/output error")))
    flags = "--device cpu --dataset folder --image-size 128 --depth 10 --growth-rate 4 --no-plot --no-progress --save run --workers 2"
    command = [*flags.split(), "--data", str(root)]
    assert train.main(command) == (2 if damaged else 1)
    expected, err = "3 images cannot be read" if damaged else f"{root}/train/", capfd.readouterr().err
    assert err.startswith(f"train.py: error: {expected}") and "epoch 0 is saved" in err and err.count("\n") == 1
    assert train.main([*command, "--overwrite", "--epochs", "1", "--skip-unreadable"]) == (0 if damaged else 1)


@pytest.mark.parametrize(("flip", "shares"), [("horizontal", (0, 0.5)), ("vertical", (0.5, 0)), ("both", (0.5, 0.5)), ("none", (0, 0))])
def test_streamed_images_are_mirrored_half_of_the_time(tmp_path, flip, shares):
    """They are brighter at the bottom, and to the right."""
    rows, columns = np.mgrid[:200, :200]
    Image.fromarray((rows / 2 + columns / 2).astype(np.uint8)).save(tmp_path / "image.png")
    stream = streaming.ImageFiles([tmp_path / "image.png"] * 200, torch.zeros(200, dtype=torch.int64), Reader(128, channels=1))
    batches = stream.batches(200, ((0.0,), (1.0,)), "mean", flip=flip)
    [(x, _, _)] = batches.shuffled(1)
    mirrored = x[:, 0, 8, 64] > x[:, 0, -8, 64], x[:, 0, 64, 8] > x[:, 0, 64, -8]
    assert [one.float().mean().item() for one in mirrored] == pytest.approx(shares, abs=0.15)
    [(x, _)] = batches.in_order()
    assert (x[:, 0, 64, 8] < x[:, 0, 64, -8]).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_follows_crops_and_mirroring(tmp_path, monkeypatch, policy, channels):
    photo(200, 150).save(tmp_path / "image.png")
    files = streaming.ImageFiles([tmp_path / "image.png"] * 8, torch.zeros(8), Reader(128, channels=channels))

    def pixels(policy):
        return streaming.DecodedFiles(files, policy=policy).decode(range(8), seed=1)[0]

    changed, plain = pixels(policy), pixels(None)
    assert changed.shape == plain.shape and (changed != plain).any()
    monkeypatch.setattr(v2, POLICIES[policy], lambda **options: ImageOps.invert)
    assert torch.equal(pixels(policy), 255 - plain)
