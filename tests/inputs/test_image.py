"""One image file of every kind → the pixels that a viewer shows, in memory and streamed alike."""

import struct
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import photo, write_folder
from PIL import Image, ImageCms, PngImagePlugin
from torchvision.transforms import v2

from common.console import Mistake
from inputs import datasets, decoding
from inputs.image import UPRIGHT, Reader, Unreadable, random_box
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
def test_orientation_is_obeyed_to_the_pixel(tmp_path, orientation, suffix):
    upright, exif = photo(*((803, 602) if suffix == "jpg" else (161, 134))), Image.Exif()  # a large JPEG is decoded reduced
    inverse = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}  # of what turns it upright
    stored = upright.transpose(inverse.get(orientation, UPRIGHT[orientation])) if orientation > 1 else upright
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 95}, "webp": {"lossless": True}}.get(suffix, {})
    stored.save(tmp_path / f"stored.{suffix}", exif=exif, **options)
    upright.save(tmp_path / f"upright.{suffix}", **options)
    for size in (64, 128):
        ours, expected = (Reader(size).read(tmp_path / f"{name}.{suffix}").astype(int) for name in ("stored", "upright"))
        assert abs(ours - expected).max() <= (12 if suffix == "jpg" else 1)


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
    Image.new("RGBA", (80, 80), (*RED, 128)).save(tmp_path / "half.png")
    assert read_both_ways(tmp_path / "half.png")[0] == [255, 127, 127]


def tiff(image, more_tags=()):
    """A TIFF file of an array (160, 160, bands), of which the fourth band is marked as transparency."""
    bands, data, more, entries = image.shape[2], image.tobytes(), b"", b""
    tags = {256: [160], 257: [160], 258: [8 * image.itemsize] * bands, 262: [2], 273: [8], 277: [bands], 279: [len(data)]}
    tags |= {338: [2] + [0] * (bands - 4)} if bands > 3 else {}
    tags |= dict(more_tags)
    for tag, values in tags.items():
        packed = struct.pack(f"<{len(values)}I", *values)
        entries += struct.pack("<HHI", tag, 4, len(values))
        entries += packed if len(values) == 1 else struct.pack("<I", 8 + len(data + more))
        more += packed if len(values) > 1 else b""
    return b"II*\0" + struct.pack("<I", 8 + len(data + more)) + data + more + struct.pack("<H", len(tags)) + entries + bytes(4)


def save_values(path, values, dtype):
    """An image whose quadrants have four values, each a number or a list of bands; colours of 16 bits as PNG or TIFF."""
    image = np.array(values, dtype).reshape(2, 2, -1).repeat(80, 0).repeat(80, 1)
    bands = image.shape[2]
    if path.suffix == ".pgm":
        path.write_bytes(b"P5 160 160 4095\n" + image.astype(">u2").tobytes())
    elif path.suffix == ".png" and bands == 3:
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
        parts = (b"IHDR", struct.pack(">IIBBBBB", 160, 160, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
        chunks = (struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part)) for name, part in parts)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    elif bands > 1:
        path.write_bytes(tiff(image))
    else:
        Image.fromarray(image[:, :, 0]).save(path)


