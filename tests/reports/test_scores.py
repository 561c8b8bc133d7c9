"""Scores, rows and pictures of predictions; those that evaluate.py asks for: tests/test_evaluate.py."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import precision_recall_fscore_support

from inputs.batches import ImageTensors
from reports import scores


@pytest.mark.parametrize(
    ("column", "labelled", "classes", "named"),
    [
        ("index", False, ["path", "true"], ["path", "true"]),
        ("path", True, ["cat", "true"], ["p(cat)", "p(true)"]),
        ("path", False, ["class", "p(class)"], ["p(class)", "p(p(class))"]),
    ],
)
def test_no_two_columns_have_one_name(tmp_path, column, labelled, classes, named):
    with scores.csv_table(tmp_path / "a.csv", column, classes, labelled) as write:
        write("a.png", 1, torch.tensor([0.25, 0.75]), 0 if labelled else None)
    text = (tmp_path / "a.csv").read_text()
    assert text.splitlines()[0].split(",") == [column, "class", "probability", *["true", "right"] * labelled, *named]
    [row] = pd.read_csv(tmp_path / "a.csv", dtype={"class": str}).to_dict("records")
    assert row["class"] == classes[1] and row["probability"] == row[named[1]] == 0.75 and row[named[0]] == 0.25


def test_scores_are_scikit_learn_s():
    generator = torch.Generator().manual_seed(1)
    labels, predicted = (torch.randint(7, (200,), generator=generator) for _ in range(2))
    labels[labels == 2], predicted[predicted == 4] = 3, 5  # a class without images, and one that is never predicted
    matrix = scores.confusion_matrix(labels, predicted, 8)  # of the last class neither
    for average, ours in ((None, scores.class_scores(matrix)), ("macro", scores.class_scores(matrix).nanmean(1))):
        theirs = precision_recall_fscore_support(labels, predicted, labels=range(8), average=average, zero_division=np.nan)[:3]
        np.testing.assert_allclose(ours, 100 * np.array(theirs), rtol=1e-12)


def test_the_table_shows_scores_and_dashes_for_zero_by_zero(capsys):
    scores.print_scores(torch.tensor([[3, 1, 0], [0, 0, 0], [2, 0, 0]]), ["cat", "dog", "cow"], "validation")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "validation error 50.00 % (95 % interval 18.76 … 81.24 %), 3 of 6 images wrong; always the largest class: 33.33 %"
    assert lines[2:7] == [
        "class          images  error %  precision %  recall %    F1 %  predicted as",
        "cat                 4    25.00        60.00     75.00   66.67  dog 1",
        "dog                 0        –         0.00         –    0.00",
        "cow                 2   100.00            –      0.00    0.00  cat 2",
        "macro average       6    62.50        30.00     37.50   22.22",
    ]
    scores.print_scores(torch.tensor([[9, 2, 4, 1, 3], *[[0] * 5] * 4]), list("abcde"))
    assert "  c 4, e 3, b 2\n" in capsys.readouterr().out  # the three that it is predicted as most often


@pytest.mark.parametrize(("count", "named", "numbered"), [(10, True, True), (100, True, False), (300, False, False)])
def test_confusion_of_few_and_many_classes(figures, count, named, numbered):
    """Names do not cover each other, and there are numbers where there is room for them."""
    matrix = torch.eye(count, dtype=torch.int64) * 9
    matrix[0, 1] = 2
    classes = [f"class_{i}" for i in range(count)]
    scores.draw_confusion(Path("confusion.png"), matrix, classes, "title")
    figure = figures["confusion.png"]
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert len(axes.texts) == (count + 1 if numbered else 0) and max(figure.get_size_inches()) < 25
    labels = axes.get_yticklabels()
    assert ([label.get_text() for label in labels] == classes) is named
    boxes = [label.get_window_extent() for label in labels]
    assert all(lower.y1 <= upper.y0 and lower.x0 > 0 for upper, lower in itertools.pairwise(boxes))


def test_names_in_pictures_are_no_markup_and_may_be_odd(figures, recwarn):
    """What looks like a formula, what no font has, what is no character, what is very long."""
    classes = ["$\\x$", "猫\udcf6", "a class with a very long name"]
    scores.draw_confusion(Path("confusion.png"), torch.eye(3, dtype=torch.int64), classes, "run_$\\x$/\udcf6")
    images = ImageTensors(torch.zeros(1, 8, 8, 1, dtype=torch.uint8), torch.zeros(1), ["images/$\\x$\udcf6.png"])
    scores.draw_mistakes(Path("mistakes.png"), images, [(*classes[:2], 0.5)], "run_$\\x$/\udcf6")
    labels = figures["confusion.png"].axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == [r"\$\x\$", r"猫\udcf6", "a class with a very…"]
    assert figures["mistakes.png"].axes[0].get_title() == "\\$\\x\\$\n→ 猫\\udcf6\n50.0 %"
    assert not recwarn.list and Image.open("confusion.png") and Image.open("mistakes.png")
