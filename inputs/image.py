"""One image file → pixels as viewers show it: upright, on white where it is transparent, at its full range."""

import argparse
import contextlib
import errno
import functools
import os
import re
import time
import warnings
from dataclasses import dataclass, fields

import numpy as np
import torch
from PIL import ExifTags, Image, PngImagePlugin
from PIL.JpegImagePlugin import JpegImageFile

from common.console import Mistake, number, workers
from common.files import readable

# Formats that Pillow recognises but cannot decode, and EPS: its files are programs.
NO_IMAGES = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS"}
STREAM_FROM = 128  # pixels: folders of images this large or larger are decoded anew in every epoch
# Errors of a file, not of the system: it is not there, or damaged and makes its reader seek to nowhere (EINVAL).
OF_FILES = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}
BILINEAR = Image.Resampling.BILINEAR
UPRIGHT = {  # EXIF orientation → the transposition that turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unreadable(Mistake):
    """An image file that cannot be read. The message names it and says why."""


def patient(read):
    """Decorate a function that reads files: after an error of the system it tries three times more, a second apart."""

    @functools.wraps(read)
    def read_again(*args, **options):
        for _ in range(3):
            with contextlib.suppress(OSError):
                return read(*args, **options)
            time.sleep(1)
        return read(*args, **options)

    return read_again


@dataclass(frozen=True)
class Reader:
    """How image files become pixels: square, 8 bits a channel, upright, on white where they are transparent.

    ``channels`` is 3, or 1 for grey. ``black`` and ``white`` are the values of black and white in grey images of more
    than 8 bits; without ``white``, it is 65535 in images of 16 bits, and images of 32 bits are refused. Without
    ``alpha``, transparency is ignored. ``workers`` processes decode (0: this one), ``progress`` shows a bar,
    ``skip_unreadable`` goes on without files that cannot be read.
    """

    image_size: int = 32
    channels: int = 3
    white: float | None = None
    black: float = 0.0
    alpha: bool = True
    skip_unreadable: bool = False
    workers: int = 0
    progress: bool = False

    def __post_init__(self):
        white = 65535 if self.white is None else self.white
        if self.black >= white:
            raise Mistake(f"--black {self.black:g} is not below --white {white:g}: choose less")

    @classmethod
    def of_run(cls, arguments, **options):
        """The reader of a run, from its arguments."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in arguments.items() if name in known} | options)

    @property
    def streams(self):
        """True if images stay on disk until a batch asks for them."""
        return self.image_size >= STREAM_FROM

    @patient
    def read(self, path, choose_box=None):
        """(S, S, C) uint8 from a file: the box that ``choose_box`` chooses, resized.

        ``choose_box``: (width, height) → (left, top, right, bottom), of the image as it is stored. Without it, the box
        is that of evaluation: the centre of an image that is streamed, else the whole image. Raises Unreadable, Mistake
        if nothing says which value is white, OSError if the system fails.
        """
        with opened(path) as image:
            return self.pixels(image, path, choose_box)

    def pixels(self, image, name, choose_box=None):
        """The same from an image that Pillow has opened, whose ``name`` is for messages."""
        scale = self.scale(image, name)
        if not isinstance(image, JpegImageFile):  # which may be decoded at a part of its size
            image.load()
        turned = orientation(image)
        whole = centre(image.size, turned, self.image_size) if self.streams else (0, 0, *image.size)
        box = choose_box(image.size) if choose_box else whole
        box = decode_reduced(image, box, self.image_size)
        image = self.in_8_bits(image, scale)
        if all(isinstance(side, int) for side in box):  # then resizing blends nothing in from outside the box
            image, box = image.crop(box), None
        image = image.resize((self.image_size,) * 2, BILINEAR, box)
        pixels = np.array(image.transpose(UPRIGHT[turned]) if turned in UPRIGHT else image)
        return pixels.reshape(self.image_size, self.image_size, self.channels)

    def scale(self, image, name):
        """The values of (black, white) in an opened grey image of more than 8 bits; None for another image.

        Raises Mistake if they are unknown, or given for colours of 16 bits.
        """
        tags = getattr(image, "tag_v2", {})  # of a TIFF file; 258: bits per sample, 284: whether bands are planes
        if max(tags.get(258, [8])) > 8 and tags.get(284) == 2 and "raw" in str(image.tile[:1]):
            raise Unreadable(f"{name} has colours of 16 bits in planes, which Pillow reads wrongly: convert it")
        if not image.mode.startswith(("I", "F")):
            if (self.white, self.black) != (None, 0) and has_deep_colours(image):
                advice = "--white and --black are for grey images: convert it to 8 bits, or leave them out"
                raise Mistake(f"{name} has colours of 16 bits, of which the upper 8 are read: {advice}")
            return None
        if image.format == "PPM" and image.mode == "I":
            return 0, 65535  # the file says what is white, and Pillow has scaled it
        if self.white is None and not image.mode.startswith("I;16"):
            kind = "floating-point" if image.mode == "F" else "32-bit"
            advice = "say which value is, with --white, and with --black which is black, if not 0"
            raise Mistake(f"{name} has {kind} values, which have no white of their own: {advice}")
        return self.black, 65535 if self.white is None else self.white

    def in_8_bits(self, image, scale):
        """An image of any mode in "RGB" or, with one channel, "L". ``scale``: what the method of this name returns."""
        if scale:
            black, white = scale
            values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=black) - black
            image = Image.fromarray((values * (255 / (white - black))).clip(0, 255).round().astype(np.uint8))
        if self.alpha and image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        if image.mode == "LAB":  # Pillow converts it to RGB only
            image = image.convert("RGB")
        mode = "RGB" if self.channels == 3 else "L"
        return image if image.mode == mode else image.convert(mode)

    @patient
    def losses(self, path):
        """What reading an image file loses or may get wrong, a phrase each. Raises as ``read``."""
        with opened(path) as image:
            return self.lost(image, path)

    def lost(self, image, name):
        """The same for an image that Pillow has opened but not decoded; ``name`` is for messages."""
        tags, found = getattr(image, "tag_v2", {}), []  # 277: samples per pixel, 262: 0 if 0 is white
        bands = tags.get(277, 1)
        if has_deep_colours(image):
            found.append("colours of 16 bits, of which the upper 8 are read")
        if bands > 4:
            found.append(f"{bands} bands, of which the first three are read")
        if bands >= 4 and image.mode == "RGBA" and self.alpha:
            found.append("a fourth band that is taken as transparency: if it is none, add --no-alpha")
        if tags.get(262) == 0 and image.mode.startswith("I"):
            found.append("the file says that 0 is white, and it is read as black: convert it")
        if scale := self.scale(image, name):
            black, white = scale
            low, high = np.nanmin(image), np.nanmax(image)
            if low < black or high > white:
                found.append(f"values below {black:g} or above {white:g}, cut off: see --black and --white")
            elif high < black + (white - black) / 8:
                found.append(f"only the darkest eighth of {black:g} … {white:g}: say with --white what is white")
        return found


def add_reader_flags(add):
    """Add the flags of a Reader; ``add`` is a parser's add_argument."""
    add("--channels", type=int, choices=(1, 3), default=3,
        help="of the images; 1: folder and digits in grey (default: %(default)s)")
    add("--white", type=number, metavar="X",
        help="folder: the value that is white in grey images of more than 8 bits (default: 65535)")
    add("--black", type=number, metavar="X", default=0.0,
        help="folder: the value that is black in them, such as -1000 (default: %(default)s)")
    add("--alpha", action=argparse.BooleanOptionalAction, default=True,
        help="folder: put transparent images on white; off: drop their last band (default: on)")
    add("--skip-unreadable", action="store_true",
        help="folder: go on without images that cannot be read (default: off)")
    add("--workers", type=workers, default=0, metavar="N",
        help="processes that decode images of a folder (default: %(default)s)")


@contextlib.contextmanager
def opened(path):
    """An image file, opened by Pillow and not yet decoded.

    Raises Unreadable if it is missing or damaged, OSError if the system fails to read it.
    """
    if isinstance(path, (str, os.PathLike)):  # and not an opened file
        readable(path)
    try:
        quiet = warnings.catch_warnings(action="ignore")  # of odd metadata
        with quiet, Image.open(path, formats=formats()) as image:
            yield image
    except (Mistake, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        most = f"{2 * Image.MAX_IMAGE_PIXELS / 1e6:.4g}"
        raise Unreadable(f"{path} has more than {most} megapixels, the most that are read: make it smaller") from error
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        if getattr(error, "errno", None) and error.errno not in OF_FILES:
            error.filename = error.filename or str(path)
            raise
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise Unreadable(f"{path} is not a readable image ({reason})") from error


@functools.cache
def formats():
    """Names of the formats that the installed Pillow decodes."""
    Image.init()
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB instead of 1, as editors write
    return sorted(set(Image.OPEN) - NO_IMAGES)


def decode_reduced(image, box, image_size):
    """Decode an opened image and return the box in the decoded pixels.

    A large JPEG file is decoded at 1/2, 1/4 or 1/8 of its size, if the box still has twice the size that it is resized
    to.
    """
    width, height = image.size
    factor = min(box[2] - box[0], box[3] - box[1]) / (2 * image_size)
    if factor >= 2:
        image.draft(None, (int(width / factor), int(height / factor)))  # nothing happens in other formats
    image.load()
    if image.size == (width, height):
        return box
    x, y = image.width / width, image.height / height
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def orientation(image):
    """The EXIF orientation of a decoded image or an opened JPEG; None if there is none, or Pillow has turned it."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata make Pillow raise nearly anything; viewers show the image as it is stored
        return None


def has_deep_colours(image):
    """True if an image that is opened but not decoded has colours of 16 bits, of which Pillow keeps 8."""
    return not image.mode.startswith("I") and bool(re.search(";16[BLN]", str(getattr(image, "tile", [])[:1])))


def centre(size, turned, image_size):
    """The box of evaluation: torchvision's Resize to 8/7 of the size and CenterCrop of the upright image.

    ``size`` is (width, height) as it is stored, ``turned`` its EXIF orientation: in a mirrored image, a box that is
    rounded to the left of the middle is rounded to the right.
    """
    first, last = [], []
    for side, mirrored in zip(size, (turned in (2, 3, 7, 8), turned in (3, 4, 6, 7)), strict=True):
        resized = int((image_size * 8 // 7) * side / min(size))
        start = round((resized - image_size) / 2)
        start = resized - image_size - start if mirrored else start
        first.append(start * (side / resized))
        last.append((start + image_size) * (side / resized))
    return *first, *last


def random_box(size):
    """A box of torchvision's RandomResizedCrop, from torch's generator."""
    from torchvision.transforms import RandomResizedCrop

    frame = torch.empty(0, *reversed(size))  # only its size counts
    top, left, height, width = RandomResizedCrop.get_params(frame, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    return left, top, left + width, top + height
