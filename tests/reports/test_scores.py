"""What is written of predictions. Scores and pictures: tests/inference/test_evaluate.py."""

import pandas as pd
import pytest
import torch

from reports.scores import csv_table, print_scores


@pytest.mark.parametrize(
    ("column", "labelled", "classes", "named"),
    [
        ("path", False, ["cat", "true"], ["cat", "true"]),
        ("path", True, ["cat", "true"], ["p(cat)", "p(true)"]),
        ("index", False, ["path", "p(path)"], ["path", "p(path)"]),
        ("path", False, ["path", "p(path)"], ["p(path)", "p(p(path))"]),
        ("path", False, ["class", "probability"], ["p(class)", "p(probability)"]),
    ],
)
def test_no_two_columns_have_one_name(tmp_path, column, labelled, classes, named):
    with csv_table(tmp_path / "a.csv", column, classes, labelled) as write:
        write("a.png", 1, torch.tensor([0.25, 0.75]), 0 if labelled else None)
    text = (tmp_path / "a.csv").read_text()
    assert text.splitlines()[0].split(",") == [column, "class", "probability", *["true", "right"] * labelled, *named]
    [row] = pd.read_csv(tmp_path / "a.csv", dtype={"class": str}).to_dict("records")
    assert row["class"] == classes[1] and row["probability"] == row[named[1]] == 0.75 and row[named[0]] == 0.25


def test_a_class_has_the_three_others_that_it_is_taken_for_most_often(capsys):
    print_scores(torch.tensor([[9, 2, 4, 1, 3], *[[0] * 5] * 4]), list("abcde"))
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("a ") and "," in line]
    assert line.endswith("  c 4, e 3, b 2")
