"""What a network mistakes, drawn: images with the names of their classes, and the confusion matrix."""

import os
import warnings

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from cli import written_whole

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
