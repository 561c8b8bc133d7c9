"""Reports on predictions: scores per class, a CSV row per image, misclassified images, the confusion matrix."""

import contextlib
import csv
import io
import math
import os
import sys

import numpy as np
import torch

from common.console import printable
from common.files import written_whole
from reports.tables import wilson

PER_ROW = 8  # images
NUMBERED = 25  # a confusion matrix of more classes has no room for numbers
NAMED = 150  # one of more classes has no room for their names


def headline(matrix, kind="test"):
    count, wrong = int(matrix.sum()), int(matrix.sum() - matrix.trace())
    error = 100 * wrong / count
    low, high = wilson(error, count)
    return f"{kind} error {error:.2f} % (95 % interval {low:.2f} … {high:.2f} %), {wrong} of {count} images wrong"


def print_scores(matrix, classes, kind="test"):
    """Print the error, scores and confusions of each class, and the confusion matrix (classes, classes) if it is small.

    A score of zero by zero is shown as –, and does not count in the average over the classes.
    """
    guess = 100 - 100 * int(matrix.sum(1).max()) / int(matrix.sum())
    print(f"{headline(matrix, kind)}; always the largest class: {guess:.2f} %")
    classes = [printable(name) for name in classes]
    scores = class_scores(matrix)
    rows = torch.cat((100 - scores[1:2], scores))  # error, precision, recall and F1, (4, classes), in percent

    def cells(values):
        texts = ("–" if math.isnan(value) else f"{value:.2f}" for value in values.tolist())
        return "  ".join(map(str.rjust, texts, (7, 11, 8, 6)))

    width = max(map(len, (*classes, "macro average")))
    print(f"\n{'class':{width}}  images  error %  precision %  recall %    F1 %  predicted as")
    for i, name in enumerate(classes):
        order = matrix[i].argsort(descending=True)[:4].tolist()
        confused = [f"{classes[j]} {int(matrix[i, j])}" for j in order if j != i and matrix[i, j]][:3]
        print(f"{name:{width}}  {int(matrix[i].sum()):6}  {cells(rows[:, i])}  {', '.join(confused)}".rstrip())
    print(f"{'macro average':{width}}  {int(matrix.sum()):6}  {cells(rows.nanmean(1))}")
    if len(classes) <= 20:
        print("\nconfusion matrix (row: class, column: predicted class)")
        for name, row in zip(classes, matrix.tolist(), strict=True):
            print(f"{name:{width}}", *(f"{value:5}" for value in row))


def most_probable(probabilities, classes, count):
    """The ``count`` most probable classes of an image in words, from its probabilities (classes,)."""
    best = probabilities.argsort(descending=True)[:count].tolist()
    return ", ".join(f"{classes[i]} {100 * probabilities[i]:.1f} %" for i in best)


@contextlib.contextmanager
def csv_table(path, column, classes, labelled=False):
    """A function that writes an image's row of a CSV file, which appears when the block ends; None without a ``path``.

    The columns: ``column``, the name of the image; "class" and "probability", as predicted; if ``labelled``, "true" and
    "right" (1 or 0); and the probability of each class, by its name, or p(NAME) if a class is called like a column.
    """
    if path is None:
        yield None
        return
    fixed = [column, "class", "probability", *(["true", "right"] if labelled else [])]
    header = [*fixed, *(f"p({name})" for name in classes)] if {*fixed} & {*classes} else [*fixed, *classes]
    with written_whole(path) as file:
        # Paths stay as they are on disk, even if they are not UTF-8.
        text = io.TextIOWrapper(file, "utf-8", sys.getfilesystemencodeerrors(), newline="", write_through=True)
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)

        def write(name, predicted, probabilities, label=None):
            truth = [] if label is None else [classes[label], int(predicted == label)]
            values = [f"{value:.6g}" for value in probabilities.tolist()]
            writer.writerow([name, classes[predicted], values[predicted], *truth, *values])

        yield write
        text.detach()


def draw_mistakes(path, images, captions, title):
    """Draw misclassified ImageTensors or ImageFiles; a caption is (true class, predicted class, probability)."""
    from reports import curves

    columns = min(PER_ROW, len(images))
    rows = -(-len(images) // columns)
    figure = curves.Figure(figsize=(max(1.4 * columns, 6), 2 * rows + 0.6), layout="constrained")
    figure.suptitle(curves.drawable(f"{title}\ntrue class → predicted class, and its probability"), fontsize=10)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    drawn = zip(figure.axes, images.names, images.pixels.numpy(), captions, strict=False)  # of more axes than images
    for axes, name, pixels, (true, predicted, probability) in drawn:
        axes.imshow(pixels if pixels.shape[2] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=255)
        caption = f"{shortened(true)}\n→ {shortened(predicted)}\n{100 * probability:.1f} %"
        axes.set_title(curves.drawable(caption), fontsize=7)
        name = curves.drawable(shortened(os.path.basename(name) if isinstance(name, str) else f"index {name}"))
        axes.text(0.5, -0.03, name, ha="center", va="top", transform=axes.transAxes, fontsize=6, color="0.5")
    curves.save(figure, path)


def draw_confusion(path, matrix, classes, title):
    """Draw a confusion matrix (classes, classes), each row in percent: right predictions in blue, wrong ones in red."""
    from matplotlib.colors import PowerNorm

    from reports import curves

    counts, size = matrix.numpy(), len(classes)
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    right = np.eye(size, dtype=bool)
    most = max(percent[~right].max(), 5)
    side = min(max(size * (0.5 if size <= NUMBERED else 0.13), 4), 20)  # inches
    figure = curves.Figure(figsize=(side + 3, side + 1.5), layout="compressed")
    figure.suptitle(curves.drawable(title), fontsize=10)
    axes = figure.subplots()
    blue = axes.imshow(np.ma.array(percent, mask=~right), cmap="Blues", vmin=0, vmax=100)
    red = axes.imshow(np.ma.array(percent, mask=right | (counts == 0)), cmap="Reds", norm=PowerNorm(0.5, 0, most))
    for shade, label in ((blue, "right"), (red, "wrong")):
        figure.colorbar(shade, label=f"{label} (% of the class)", shrink=0.4, fraction=0.04, pad=0.02)
    axes.set(xlabel="predicted class", ylabel="class")
    if size <= NAMED:
        names, fontsize = [curves.drawable(shortened(name)) for name in classes], 9 if size <= NUMBERED else 6
        axes.set_xticks(range(size), names, rotation=90, fontsize=fontsize)
        axes.set_yticks(range(size), names, fontsize=fontsize)
    for row, column in zip(*counts.nonzero(), strict=True) if size <= NUMBERED else ():
        color = "white" if percent[row, column] > (50 if row == column else most / 3) else "black"
        axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=8, color=color)
    curves.save(figure, path)


def shortened(name, length=20):
    return name if len(name) <= length else f"{name[: length - 1]}…"


def confusion_matrix(labels, predicted, count):
    """(count, count) int64: how many images of the class of a row were predicted as the class of a column."""
    return torch.bincount(labels * count + predicted, minlength=count * count).view(count, count)


def class_scores(matrix):
    """(3, classes) float64: precision, recall and F1 of each class in percent; NaN for zero by zero."""
    right, images, predicted = matrix.diagonal().double(), matrix.sum(1), matrix.sum(0)
    return 100 * torch.stack((right / predicted, right / images, 2 * right / (predicted + images)))