@pytest.mark.parametrize(
    ("name", "dtype", "values", "scale", "expected"),
    [
        ("scan.png", np.uint16, (0, 30000, 65535, 257), {}, (0, 117, 255, 1)),
        ("scan.tif", np.uint16, (0, 30000, 65535, 257), {}, (0, 117, 255, 1)),
        ("xray.png", np.uint16, (0, 2048, 4095, 9000), {"white": 4095}, (0, 128, 255, 255)),
        ("xray.pgm", np.uint16, (0, 2048, 4095, 1024), {}, (0, 128, 255, 64)),  # the file itself says 4095
        ("xray.pgm", np.uint16, (0, 2048, 4095, 1024), {"white": 4095}, (0, 128, 255, 64)),
        ("counts.tif", np.int32, (0, 500, 1000, -3), {"white": 1000}, (0, 128, 255, 0)),
        ("ct.tif", np.int32, (-1000, 0, 3000, -2000), {"black": -1000, "white": 3000}, (0, 64, 255, 0)),
        ("ndvi.tif", np.float32, (-1, 0, 1, float("nan")), {"black": -1, "white": 1}, (0, 128, 255, 0)),
        ("decibel.tif", np.float32, (-80, -40, 0, -20), {"black": -80, "white": 0}, (0, 128, 255, 191)),
        ("grey.png", np.uint8, (0, 100, 200, 255), {"white": 4095}, (0, 100, 200, 255)),
    ],
)
def test_the_full_scale_of_every_bit_depth(tmp_path, name, dtype, values, scale, expected):
    save_values(tmp_path / name, values, dtype)
    assert read_both_ways(tmp_path / name, **scale) == [[value] * 3 for value in expected]


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "32-bit"), (np.float32, "floating-point")])
@pytest.mark.parametrize("image_size", [32, 128])
def test_values_without_a_scale_are_refused_and_not_skipped(tmp_path, dtype, kind, image_size):
    save_values(write_folder(tmp_path) / "train/cat/field.tif", (0, 1, 2, 3), dtype)
    with pytest.raises(Mistake, match=f"field.tif has {kind} values.* with --white"):
        datasets.load("folder", tmp_path, Reader(image_size, skip_unreadable=True))


DEEP, BANDS, FOURTH = "colours of 16 bits, of which the upper 8", "bands, of which the first three", "taken as transparency"


@pytest.mark.parametrize(
    ("name", "dtype", "value", "losses"),
    [
        ("a.png", np.uint16, [9000, 0, 256], [DEEP]),
        ("a.tif", np.uint16, [9000, 0, 256], [DEEP]),
        ("a.tif", np.uint16, [9000, 0, 256, 0], [DEEP, FOURTH]),
        ("a.tif", np.uint8, [35, 0, 1], []),
        ("a.tif", np.uint8, [35, 0, 1, 0], [FOURTH]),
        ("a.tif", np.uint8, [35, 0, 1, 0, 7], [f"5 {BANDS}", FOURTH]),
    ],
)
def test_what_is_lost_of_colours_is_known(tmp_path, name, dtype, value, losses):
    save_values(tmp_path / name, [value] * 4, dtype)
    found = Reader().losses(tmp_path / name)
    assert len(found) == len(losses) and all(words in loss for words, loss in zip(losses, found, strict=True))
    assert read_both_ways(tmp_path / name) == [[255] * 3 if FOURTH in losses else [35, 0, 1]] * 4
    assert read_both_ways(tmp_path / name, alpha=False) == [[35, 0, 1]] * 4
    assert FOURTH not in str(Reader(alpha=False).losses(tmp_path / name))
    for scale in ({"white": 4095.0}, {"black": 1.0}) if DEEP in losses else ():
        with pytest.raises(Mistake, match=f"{name} has colours of 16 bits, .*--white and --black are for grey images"):
            Reader(**scale).read(tmp_path / name)


@pytest.mark.parametrize(
    ("white", "black", "losses"),
    [
        (5000.0, 0.0, ["values below 0 or above 5000, cut off: see --black and --white"]),
        (3000.0, -1000.0, ["values below -1000 or above 3000, cut off: see --black and --white"]),
        (5000.0, -1000.0, []),
        (90000.0, -1000.0, ["only the darkest eighth of -1000 … 90000: say with --white what is white"]),
    ],
)
def test_what_is_lost_of_values_is_known(tmp_path, white, black, losses):
    save_values(tmp_path / "ct.tif", (-1000, 0, 3000, 5000), np.int32)
    assert Reader(white=white, black=black).losses(tmp_path / "ct.tif") == losses
    with pytest.raises(Mistake, match=f"--black {black:g} is not below --white {black:g}: choose less"):
        Reader(white=black, black=black)


