"""One image file of every kind → the pixels that a viewer shows, in memory and streamed alike."""

from collections import Counter
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import photo, write_folder
from PIL import Image, ImageCms, features
from torchvision.transforms import v2

from common.console import Mistake
from inputs import datasets, decoding, folders
from inputs.image import UPRIGHT, Reader, Unreadable, centre, in_8_bits, random_box
from inputs.streaming import ImageFiles

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
NEAR = 4  # of 255: what JPEG's coding may change


def quadrants(size=(400, 300)):
    """Red, green / blue, white."""
    image = Image.new("RGB", size, WHITE)
    width, height = size[0] // 2, size[1] // 2
    for corner, colour in (((0, 0), RED), ((width, 0), GREEN), ((0, height), BLUE)):
        image.paste(colour, (*corner, corner[0] + width, corner[1] + height))
    return image


def corners(pixels):
    """The pixels (C,) in the middle of the quadrants of (S, S, C), row by row."""
    near, far = len(pixels) // 4, 3 * len(pixels) // 4
    return [pixels[y, x].tolist() for y in (near, far) for x in (near, far)]


def read_both_ways(path, **options):
    """The corners of a file's image, which must be the same in memory and streamed."""
    pixels, problems = decoding.read_all([path], Reader(64, **options))
    assert not problems
    in_memory = corners(pixels[0])
    channels = options.get("channels", 3)
    streamed = ImageFiles([path], torch.tensor([0]), Reader(128, **options))
    [(batch, _)] = streamed.batches(1, ((0.0,) * channels, (1.0,) * channels)).in_order()
    assert batch.shape == (1, channels, 128, 128)
    np.testing.assert_allclose(corners(batch[0].permute(1, 2, 0)), in_memory, atol=2)
    return in_memory


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_obeyed(tmp_path, orientation, suffix):
    image, exif = quadrants((800, 600)), Image.Exif()  # large enough for a JPEG file to be decoded at reduced scale
    if orientation > 1:  # stored as a camera that was held so would
        inverse = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
        image = image.transpose(inverse.get(orientation, UPRIGHT[orientation]))
    exif[0x0112] = orientation
    image.save(tmp_path / f"photo.{suffix}", exif=exif, **({"quality": 100} if suffix != "tif" else {}))
    np.testing.assert_allclose(read_both_ways(tmp_path / f"photo.{suffix}"), [RED, GREEN, BLUE, WHITE], atol=NEAR)


def test_damaged_metadata_do_not_hide_an_image(tmp_path):
    quadrants().save(tmp_path / "photo.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f garbage", quality=100)
    np.testing.assert_allclose(read_both_ways(tmp_path / "photo.jpg"), [RED, GREEN, BLUE, WHITE], atol=NEAR)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [(mode, suffix) for mode, suffixes in {"RGBA": "png gif webp tif", "LA": "png webp tif", "P": "png gif", "RGB": "png"}.items() for suffix in suffixes.split()],
)
def test_transparency_is_white(tmp_path, mode, suffix):
    """A black icon, the upper left quadrant, on a transparent ground under which red is hidden."""
    alpha, colour, options = Image.new("L", (80, 80), 0), Image.new("RGB", (80, 80), RED), {}
    for image, value in ((alpha, 255), (colour, (0, 0, 0))):
        image.paste(value, (0, 0, 40, 40))
    if mode == "P":
        image = colour.quantize(2)
        options["transparency"] = image.getpixel((79, 79))
    elif mode == "RGB":
        options["transparency"] = RED
    else:
        image = Image.merge(mode, (*colour.convert(mode[:-1]).split(), alpha))
    image.save(tmp_path / f"icon.{suffix}", **options, **({"lossless": True} if suffix == "webp" else {}))
    assert read_both_ways(tmp_path / f"icon.{suffix}") == [[0, 0, 0], *[[255, 255, 255]] * 3]


def test_half_transparent_red_is_pink(tmp_path):
    Image.new("RGBA", (80, 80), (*RED, 128)).save(tmp_path / "icon.png")
    assert read_both_ways(tmp_path / "icon.png")[0] == [255, 127, 127]


