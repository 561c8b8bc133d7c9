"""Test error of a trained network, or its class probabilities for image files.

Example: python evaluate.py work/digits.base/latest.pth
         python evaluate.py work/cifar10.base/latest.pth cat.jpg dog.png
"""

import sys

from cli import Parser, command
from device import PRECISIONS, choose_device, choose_precision, set_up_device
from inference import classify, confusion_matrix, load_test_images, predictions, wilson
from workdir import read_checkpoint


def print_test_error(matrix, classes):
    count, wrong = int(matrix.sum()), int(matrix.sum() - matrix.trace())
    error = 100 * wrong / count
    low, high = wilson(error, count)
    print(f"test error {error:.2f} % (95 % interval {low:.2f} … {high:.2f} %), {wrong} of {count} images wrong")
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


def print_probabilities(paths, probabilities, classes):
    for path, row in zip(paths, probabilities, strict=True):
        best = row.argsort(descending=True)[:5].tolist()
        print(f"{path}:", ", ".join(f"{classes[i]} {100 * row[i]:.1f} %" for i in best))


@command
def main(argv=None):
    parser = Parser(prog="evaluate.py", description=__doc__)
    parser.add_argument("checkpoint", help="latest.pth, best.pth or weights.pth of a run")
    parser.add_argument("images", nargs="*", default=[], help="image files to classify (default: the test set)")
    parser.add_argument("--data", metavar="DIR", help="where the data set lives (default: as in training)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    checkpoint = read_checkpoint(args.checkpoint)
    device = choose_device(args.device)
    set_up_device(device)
    amp, _ = choose_precision(args.precision, device)
    classes = checkpoint["classes"]
    if args.images:
        print_probabilities(args.images, classify(checkpoint, args.images, device, amp), classes)
    else:
        images, notes = load_test_images(checkpoint, args.data)
        print("\n".join(notes), end="\n" * bool(notes))
        print_test_error(confusion_matrix(predictions(checkpoint, images, device, amp), len(classes)), classes)


if __name__ == "__main__":
    sys.exit(main())