def test_what_pillow_reads_wrongly_is_refused_or_said(tmp_path):
    """Uncompressed planes of 16 bits; 16 bits of which 0 is white."""
    (tmp_path / "planes.tif").write_bytes(tiff(np.zeros((160, 160, 3), np.uint16), {273: [8, 51208, 102408], 279: [51200] * 3, 284: [2]}))
    with pytest.raises(Unreadable, match=r"planes.tif has colours of 16 bits in planes, .* convert it$"):
        Reader().read(tmp_path / "planes.tif")
    (tmp_path / "inverted.tif").write_bytes(tiff(np.full((160, 160, 1), 9000, np.uint16), {262: [0]}))
    assert Reader().losses(tmp_path / "inverted.tif") == ["the file says that 0 is white, and it is read as black: convert it"]


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
    if mode == "L":
        assert read_both_ways(path, channels=1) == [[76], [150], [29], [255]]


@pytest.mark.parametrize("choose", [None, random_box])
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
    [(lambda size: (0, 0, *size), (1000, 750)), (None, (1000, 750)), (lambda size: (100, 100, 400, 400), (2000, 1500))],
)
def test_large_photos_are_decoded_smaller_and_look_the_same(tmp_path, monkeypatch, choose, size):
    """Of a small crop of a large photo, all pixels are decoded."""
    photo(2000, 1500).save(tmp_path / "photo.jpg", quality=92)
    decoded = []
    real = Reader.in_8_bits
    monkeypatch.setattr(Reader, "in_8_bits", lambda self, image, *args: decoded.append(image.size) or real(self, image, *args))
    reduced = Reader(224).read(tmp_path / "photo.jpg", choose).astype(float)
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *args: None)
    whole = Reader(224).read(tmp_path / "photo.jpg", choose).astype(float)
    assert decoded == [size, (2000, 1500)]
    assert abs(reduced - whole).mean() < 0.5 and abs(reduced - whole).max() < 8  # of 255


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (256, 256), (131, 517), (1000, 140), (64, 64)])
def test_evaluation_sees_what_torchvision_s_transforms_show(tmp_path, size):
    photo(*size).save(tmp_path / "image.png")
    theirs = v2.Compose([v2.Resize(224 * 8 // 7), v2.CenterCrop(224)])(Image.open(tmp_path / "image.png"))
    ours = Reader(224).read(tmp_path / "image.png", None).astype(float)
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


@pytest.mark.parametrize("error", [RuntimeError(), NotImplementedError(), AssertionError(), KeyError(), OSError(22, "Invalid argument")], ids=repr)
def test_whatever_a_decoder_raises_makes_a_file_unreadable(tmp_path, monkeypatch, error):
    """As Pillow's do for damaged AVIF, DDS, ICNS and TIFF files."""
    quadrants().save(tmp_path / "image.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", Mock(side_effect=error))
    reason = getattr(error, "strerror", None) or type(error).__name__
    with pytest.raises(Unreadable, match=rf"image.png is not a readable image \({reason}\)$"):
        Reader().read(tmp_path / "image.png")


def test_good_images_are_not_called_damaged(tmp_path, monkeypatch):
    """Metadata that are damaged, or have two megabytes; more pixels than Pillow opens."""
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 2_000_000, zip=True)
    quadrants().save(tmp_path / "image.png", pnginfo=text)
    quadrants().save(tmp_path / "image.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f garbage", quality=100)
    for path in tmp_path.iterdir():
        np.testing.assert_allclose(read_both_ways(path), [RED, GREEN, BLUE, WHITE], atol=NEAR)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    with pytest.raises(Unreadable, match=r"image.png has more than 0.1 megapixels, the most that are read: make it smaller$"):
        Reader().read(tmp_path / "image.png")
