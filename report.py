"""What a network takes images for, in words and numbers: a table of scores per class, and a CSV row per image."""

import contextlib
import csv
import io
import math
import sys

from cli import written_whole
from inference import class_scores
from intervals import wilson


def headline(matrix, kind="test"):
    count, wrong = int(matrix.sum()), int(matrix.sum() - matrix.trace())
    error = 100 * wrong / count
    low, high = wilson(error, count)
    return f"{kind} error {error:.2f} % (95 % interval {low:.2f} … {high:.2f} %), {wrong} of {count} images wrong"


def print_scores(matrix, classes, kind="test"):
    """Print the error, each class's scores and what it is taken for, and the matrix itself where it is small.

    A score that is zero by zero is shown as – and left out of the average over the classes.
    """
    print(headline(matrix, kind))
    width, scores = max(map(len, (*classes, "macro average"))), class_scores(matrix)
    print(f"\n{'class':{width}}  images  error %  precision %  recall %    F1 %  taken for")
    for i, name in enumerate(classes):
        row = matrix[i].clone()
        row[i] = 0
        confused = [f"{classes[j]} {int(row[j])}" for j in row.argsort(descending=True)[:3].tolist() if row[j]]
        print(f"{name:{width}}  {int(matrix[i].sum()):6}  {cells(scores[:, i])}  {', '.join(confused)}".rstrip())
    print(f"{'macro average':{width}}  {int(matrix.sum()):6}  {cells(scores.nanmean(1))}")
    if len(classes) <= 20:
        print("\nconfusion matrix (row: class, column: taken for)")
        for name, row in zip(classes, matrix.tolist(), strict=True):
            print(f"{name:{width}}", *(f"{value:5}" for value in row))


def cells(scores):
    """Error, precision, recall and F1 of a class, in percent, for its line of the table."""
    precision, recall, f1 = scores.tolist()
    columns = ((100 - recall, 7), (precision, 11), (recall, 8), (f1, 6))
    return "  ".join(f"{'–' if math.isnan(value) else f'{value:.2f}':>{width}}" for value, width in columns)


def likeliest(probabilities, classes, count):
    """The ``count`` likeliest classes in words, of the probabilities (classes,) of an image."""
    best = probabilities.argsort(descending=True)[:count].tolist()
    return ", ".join(f"{classes[i]} {100 * probabilities[i]:.1f} %" for i in best)


@contextlib.contextmanager
def csv_table(path, column, classes, labelled=False):
    """A function that writes what an image is taken for as a row of a CSV file; None where ``path`` is None.

    The file is there, whole, when the block has ended. Its first column holds the images' names and is named
    ``column``; then come the class taken for and its probability, with labels the true class and whether both are the
    same (1 or 0), and the probability of each class.
    """
    if path is None:
        yield None
        return
    with written_whole(path) as file:

        def write_row(*cells):
            line = io.StringIO()
            csv.writer(line, lineterminator="\n").writerow(cells)
            file.write(line.getvalue().encode("utf-8", sys.getfilesystemencodeerrors()))  # paths as they are on disk

        def write(name, taken, probabilities, label=None):
            truth = [] if label is None else [classes[label], int(taken == label)]
            values = [f"{value:.6g}" for value in probabilities.tolist()]
            write_row(name, classes[taken], values[taken], *truth, *values)

        write_row(column, "class", "probability", *["true", "right"] * labelled, *classes)
        yield write
