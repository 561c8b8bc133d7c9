"""Image files: listed, decoded, cached and streamed."""

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import NORMALIZE, random_images, write_folder
from PIL import Image

import check_data
from common.console import Mistake
from inputs import datasets, decoding, folders, splits, streaming
from inputs.image import Reader


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_evaluate_every_image_once(ranks, tmp_path):
    streamed = datasets.load("folder", write_folder(tmp_path, size=(140, 130)), Reader(128)).train
    for images in (random_images(17), streamed):
        shares = [images.batches(4, NORMALIZE, share=(rank, ranks)) for rank in range(ranks)]
        labels = torch.cat([y for batches in shares for _, y in batches.in_order()])
        assert torch.equal(labels.sort()[0], images.labels.sort()[0])




@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
def test_folder_of_any_size_and_mode(tmp_path, mode):
    dataset = datasets.load("folder", write_folder(tmp_path, mode=mode), Reader(16))
    assert dataset.classes == ["cat", "dog"]
    assert dataset.train.pixels.shape == (6, 16, 16, 3)
    assert dataset.train.labels.tolist() == [0, 1, 0, 1, 0, 1]  # classes alternate, so that --limit-train is fair
    if mode == "RGB":
        assert dataset.train.pixels[1, 5, 5].tolist() == [60, 0, 200]
        mean, std = splits.measure(dataset.train.pixels)
        assert std[2] == 0  # all images have the same blue, which is then only shifted
        assert dataset.normalize == (mean, (*std[:2], 1.0))


def test_sixteen_bits_a_pixel_are_scaled_not_cut_off(tmp_path):
    Image.fromarray(np.full((4, 4), 30000, dtype=np.uint16)).save(tmp_path / "grey.png")
    assert torch.from_numpy(Reader(4).read(tmp_path / "grey.png")).unique().tolist() == [round(30000 / 257)]