def save_values(path, values, dtype):
    """An image whose quadrants have four values."""
    image = np.repeat(np.repeat(np.array(values, dtype).reshape(2, 2), 80, 0), 80, 1)
    if path.suffix == ".pgm":
        path.write_bytes(b"P5 160 160 4095\n" + image.astype(">u2").tobytes())
    else:
        Image.fromarray(image).save(path)


@pytest.mark.parametrize(
    ("name", "dtype", "values", "white", "expected"),
    [
        ("scan.png", np.uint16, (0, 30000, 65535, 257), None, (0, 117, 255, 1)),
        ("scan.tif", np.uint16, (0, 30000, 65535, 257), None, (0, 117, 255, 1)),
        ("xray.png", np.uint16, (0, 2048, 4095, 9000), 4095, (0, 128, 255, 255)),
        ("xray.pgm", np.uint16, (0, 2048, 4095, 1024), None, (0, 128, 255, 64)),  # the file itself says 4095
        ("xray.pgm", np.uint16, (0, 2048, 4095, 1024), 4095, (0, 128, 255, 64)),
        ("counts.tif", np.int32, (0, 500, 1000, -3), 1000, (0, 128, 255, 0)),
        ("field.tif", np.float32, (0, 0.5, 1, float("nan")), 1.0, (0, 128, 255, 0)),
        ("grey.png", np.uint8, (0, 100, 200, 255), 4095, (0, 100, 200, 255)),
    ],
)
def test_the_full_scale_of_every_bit_depth(tmp_path, name, dtype, values, white, expected):
    save_values(tmp_path / name, values, dtype)
    assert read_both_ways(tmp_path / name, white=white) == [[value] * 3 for value in expected]


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "32-bit"), (np.float32, "floating-point")])
@pytest.mark.parametrize("image_size", [32, 128])
def test_values_without_a_scale_are_refused_and_not_skipped(tmp_path, dtype, kind, image_size):
    save_values(write_folder(tmp_path) / "train/cat/field.tif", (0, 1, 2, 3), dtype)
    with pytest.raises(Mistake, match=f"field.tif has {kind} values.* with --white"):
        datasets.load("folder", tmp_path, Reader(image_size, skip_unreadable=True))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "RGBX"])
def test_other_modes(tmp_path, mode):
    expected = {"1": [WHITE] * 4, "L": [[value] * 3 for value in (76, 150, 29, 255)]}.get(mode, [RED, GREEN, BLUE, WHITE])
    if mode == "LAB":
        lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        image = ImageCms.applyTransform(quadrants(), lab)
    else:
        image = quadrants().convert(mode) if mode != "1" else Image.new("1", (80, 80), 1)
    path, options = (tmp_path / "image.jpg", {"quality": 100}) if mode in ("YCbCr", "CMYK") else (tmp_path / "image.tif", {})
    image.save(path, **options)
    np.testing.assert_allclose(read_both_ways(path), expected, atol=25 if mode == "LAB" else NEAR)  # 8 bits of LAB


def test_grey_images_have_one_channel(tmp_path):
    quadrants().save(tmp_path / "image.png")
    assert read_both_ways(tmp_path / "image.png", channels=1) == [[76], [150], [29], [255]]


@pytest.mark.parametrize("suffix", ["jfif", "gif", "avif", "jp2", "bmp", "ppm", "tga"])
def test_formats_of_every_kind(tmp_path, suffix):
    if not features.check({"avif": "avif", "jp2": "jpg_2000"}.get(suffix, "pil")):
        pytest.skip("not in this Pillow")
    (tmp_path / "a").mkdir()
    path, passed = tmp_path / "a" / f"image.{suffix}", Counter()
    quadrants().save(path, format="JPEG" if suffix == "jfif" else None)
    assert folders.list_images(tmp_path, passed) == {"a": [str(path)]} and not passed
    np.testing.assert_allclose(read_both_ways(path), [RED, GREEN, BLUE, WHITE], atol=12)


