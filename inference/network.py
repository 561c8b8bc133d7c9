"""A trained network, built from its checkpoint and run on images and files."""

import contextlib
import itertools

import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from common.checkpoints import load_weights
from common.console import Mistake
from densenet import DenseNet
from inputs import datasets, splits
from inputs.batches import memory_format, normalizer
from inputs.decoding import in_workers
from inputs.image import Reader


@torch.no_grad()
def predict(model, batches, amp):
    """Yield (logits (B, classes) float32, labels (B,)) of each batch, in order, in evaluation mode."""
    model.eval()
    for images, labels in batches.in_order():
        with amp():
            logits = model(images)
        yield logits.float(), labels


def load_model(checkpoint):
    """The trained network of a checkpoint, (N, C, S, S) → logits (N, classes), in evaluation mode. Raises Mistake."""
    if "network" in checkpoint:  # an exported file
        return checkpoint["network"]
    try:
        model = DenseNet(**checkpoint["config"]["model"])
    except (TypeError, ValueError) as error:
        raise Mistake(f"the checkpoint describes a network that cannot be built ({error})") from error
    load_weights(model, checkpoint["model"])
    return model.eval()


def averaged(checkpoint):
    """The checkpoint with the averaged weights of its run, which had --ema, for the last ones. Raises Mistake."""
    if "ema" not in checkpoint:
        raise Mistake("the checkpoint has no averaged weights, which train.py --ema makes: leave out --ema")
    return checkpoint | {"model": checkpoint["ema"]["model"], "averaged": True}


def reader_of(checkpoint, **options):
    """The Reader of a checkpoint's run. By default, it decodes in this process, without a progress bar."""
    return Reader.of_run(checkpoint["config"]["arguments"], **{"workers": 0, "progress": False} | options)


def load_split(checkpoint, split="test", directory=None, reader=None):
    """The images of a split of the checkpoint's run, not augmented, and lines to print about them.

    ``split``: "train", "valid" or "test". ``directory``: that of the data set, by default as in training. Raises
    Mistake if images are missing, have other classes, or cannot be those that were held out.
    """
    trained, reader = checkpoint["config"]["arguments"], reader or reader_of(checkpoint)
    root, manifest = directory or trained["data"], checkpoint["manifest"]
    try:
        # Exported files do not name the test files, which are then set apart again.
        if split == "test" and (manifest is None or manifest["test_files"] or "test" in manifest["folders"]):
            images, lines = datasets.load_test(trained["dataset"], root, reader, checkpoint["classes"], manifest)
            return images.select(slice(trained["limit_test"])), lines
        dataset = datasets.load_run(trained, root, reader, manifest)
        if list(dataset.classes) != checkpoint["classes"]:
            raise Mistake(f"the images in {root} have other classes than those of the training")
        older = trained["valid_size"] and manifest and "fingerprints" not in manifest  # only statistics show a change
        if older and not torch.equal(*map(torch.tensor, (checkpoint["measured"], dataset.normalize))):
            raise Mistake(f"images in {root} have changed since the training")
        if changed := {"train", split} & {*splits.changed(manifest, dataset)}:
            raise Mistake(f"images in {root} ({', '.join(sorted(changed))}) have changed since the training")
    except Mistake as error:
        raise Mistake(f"{error}; say with --data where the data set of the training is") from error
    if split not in dataset.splits:
        raise Mistake("the run held out no images for validation: choose --split train or test")
    return dataset.splits[split], dataset.notes


def predictions(checkpoint, images, device="cpu", amp=contextlib.nullcontext, batch_size=None, block="naive"):
    """``predict`` for ImageTensors or ImageFiles, with the network of a checkpoint, run as ``block``."""
    model = load_model(checkpoint).to(device, memory_format=memory_format(device))
    if block != "naive":  # exported networks have none
        model.set_block(block)
    batch_size = batch_size or checkpoint["config"]["arguments"]["batch_size"]
    return predict(model, images.to(device).batches(batch_size, checkpoint["normalize"]), amp)


def classify(checkpoint, paths, device="cpu", amp=contextlib.nullcontext):
    """Class probabilities of a list of image files of any size: (images, classes) float32, in their order.

    Raises Mistake if a file is missing or not an image, or the list is empty.
    """
    if isinstance(paths, str) or not paths:
        raise Mistake(f"{paths!r} is not a list of image files")
    batch_size = checkpoint["config"]["arguments"]["batch_size"]
    answers = list(classify_each(classifier(checkpoint, device, amp), paths, reader_of(checkpoint), batch_size))
    if problems := [str(answer) for answer in answers if isinstance(answer, Mistake)]:
        raise Mistake("; ".join(problems))
    return torch.stack(answers)


def classifier(checkpoint, device="cpu", amp=contextlib.nullcontext):
    """A function: pixels (N, S, S, C) uint8, as a Reader returns them → probabilities (N, classes) float32."""
    model = load_model(checkpoint).to(device, memory_format=memory_format(device))
    normalized = normalizer(checkpoint["normalize"], device)

    @torch.no_grad()
    def probabilities(pixels):
        with amp():
            logits = model(normalized(pixels.to(device)))
        return logits.float().softmax(1).cpu()

    return probabilities


def classify_each(probabilities, paths, reader, batch_size):
    """Yield the class probabilities (classes,) of each image file, or the Mistake that says why it can't be read.

    ``probabilities``: what ``classifier`` returns. Only one batch is in memory at once.
    """
    decoded = iter(in_workers(reader.read, paths, reader, "classifying images"))
    while batch := list(itertools.islice(decoded, batch_size)):
        pixels = [torch.from_numpy(item) for item in batch if not isinstance(item, Mistake)]
        rows = iter(probabilities(torch.stack(pixels)) if pixels else ())
        yield from (item if isinstance(item, Mistake) else next(rows) for item in batch)


def preprocess(image, arguments, normalize):
    """An image, as a path or opened by Pillow, read as by ``classify``: (C, S, S) float32.

    ``arguments``: those of the network's run. Raises Mistake if it cannot be read.
    """
    reader = Reader.of_run(arguments, workers=0, progress=False)
    if isinstance(image, JpegImageFile) and image.tile:  # not decoded yet: decode at the size that is needed
        image = image.fp
    pixels = reader.pixels(image, "the image") if isinstance(image, Image.Image) else reader.read(image)
    return normalizer(normalize, "cpu")(torch.from_numpy(pixels)[None])[0]