def test_folder_cache_is_used_and_notices_changes(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path)
    first = datasets.load("folder", tmp_path, Reader(16)).train.pixels
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read", lambda *args: pytest.fail("decoded again"))
        assert torch.equal(datasets.load("folder", tmp_path, Reader(16)).train.pixels, first)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "train" / "cat" / "0.png")
    assert datasets.load("folder", tmp_path, Reader(16)).train.pixels[0, 0, 0].tolist() == [1, 2, 3]

    cache = tmp_path / ".train-16.cache"
    cache.write_bytes(cache.read_bytes()[:100])
    assert len(datasets.load("folder", tmp_path, Reader(16)).train) == 6
    assert "decoding the images again" in capsys.readouterr().err
    names = [".cache.lock", ".test-16.cache", ".train-16.cache", "test", "train"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_folder_mistakes_are_named(tmp_path):
    with pytest.raises(Mistake, match="train is missing"):
        datasets.load("folder", tmp_path / "nowhere")
    root = write_folder(tmp_path / "a")
    (root / "test" / "dog").rename(root / "test" / "wolf")
    with pytest.raises(Mistake, match=r"a/test has class folders that .*a/train images have not: wolf"):
        datasets.load("folder", root)
    root = write_folder(tmp_path / "b")
    (root / "train" / "eel").mkdir()
    with pytest.raises(Mistake, match=r"eel holds no image"):
        datasets.load("folder", root)
    with pytest.raises(Mistake, match="found one class, cat"):
        datasets.load("folder", write_folder(tmp_path / "c", classes=("cat",)))
    root = write_folder(tmp_path / "d")
    (root / "train" / "dog" / "1.png").write_bytes((root / "train" / "dog" / "0.png").read_bytes()[:60])
    with pytest.raises(Mistake, match=r"dog/1.png is not a readable image"):
        datasets.load("folder", root)


def test_an_image_with_far_too_many_pixels_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(Mistake, match=r"cat/0.png is not a readable image.*DecompressionBombError"):
        datasets.load("folder", write_folder(tmp_path))


def test_a_read_only_folder_is_decoded_without_a_cache(tmp_path, monkeypatch, capsys):
    root = write_folder(tmp_path)

    def refuse(*args, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert len(datasets.load("folder", root).train) == 6
    assert capsys.readouterr().err.count("cannot be written ([Errno 30] Read-only file system)") == 2


@pytest.mark.parametrize("size", [32, 128])
def test_test_images_load_without_the_training_images(tmp_path, size):
    whole = datasets.load("folder", write_folder(tmp_path), Reader(size))
    shutil.rmtree(tmp_path / "train")
    images, notes = datasets.load_test("folder", tmp_path, Reader(size), whole.classes)
    assert notes == [] and torch.equal(images.labels, whole.test.labels)
    assert size == 128 or torch.equal(images.pixels, whole.test.pixels)


def test_folder_too_large_for_memory_says_how_much_it_needs(tmp_path, monkeypatch):
    memory = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(datasets.psutil, "virtual_memory", lambda: memory)
    with pytest.raises(Mistake, match=r"10 images of 100×100 pixels need 0.0 GB of memory, of which 0.0 GB"):
        datasets.load("folder", write_folder(tmp_path), Reader(100))


def test_streamed_images_are_cut_out_and_mixed(tmp_path):
    """As those in memory, of which tests/test_batches.py has more; several ranks make the batches of one process."""
    dataset = datasets.load("folder", write_folder(tmp_path, size=(300, 200)), Reader(128))

    def batches(size=6, share=(0, 1), **newer):
        return list(dataset.train.batches(size, dataset.normalize, "mean", share, **newer).shuffled(1))

    [(x, labels, _)], [(cut, *_)] = batches(), batches(cutout=40)
    assert (cut[cut != x] == 0).all() and 0 < (cut != x).any(1).sum((1, 2)).amax() <= 40 * 40
    [(mixed, own, count, partners, share)] = batches(cutout=40, mixup=0.5)
    assert torch.equal(own, labels) and count == 6 and share.min() >= 0.5
    all_pairs = torch.lerp(cut[None], cut[:, None], share.view(-1, 1, 1, 1, 1))
    is_pair = (mixed[:, None] - all_pairs).abs().amax((2, 3, 4)) < 1e-5
    assert (is_pair & (labels == partners[:, None])).any(1).all()
    whole, *parts = (batches(4, share, cutout=40, mixup=0.5) for share in ((0, 1), (0, 2), (1, 2)))
    for step, batch in enumerate(whole):
        for rank, part in enumerate(parts):
            assert all(torch.equal(mine, all_[rank::2]) for mine, all_ in zip(part[step], batch, strict=True) if torch.is_tensor(mine))


def test_large_images_are_streamed_behind_the_same_interface(tmp_path):
    root = write_folder(tmp_path, size=(300, 200))
    dataset = datasets.load("folder", root, Reader(128))
    batches = dataset.train.batches(4, dataset.normalize, "mean")
    assert len(batches) == 2
    first = list(batches.shuffled(1))
    assert [x.shape for x, *_ in first] == [(4, 3, 128, 128), (2, 3, 128, 128)]
    # The same images and augmentation whatever the batch size and the number of workers, others for another seed.
    other = datasets.load("folder", root, Reader(128, workers=2)).train.batches(6, dataset.normalize, "mean")
    [(x, y, _)] = other.shuffled(1)
    assert torch.equal(x, torch.cat([x for x, *_ in first])) and torch.equal(y, torch.cat([y for _, y, _ in first]))
    assert not torch.equal(x, next(other.shuffled(2))[0])
    largest = (2**32 - 1) * 1_000_003 + 300  # what train.py makes of the largest --seed
    assert len(list(batches.shuffled(largest))) == 2
    assert sorted(torch.cat([y for _, y, _ in first]).tolist()) == [0, 0, 0, 1, 1, 1]
    labels = torch.cat([y for _, y in dataset.limit(train=3).train.batches(4, dataset.normalize).in_order()])
    assert labels.tolist() == [0, 1, 0]
    held = dataset.hold_out(2, seed=1)
    assert (len(held.train), len(held.valid)) == (4, 2)


def test_workers_live_on_from_epoch_to_epoch(tmp_path):
    dataset = datasets.load("folder", write_folder(tmp_path, size=(130, 130)), Reader(128, workers=2))
    batches, before = dataset.train.batches(2, dataset.normalize), set(multiprocessing.active_children())
    state, passes, workers = torch.get_rng_state(), [], []
    for _ in range(2):
        passes.append(torch.cat([x for x, _ in batches.in_order()]))
        workers.append(set(multiprocessing.active_children()) - before)
    next(batches.in_order())  # left before its end
    assert torch.equal(torch.cat([x for x, _ in batches.in_order()]), passes[0])
    assert torch.equal(*passes) and workers[0] == workers[1] and len(workers[0]) == 2
    assert torch.equal(torch.get_rng_state(), state)  # the masks of dropout are drawn from it


def test_a_worker_gets_paths_in_one_array():
    names = ["a/b.png", "ä/ü.png", os.fsdecode(b"\xff.png"), ""]
    assert list(streaming.Paths(map(Path, names[:3]))) == names[:3] and streaming.Paths(names)[3] == ""
    paths = [f"train/class{i % 1000}/image{i}.jpeg" for i in range(10_000)]
    assert list(streaming.Paths(paths)) == paths
    assert len(pickle.dumps(streaming.Paths(paths))) < sum(map(len, paths)) + 9 * len(paths)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_streamed_image_is_named_in_one_line(tmp_path, workers):
    root = write_folder(tmp_path, size=(130, 130))
    (root / "train" / "dog" / "1.png").write_bytes(b"no image")
    dataset = datasets.load("folder", root, Reader(128, workers=workers))
    with pytest.raises(Mistake, match=r"^[^\n]*dog/1.png is not a readable image[^\n]*$"):
        list(dataset.train.batches(4, dataset.normalize).in_order())


def listed(folder):
    passed = Counter()
    return folders.list_images(folder, passed), passed


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, format="PNG")


def test_class_folders_are_searched_to_any_depth_and_nothing_is_passed_over_in_silence(tmp_path):
    wanted = [tmp_path / name for name in ("cat/2.PNG", "cat/a/3.webp", "cat/a/b/1.jfif", "dog/1.gif")]
    touch(*wanted, tmp_path / "cat/.hidden.png", tmp_path / "cat/._2.png", tmp_path / ".trash/1.png")
    for name in ("cat/photo.heic", "cat/notes.txt", "dog/more.heic", "dog/README", "dog/data.h5", "labels.csv"):
        (tmp_path / name).write_text("x")
    (tmp_path / "none").mkdir()
    classes, passed = listed(tmp_path)
    assert classes == {"cat": [str(path) for path in wanted[:3]], "dog": [str(wanted[3])], "none": []}
    assert passed == {".heic": 2, ".txt": 1, "no suffix": 1, ".h5": 1, ".csv": 1}


def test_what_is_passed_over_is_told_once(tmp_path):
    root = write_folder(tmp_path)
    for split in ("train", "test"):
        (root / split / "cat/photo.heic").write_text("x")
    (root / "train/cat/notes.txt").write_text("x")
    assert datasets.load("folder", root).notes == ["passed over 3 files: .heic 2, .txt 1"]


def commands_on(root):
    """(name of a command, how to call it, on a folder) for each that reads folders."""
    import evaluate
    import train

    network = "--device cpu --depth 10 --growth-rate 4 --epochs 1 --no-plot --no-progress --save run".split()
    yield "train.py", train.main, ["--dataset", "folder", "--data", str(root), *network]
    yield "data.py", check_data.main, ["--data", str(root), "--check"]
    if Path("trained/latest.pth").exists():
        yield "evaluate.py", evaluate.main, ["trained/latest.pth", "--data", str(root)]


def broken_link(root):
    (root / "test/cat/x.png").symlink_to("nowhere")
    return "x.png is a broken link"


def loop_of_links(root):
    (root / "test/cat/again").symlink_to(root / "test/cat")
    return "again is a link to a folder that it is in"


def link_to_itself(root):
    (root / "test/cat/self.png").symlink_to("self.png")
    return "self.png is a broken link"


def folder_without_permission(root):
    (root / "test/cat/secret").mkdir()
    return "secret cannot be read: Permission denied"


@pytest.mark.parametrize("damage", [broken_link, loop_of_links, link_to_itself, folder_without_permission])
def test_odd_entries_of_folders_are_one_line_for_every_command(tmp_path, capsys, monkeypatch, damage):
    import train

    root = write_folder(tmp_path / "images")
    network = "--device cpu --depth 10 --growth-rate 4 --epochs 1 --no-plot --no-progress --save trained".split()
    assert train.main(["--dataset", "folder", "--data", str(root), *network]) == 0
    words, real = damage(root), folders.os.scandir

    def scandir(path):
        if str(path).endswith("secret"):  # root may read everything
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(folders.os, "scandir", scandir)
    capsys.readouterr()
    called = list(commands_on(root))
    assert len(called) == 3
    for name, main, flags in called:
        assert main(flags) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"{name}: error: ") and words in err and err.count("\n") == 1


