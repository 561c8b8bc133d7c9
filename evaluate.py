"""Test error of a trained network, or its class probabilities for image files.

Example: python evaluate.py work/digits.base/latest.pth
         python evaluate.py work/cifar10.base/latest.pth cat.jpg dog.png
"""

import contextlib
import ctypes
import functools
import sys

import torch
import torch.nn.functional as F

import data
import distributed
from cli import Parser
from densenet import DenseNet
from workdir import RunError, read_checkpoint


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
    loss = wrong = images = 0
    for logits, labels in predict(model, batches, amp):
        loss = loss + F.cross_entropy(logits, labels, reduction="sum")  # summed on the device, read once below
        wrong = wrong + (logits.argmax(1) != labels).sum()
        images += len(labels)
    sums = torch.tensor([float(loss), float(wrong), images], dtype=torch.float64)
    loss, wrong, images = distributed.total(sums).tolist()
    return loss / images, 100 * wrong / images


def load_model(checkpoint):
    """The trained network of a checkpoint's dict, in evaluation mode."""
    model = DenseNet(**checkpoint["config"]["model"])
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise RunError(f"the weights in the checkpoint are not of its network: {reason}") from error
    return model.eval()


def choose_device(name):
    """A torch.device for "auto", "cpu", "cuda", "cuda:N" or "mps". Raises ValueError where this machine lacks it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not available here ({str(error).splitlines()[0]}): try cpu") from error
    return device


def set_up_device(device):
    """What a process does once for the device that it computes on."""
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # fp32 shall mean fp32: who wants tensor cores has bf16
        if device.index is not None:  # without one, it is the current device already
            torch.cuda.set_device(device)  # Triton launches there


def keep_freed_memory():
    """Let glibc keep what is freed: by default every large CPU tensor comes from the kernel anew, page by page."""
    with contextlib.suppress(OSError, AttributeError):  # another C library, which manages memory its own way
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back


def choose_precision(name, device):
    """A function that makes the autocast context for "fp32", "bf16" or "auto", and the name of what was chosen.

    "auto" is bf16 where the hardware computes in it natively; elsewhere bf16 is emulated and slower than fp32.
    """
    if name == "auto":
        native = {
            "cpu": torch.cpu._is_avx512_bf16_supported,
            "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
        }
        name = "bf16" if native.get(device.type, lambda: False)() else "fp32"
    amp = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=name == "bf16")
    return amp, name


def confusion_matrix(predictions, count):
    """(count, count) int64: images of class row that were taken for class column."""
    matrix = torch.zeros(count, count, dtype=torch.int64)
    for logits, labels in predictions:
        pairs = labels * count + logits.argmax(1)
        matrix += torch.bincount(pairs.cpu(), minlength=count * count).view(count, count)
    return matrix


def wilson(error, images, z=1.96):
    """Wilson's score interval of an error measured on ``images`` images, all in percent; z = 1.96 for 95 %."""
    share = error / 100
    centre = (share + z * z / (2 * images)) / (1 + z * z / images)
    half = z / (1 + z * z / images) * (share * (1 - share) / images + z * z / (4 * images * images)) ** 0.5
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def print_test_error(matrix, classes):
    images, wrong = int(matrix.sum()), int(matrix.sum() - matrix.trace())
    error = 100 * wrong / images
    low, high = wilson(error, images)
    print(f"test error {error:.2f} % (95 % interval {low:.2f} … {high:.2f} %), {wrong} of {images} images wrong")
    width = max(map(len, classes))
    print(f"\n{'class':{width}}  error %  taken for")
    for i, name in enumerate(classes):
        row = matrix[i].clone()
        total, right = int(row.sum()), int(row[i])
        row[i] = 0
        rate = f"{100 * (1 - right / total):.2f}" if total else "–"
        confused = [f"{classes[j]} {int(row[j])}" for j in row.argsort(descending=True)[:3].tolist() if row[j]]
        print(f"{name:{width}}  {rate:>7}  {', '.join(confused)}")
    if len(classes) <= 20:
        print("\nconfusion matrix (row: class, column: taken for)")
        for name, row in zip(classes, matrix.tolist(), strict=True):
            print(f"{name:{width}}", *(f"{value:5}" for value in row))


def load_test_images(checkpoint, directory=None):
    """The images that the checkpoint's run was tested on; ``directory``: where the data set lives, if not as then.

    Raises data.DataError where they are missing or have other classes.
    """
    trained = checkpoint["config"]["arguments"]
    try:
        images, classes = data.load_test(trained["dataset"], directory or trained["data"], trained["image_size"])
    except data.DataError as error:
        raise data.DataError(f"{error}; --data says where the data set of the training is") from error
    if list(classes) != checkpoint["classes"]:
        raise data.DataError(f"the data set in {directory or trained['data']} has other classes than in training")
    return images.select(slice(trained["limit_test"]))


def predictions(checkpoint, images, device="cpu", amp=contextlib.nullcontext):
    """What ``predict`` yields for images of the data module and the trained network of a checkpoint."""
    model = load_model(checkpoint).to(device, memory_format=torch.channels_last)
    batch_size = checkpoint["config"]["arguments"]["batch_size"]
    return predict(model, images.to(device).batches(batch_size, checkpoint["normalize"]), amp)


def classify(checkpoint, paths, device="cpu", amp=contextlib.nullcontext):
    """Class probabilities of a list of image files of any size: (images, classes) float32, in their order.

    Raises data.DataError where a file is missing or no image, or the list is empty.
    """
    if isinstance(paths, str) or not paths:
        raise data.DataError(f"{paths!r} is not a list of image files")
    images = data.unlabelled(paths, checkpoint["config"]["arguments"]["image_size"])
    return torch.cat([logits.softmax(1).cpu() for logits, _ in predictions(checkpoint, images, device, amp)])


def print_probabilities(paths, probabilities, classes):
    for path, row in zip(paths, probabilities, strict=True):
        best = row.argsort(descending=True)[:5].tolist()
        print(f"{path}:", ", ".join(f"{classes[i]} {100 * row[i]:.1f} %" for i in best))


def main(argv=None):
    parser = Parser(prog="evaluate.py", description=__doc__)
    parser.add_argument("checkpoint", help="latest.pth, best.pth or weights.pth of a run")
    parser.add_argument("images", nargs="*", default=[], help="image files to classify (default: the test set)")
    parser.add_argument("--data", metavar="DIR", help="where the data set lives (default: as in training)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        checkpoint = read_checkpoint(args.checkpoint)
        device = choose_device(args.device)
        set_up_device(device)
        amp, _ = choose_precision(args.precision, device)
        classes = checkpoint["classes"]
        if args.images:
            print_probabilities(args.images, classify(checkpoint, args.images, device, amp), classes)
        else:
            images = load_test_images(checkpoint, args.data)
            print_test_error(confusion_matrix(predictions(checkpoint, images, device, amp), len(classes)), classes)
    except (RunError, data.DataError, ValueError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
