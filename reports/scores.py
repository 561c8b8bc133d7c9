"""What a network predicts: scores per class, a CSV row per image, misclassified images, the confusion matrix."""

import contextlib
import csv
import io
import math
import os
import sys
import warnings

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from common.files import written_whole
from reports.tables import wilson


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


PER_ROW = 8  # images
NUMBERED = 25  # classes: of more, the cells of the matrix have no room for numbers
NAMED = 150  # classes: of more, the matrix has no room for their names


def draw_mistakes(path, images, captions, title):
    """Draw images of the data module, each with its caption: (true class, class taken for, probability)."""
    columns = min(PER_ROW, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(max(1.4 * columns, 6), 2 * rows + 0.6), layout="constrained")
    title = f"{title}\ntrue class → class taken for, and its probability"
    figure.suptitle(drawable(title), fontsize=10, parse_math=False)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    drawn = zip(figure.axes, images.names, images.pixels.numpy(), captions, strict=False)  # of more axes than images
    for axes, name, pixels, (true, taken, probability) in drawn:
        axes.imshow(pixels if pixels.shape[2] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=255)
        caption = f"{shown(true)}\n→ {shown(taken)}\n{100 * probability:.1f} %"
        axes.set_title(caption, fontsize=7, parse_math=False)
        name = os.path.basename(name) if isinstance(name, str) else f"index {name}"
        where = {"x": 0.5, "y": -0.03, "ha": "center", "va": "top", "transform": axes.transAxes}
        axes.text(s=shown(name), fontsize=6, color="0.5", parse_math=False, **where)
    save(figure, path)


def draw_confusion(path, matrix, classes, title):
    """Draw a confusion matrix (classes, classes) as shares of its rows: what is right in blue, what is wrong in red."""
    counts, size = matrix.numpy(), len(classes)
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    right = np.eye(size, dtype=bool)
    side = min(max(size * (0.5 if size <= NUMBERED else 0.13), 4), 20)  # inches
    figure = Figure(figsize=(side + 3, side + 1.5), layout="compressed")
    figure.suptitle(drawable(title), fontsize=10, parse_math=False)
    axes = figure.subplots()
    blue = axes.imshow(np.ma.array(share, mask=~right), cmap="Blues", vmin=0, vmax=100)
    most = max(share[~right].max(), 5)
    red = axes.imshow(np.ma.array(share, mask=right | (counts == 0)), cmap="Reds", norm=PowerNorm(0.5, 0, most))
    for shade, label in ((blue, "right"), (red, "wrong")):
        figure.colorbar(shade, label=f"{label} (% of the class)", shrink=0.4, fraction=0.04, pad=0.02)
    axes.set(xlabel="taken for", ylabel="class")
    if size <= NAMED:
        names = [shown(name) for name in classes]
        style = {"fontsize": 9 if size <= NUMBERED else 6, "parse_math": False}
        axes.set_xticks(range(size), names, rotation=90, **style)
        axes.set_yticks(range(size), names, **style)
    for row, column in zip(*counts.nonzero(), strict=True) if size <= NUMBERED else ():
        color = "white" if share[row, column] > (50 if row == column else most / 3) else "black"
        axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=8, color=color)
    save(figure, path)


def drawable(text):
    """Text with a question mark for what is no character, such as a stray byte in a file's name."""
    return text.encode(errors="replace").decode()


def shown(name, length=20):
    return drawable(name if len(name) <= length else f"{name[: length - 1]}…")


def save(figure, path):
    with warnings.catch_warnings(action="ignore"), written_whole(path) as file:  # of characters that no font here has
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=150)


def most_confident(wrong, confidence, count):
    """Positions of the ``count`` highest confidences (N,) among the images that are ``wrong`` (N,) bool."""
    positions = wrong.nonzero()[:, 0]
    return positions[confidence[positions].argsort(descending=True, stable=True)[:count]]


def confusion_matrix(labels, taken, count):
    """(count, count) int64: images of class row that were taken for class column."""
    return torch.bincount(labels * count + taken, minlength=count * count).view(count, count)


def class_scores(matrix):
    """(3, classes) float64: precision, recall and F1 of each class in percent, NaN where one is zero by zero."""
    right, images, taken = matrix.diagonal().double(), matrix.sum(1), matrix.sum(0)
    return 100 * torch.stack((right / taken, right / images, 2 * right / (taken + images)))