def test_names_that_are_not_utf_8(tmp_path, capsys):
    """A class and a file in Latin-1: they are trained on, evaluated and shown as well as a console can."""
    import evaluate
    import train

    root, name = write_folder(tmp_path / "images", classes=("cat", "hund")), b"k\xf6ter"
    for split in ("train", "test"):
        folder = os.fsencode(root / split)
        os.rename(folder + b"/hund", folder + b"/" + name)
        os.rename(folder + b"/" + name + b"/0.png", folder + b"/" + name + b"/\xe4.png")
    network = "--device cpu --depth 10 --growth-rate 4 --epochs 1 --no-plot --no-progress --save run".split()
    assert train.main(["--dataset", "folder", "--data", str(root), *network]) == 0
    assert evaluate.main(["run/latest.pth"]) == 0
    assert evaluate.main(["run/latest.pth", os.fsdecode(os.fsencode(root / "test") + b"/" + name + b"/\xe4.png")]) == 0
    assert check_data.main(["--data", str(root), "--check"]) == 1  # the test images are among the training images
    assert "k?ter/?.png = " in capsys.readouterr().out


def damage(root):
    """Three unreadable training images."""
    for name in ("cat/0.png", "cat/1.png", "dog/2.png"):
        (root / "train" / name).write_bytes(b"no image")
    return root


