"""A trained network, read from its checkpoint and run on images; its mistakes, counted.

    from inference import classify
    from workdir import read_checkpoint
    checkpoint = read_checkpoint("work/digits.bc16/weights.pth")
    probabilities = classify(checkpoint, ["seven.png"])      # (1, 10), in the order of checkpoint["classes"]
"""

import contextlib

import torch
import torch.nn.functional as F

import data
import distributed
from batches import memory_format
from cli import Mistake
from densenet import DenseNet
from files import unlabelled
from reader import Reader


@torch.no_grad()
def predict(model, batches, amp):
    """Yield (logits (B, classes) float32, labels (B,)) of every batch, in order, in evaluation mode."""
    model.eval()
    for images, labels in batches.in_order():
        with amp():
            logits = model(images)
        yield logits.float(), labels


def evaluate(model, batches, amp):
    """Mean cross-entropy loss and error in percent, averaged over the images of all ranks."""
    loss = wrong = count = 0
    for logits, labels in predict(model, batches, amp):
        loss = loss + F.cross_entropy(logits, labels, reduction="sum")  # summed on the device, read once below
        wrong = wrong + (logits.argmax(1) != labels).sum()
        count += len(labels)
    sums = torch.tensor([float(loss), float(wrong), count], dtype=torch.float64)
    loss, wrong, count = distributed.all_reduce(sums).tolist()
    return loss / count, 100 * wrong / count


def load_model(checkpoint):
    """The trained network of a checkpoint's dict, in evaluation mode."""
    try:
        model = DenseNet(**checkpoint["config"]["model"])
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise Mistake(f"the weights in the checkpoint are not of its network: {reason}") from error
    return model.eval()


def load_test_images(checkpoint, directory=None):
    """The images that the checkpoint's run was tested on, and lines to print about them.

    ``directory`` says where the data set lives, if not where it was. Raises Mistake where images are missing or have
    other classes.
    """
    trained = checkpoint["config"]["arguments"]
    root, reader = directory or trained["data"], Reader.of_run(trained, workers=0, progress=False)
    layout = checkpoint.get("layout", data.FIRST_LAYOUT)
    try:
        images, notes = data.load_test(trained["dataset"], root, reader, checkpoint["classes"], layout)
    except Mistake as error:
        raise Mistake(f"{error}; --data says where the data set of the training is") from error
    return images.select(slice(trained["limit_test"])), notes


def predictions(checkpoint, images, device="cpu", amp=contextlib.nullcontext):
    """What ``predict`` yields for images of the data module and the trained network of a checkpoint."""
    model = load_model(checkpoint).to(device, memory_format=memory_format(device))
    batch_size = checkpoint["config"]["arguments"]["batch_size"]
    return predict(model, images.to(device).batches(batch_size, checkpoint["normalize"]), amp)


def classify(checkpoint, paths, device="cpu", amp=contextlib.nullcontext):
    """Class probabilities of a list of image files of any size: (images, classes) float32, in their order.

    Raises Mistake where a file is missing or no image, or the list is empty.
    """
    if isinstance(paths, str) or not paths:
        raise Mistake(f"{paths!r} is not a list of image files")
    images = unlabelled(paths, Reader.of_run(checkpoint["config"]["arguments"], workers=0, progress=False))
    return torch.cat([logits.softmax(1).cpu() for logits, _ in predictions(checkpoint, images, device, amp)])


def confusion_matrix(predictions, count):
    """(count, count) int64: images of class row that were taken for class column."""
    matrix = torch.zeros(count, count, dtype=torch.int64)
    for logits, labels in predictions:
        pairs = labels * count + logits.argmax(1)
        matrix += torch.bincount(pairs.cpu(), minlength=count * count).view(count, count)
    return matrix


def wilson(error, count, z=1.96):
    """Wilson's score interval of an error measured on ``count`` images, errors in percent; z = 1.96 for 95 %."""
    share = error / 100
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)
