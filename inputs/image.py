"""One image file → pixels as viewers show it: upright, on white where it is transparent, at its full range."""

import contextlib
import errno
import functools
import os
import warnings
from dataclasses import dataclass, fields

import numpy as np
import torch
from PIL import ExifTags, Image

from common.console import Mistake, positive_number, workers
from common.files import readable

# Formats that Pillow recognises but cannot decode, and EPS, whose files are programs.
NO_IMAGES = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS"}
STREAM_FROM = 128  # pixels: folders of images this large or larger are decoded anew in every epoch
SYSTEM_ERRORS = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT}  # which say nothing of the file
BILINEAR = Image.Resampling.BILINEAR
UPRIGHT = {  # EXIF orientation → what turns the image upright
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


@dataclass(frozen=True)
class Reader:
    """How image files become pixels: square, 8 bits a channel, upright, on white where they are transparent.

    ``channels`` is 3, or 1 for grey. ``white`` is the value that is white in images of more than 8 bits; without it, it
    is 65535 where a pixel has 16 bits, and images of 32 bits are refused. ``workers`` is the number of processes that
    decode (0: this one), ``progress`` shows a bar, ``skip_unreadable`` goes on without files that cannot be read.
    """

    image_size: int = 32
    channels: int = 3
    white: float | None = None
    skip_unreadable: bool = False
    workers: int = 0
    progress: bool = False

    @classmethod
    def of_run(cls, arguments, **options):
        """The reader of a run, from its arguments."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in arguments.items() if name in known} | options)

    @property
    def streams(self):
        """True if images stay on disk until a batch asks for them."""
        return self.image_size >= STREAM_FROM

    def read(self, path, choose_box=None):
        """(S, S, C) uint8 from a file: the part that ``choose_box`` chooses, resized.

        ``choose_box``: (width, height) → (left, top, right, bottom), before anything is decoded. Without it, the part
        is the one for evaluation: the centre of an image that is streamed, the whole of another. Raises Unreadable, and
        Mistake where ``white`` is missing.
        """
        with opened(path) as image:
            return self.pixels(image, path, choose_box)

    def pixels(self, image, name, choose_box=None):
        """The same from an image that Pillow has opened, whose ``name`` is for messages."""
        choose_box = choose_box or (centre(self.image_size) if self.streams else lambda size: (0, 0, *size))
        box = decode_reduced(image, choose_box(image.size), self.image_size)
        turn = UPRIGHT.get(orientation(image))
        image = in_8_bits(image, self.channels, self.white, name)
        if all(isinstance(side, int) for side in box):  # then resizing blends nothing in from outside the box
            image, box = image.crop(box), None
        image = image.resize((self.image_size,) * 2, BILINEAR, box)
        pixels = np.array(image if turn is None else image.transpose(turn))
        return pixels.reshape(self.image_size, self.image_size, self.channels)


def add_reader_flags(add):
    """The flags whose values a Reader takes as they are; ``add`` is a parser's add_argument."""
    add("--channels", type=int, choices=(1, 3), default=3,
        help="of the images; 1: folder and digits in grey (default: %(default)s)")
    add("--white", type=positive_number, metavar="X",
        help="folder: the value that is white in images of more than 8 bits (default: 65535)")
    add("--skip-unreadable", action="store_true",
        help="folder: go on without images that cannot be read (default: off)")
    add("--workers", type=workers, default=0, metavar="N",
        help="processes that decode images of a folder (default: %(default)s)")


@contextlib.contextmanager
def opened(path):
    """An image file, opened by Pillow and not yet decoded.

    Raises Unreadable if it is missing or damaged, Mistake if the system fails to read it.
    """
    if isinstance(path, (str, os.PathLike)):  # and not an opened file
        readable(path)
    try:
        quiet = warnings.catch_warnings(action="ignore")  # of odd metadata
        with quiet, Image.open(path, formats=formats()) as image:
            yield image
    except (Mistake, MemoryError):
        raise
    except (FileNotFoundError, IsADirectoryError) as error:
        raise Unreadable(f"{path} is not an image file: {error.strerror}") from error
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        if getattr(error, "errno", None) in SYSTEM_ERRORS:
            raise Mistake(f"{path} cannot be read: {error.strerror}") from error
        raise Unreadable(f"{path} is not a readable image ({type(error).__name__})") from error


@functools.cache
def formats():
    """Names of the formats that the installed Pillow decodes."""
    Image.init()
    return sorted(set(Image.OPEN) - NO_IMAGES)


def decode_reduced(image, box, image_size):
    """Decode an opened image and return the box in the pixels that were decoded.

    A large JPEG file is decoded at a half, a quarter or an eighth of its size, as long as the box keeps twice the size
    that it is resized to.
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
    """The EXIF orientation of a decoded image (Pillow turns TIFF files itself), or None."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata make Pillow raise nearly anything; viewers show the image as it is stored
        return None


def white_of(image, white, path):
    """The value that is white in an image of more than 8 bits, None in others. Raises Mistake where nothing says it."""
    if not image.mode.startswith(("I", "F")):
        return None
    if image.format == "PPM" and image.mode == "I":
        return 65535  # the file says what is white, and Pillow has scaled it
    if white is None and not image.mode.startswith("I;16"):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise Mistake(f"{path} has {kind} values, which have no white of their own: say which value is, with --white")
    return white or 65535


def in_8_bits(image, channels, white, path):
    """An image of any mode in "RGB" or, with one channel, "L". Raises Mistake where its values have no scale."""
    if scale := white_of(image, white, path):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64)) * (255 / scale)
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":  # which Pillow converts to RGB alone
        image = image.convert("RGB")
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)


def centre(image_size):
    """A function that chooses the box in evaluation: as torchvision's Resize to 8/7 of the size, then CenterCrop."""

    def choose_box(size):
        resized = image_size * 8 // 7
        short = min(size)
        width, height = (resized if side == short else int(resized * side / short) for side in size)
        left, top = round((width - image_size) / 2), round((height - image_size) / 2)
        x, y = size[0] / width, size[1] / height
        return left * x, top * y, (left + image_size) * x, (top + image_size) * y

    return choose_box


def random_box(size):
    """A box as torchvision's RandomResizedCrop draws it, from torch's generator."""
    from torchvision.transforms import RandomResizedCrop

    frame = torch.empty(0, *reversed(size))  # without data: it is asked for its size alone
    top, left, height, width = RandomResizedCrop.get_params(frame, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    return left, top, left + width, top + height