@pytest.mark.parametrize("image_size", [32, 128])
@pytest.mark.parametrize("workers", [0, 2])
def test_all_unreadable_images_are_reported_together(tmp_path, image_size, workers):
    root = damage(write_folder(tmp_path, size=(140, 130)))
    with pytest.raises(Mistake, match=r"^3 images cannot be read: [^\n]*cat/0.png[^\n]*dog/2.png[^\n]*--skip-unreadable$"):
        dataset = datasets.load("folder", root, Reader(image_size, workers=workers))
        list(dataset.train.batches(4, dataset.normalize, "mean").shuffled(1))
    dataset = datasets.load("folder", root, Reader(image_size, workers=workers, skip_unreadable=True))
    assert dataset.notes == [f"{root / 'train'}: skipped 3 unreadable images: cat 2, dog 1"]
    assert dataset.train.labels.tolist() == [1, 1, 0]
    assert len(list(dataset.train.batches(4, dataset.normalize, "mean").shuffled(1))) == 1
    again = datasets.load("folder", root, Reader(image_size, skip_unreadable=True))  # from the cache
    assert again.notes == dataset.notes and torch.equal(again.train.labels, dataset.train.labels)


def test_only_the_first_ten_unreadable_images_are_named(tmp_path):
    root = write_folder(tmp_path, train=8)
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(Mistake, match=r"^16 images cannot be read: ([^;]*; ){10}…: "):
        datasets.load("folder", root)


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.slow), "2"])
def test_a_corrupt_streamed_file_ends_training_in_one_line(tmp_path, workers):
    damage(write_folder(tmp_path / "images", size=(130, 130)))
    flags = "--device cpu --dataset folder --data images --image-size 128 --depth 10 --growth-rate 4 --no-plot --save run"
    command = [sys.executable, ROOT / "train.py", *flags.split(), "--workers", workers]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "train.py: error: 3 images cannot be read" in result.stderr and "epoch 0 is saved" in result.stderr
    assert subprocess.run([*command, "--overwrite", "--epochs", "1", "--skip-unreadable"], capture_output=True).returncode == 0


def test_the_cache_notices_every_change(tmp_path, monkeypatch, capsys):
    root = write_folder(tmp_path)
    first = datasets.load("folder", root, Reader(16)).train.pixels
    path = root / "train/cat/0.png"
    times, size = path.stat(), path.stat().st_size
    old = path.read_bytes()
    for colour in range(256):  # a file of the same size, with other pixels
        Image.new("RGB", (40, 20), (colour, 9, 9)).save(path)
        if path.stat().st_size == size and path.read_bytes() != old:
            break
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == size and path.stat().st_mtime_ns == times.st_mtime_ns
    changed = datasets.load("folder", root, Reader(16)).train.pixels
    assert not torch.equal(changed, first)

    decoded, real = [], Reader.read
    monkeypatch.setattr(Reader, "read", lambda *args: decoded.append(args) or real(*args))
    for reader, count in ((Reader(16), 0), (Reader(16, white=9.0), 10), (Reader(16, channels=1), 10), (Reader(16), 6 + 4)):
        decoded.clear()
        datasets.load("folder", root, reader)
        assert len(decoded) == count  # the caches of colour and grey images are two, those of two whites one
    monkeypatch.setattr(decoding.PIL, "__version__", "0")  # a decoder that changed
    decoded.clear()
    datasets.load("folder", root, Reader(16))
    assert len(decoded) == 10