@pytest.mark.parametrize("choose", [centre(224), random_box])
def test_an_odd_shape_costs_no_more_than_any_other(tmp_path, monkeypatch, choose):
    sizes, real = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, *args: sizes.append(size) or real(image, size, *args))
    for size in ((3, 4000), (4000, 3)):
        Image.new("RGB", size, RED).save(tmp_path / "strip.png")
        pixels = Reader(224).read(tmp_path / "strip.png", choose)
        assert pixels.shape == (224, 224, 3) and (pixels == RED).all()
    assert sizes == [(224, 224)] * 2  # the whole strip, resized to a shorter side of 256, would have 262 MB


@pytest.mark.parametrize(
    ("choose", "size"),
    [(lambda size: (0, 0, *size), (1000, 750)), (centre(224), (1000, 750)), (lambda size: (100, 100, 400, 400), (2000, 1500))],
)
def test_large_photos_are_decoded_smaller_and_look_the_same(tmp_path, monkeypatch, choose, size):
    """Of a small crop of a large photo, all pixels are decoded."""
    photo(2000, 1500).save(tmp_path / "photo.jpg", quality=92)
    decoded = []
    monkeypatch.setattr("inputs.image.in_8_bits", lambda image, *args: decoded.append(image.size) or in_8_bits(image, *args))
    reduced = Reader(224).read(tmp_path / "photo.jpg", choose).astype(float)
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *args: None)
    whole = Reader(224).read(tmp_path / "photo.jpg", choose).astype(float)
    assert decoded == [size, (2000, 1500)]
    assert abs(reduced - whole).mean() < 0.5 and abs(reduced - whole).max() < 8  # of 255


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (256, 256), (131, 517), (1000, 140), (64, 64)])
def test_evaluation_sees_what_torchvision_s_transforms_show(tmp_path, size):
    photo(*size).save(tmp_path / "image.png")
    theirs = v2.Compose([v2.Resize(224 * 8 // 7), v2.CenterCrop(224)])(Image.open(tmp_path / "image.png"))
    ours = Reader(224).read(tmp_path / "image.png", centre(224)).astype(float)
    assert abs(ours - np.asarray(theirs, float)).max() <= 2


def test_training_draws_the_crops_that_torchvision_draws(tmp_path):
    photo(300, 200).save(tmp_path / "image.png")
    for seed in range(10):
        torch.manual_seed(seed)
        theirs = np.asarray(v2.RandomResizedCrop(128)(Image.open(tmp_path / "image.png")), float)
        torch.manual_seed(seed)
        ours = Reader(128).read(tmp_path / "image.png", random_box).astype(float)
        assert abs(ours - theirs).mean() < 1  # at the border of a crop, ours blends in what lies beyond it


@pytest.mark.parametrize("content", [b"", b"no image", "cut", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"])
def test_a_damaged_file_is_named(tmp_path, content):
    """EPS files, which are programs, are not run."""
    path = tmp_path / "image.jpg"
    quadrants().save(path)
    path.write_bytes(path.read_bytes()[:2000] if content == "cut" else content)
    with pytest.raises(Unreadable, match=r"image.jpg is not a readable image \(\w+\)$"):
        Reader().read(path)


@pytest.mark.parametrize(
    "error", [RuntimeError(), NotImplementedError(), AssertionError(), KeyError(), OSError(22, "Invalid argument"), Image.DecompressionBombError()], ids=repr
)
def test_whatever_a_decoder_raises_makes_a_file_unreadable(tmp_path, monkeypatch, error):
    """As Pillow's do for damaged AVIF, DDS, ICNS and TIFF files."""
    quadrants().save(tmp_path / "image.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", Mock(side_effect=error))
    with pytest.raises(Unreadable, match=rf"image.png is not a readable image \({type(error).__name__}\)$"):
        Reader().read(tmp_path / "image.png")


def test_a_run_s_reader():
    arguments = {"image_size": 64, "epochs": 3, "workers": 2, "white": 4095.0, "channels": 1}
    assert Reader.of_run(arguments, workers=0) == Reader(64, 1, 4095.0)