def test_a_cache_whose_pixels_have_changed_is_not_trusted(tmp_path):
    root = write_folder(tmp_path)
    pixels = datasets.load("folder", root, Reader(16)).train.pixels
    cache = root / ".train-16.cache"
    content = bytearray(cache.read_bytes())
    place = bytes(content).index(pixels[0].numpy().tobytes()[:100])
    content[place : place + 50] = bytes(50)
    cache.write_bytes(content)
    assert torch.equal(datasets.load("folder", root, Reader(16)).train.pixels, pixels)


def test_a_kill_while_the_cache_is_written_leaves_nothing_for_ever(tmp_path):
    root = write_folder(tmp_path)
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import data
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
datasets.load("folder", {str(root)!r})"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert [path.name for path in root.glob(".train-32.cache*")] == [".train-32.cache.tmp"]
    datasets.load("folder", root)
    assert [path.name for path in root.glob(".train-32.cache*")] == [".train-32.cache"]


def test_a_cache_of_an_earlier_release_is_not_trusted(tmp_path):
    root = write_folder(tmp_path)
    pixels = datasets.load("folder", root, Reader(16)).train.pixels
    torch.save({"key": "0" * 64, "pixels": torch.zeros_like(pixels)}, root / ".train-16.cache")
    assert torch.equal(datasets.load("folder", root, Reader(16)).train.pixels, pixels)


def test_check_reads_everything_and_says_what_is_there(tmp_path, capsys):
    root = write_folder(tmp_path)
    for path in (root / "test").rglob("*.png"):
        Image.new("RGB", (40, 20), (9, 9, ord(path.stem) + ord(path.parent.name[0]))).save(path)
    assert check_data.main(["--data", str(root), "--check"]) == 0
    damage(root)
    (root / "train/cat/notes.txt").write_text("x")
    Image.new("L", (9, 7)).save(root / "train/dog/grey.png")
    shutil.copy(root / "test/dog/1.png", root / "train/dog/copy.png")
    capsys.readouterr()
    for workers in ("0", "2"):
        assert check_data.main(["--data", str(root), "--check", "--workers", workers]) == 1
        out = capsys.readouterr().out.splitlines()
        assert out[0] == f"{root / 'train'}: 8 images in 2 classes: cat 3, dog 5"
        assert out[1] == f"{root / 'test'}: 4 images in 2 classes: cat 2, dog 2"
        assert "passed over: 1 files, .txt" in out and "modes: RGB 8, L 1" in out and "sizes: 40×20 8, 9×7 1" in out
        assert sum(line.startswith("unreadable: ") for line in out) == 3
        assert f"in two splits: {root / 'train/dog/copy.png'} = {root / 'test/dog/1.png'}" in out
        assert out[-2].startswith("12 images, 3 unreadable, ") and "--skip-unreadable" in out[-1]


def test_streamed_images_are_mirrored_half_of_the_time(tmp_path):
    image = Image.new("L", (200, 200))
    image.paste(255, (100, 0, 200, 200))
    image.save(tmp_path / "right.png")
    stream = streaming.ImageFiles([tmp_path / "right.png"] * 200, torch.zeros(200, dtype=torch.int64), Reader(128, channels=1))
    batches = stream.batches(200, ((0.0,), (1.0,)), "mean")
    [(x, _, _)] = batches.shuffled(1)
    left, right = x[:, 0, 64, 8], x[:, 0, 64, -8]
    told = left != right  # a crop of one half alone tells nothing
    assert told.sum() > 100 and 0.35 < (left > right)[told].float().mean() < 0.65
    [(x, _)] = batches.in_order()
    assert (x[:, 0, 64, 8] < x[:, 0, 64, -8]).all()


@pytest.mark.parametrize("image_size", [16, 128])
def test_reading_images_draws_no_random_number(tmp_path, image_size):
    """Weights are drawn after the images are read: they must not depend on whether these come from a cache."""
    root, drawn = write_folder(tmp_path, size=(140, 130)), []
    for _ in range(2):
        torch.manual_seed(1)
        datasets.load("folder", root, Reader(image_size, skip_unreadable=True))
        drawn.append(torch.rand(3))
    torch.manual_seed(1)
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], torch.rand(3))
