"""make_graph.py as a command: files, formats, mistakes. What is drawn: tests/reports/test_drawing.py."""

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import status_of
from PIL import Image

import make_graph

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="needs the program dot (apt install graphviz)")


@needs_dot
@pytest.mark.parametrize(
    ("flags", "kind", "start"),
    [
        ("", "png", b"\x89PNG"), ("--depth 16 --part stem", "svg", b"<?xml"), ("--depth 16 --part blocks.1 --direction right", "pdf", b"%PDF"),
        ("--depth 10", "dot", b"digraph"),
    ],
)  # fmt: skip
def test_the_suffix_chooses_the_format(tmp_path, capfd, flags, kind, start):
    path = tmp_path / "new" / f"model.{kind}"
    assert make_graph.main([*flags.split(), "--out", str(path)]) == 0
    assert capfd.readouterr() == (f"{path}\n", "") and list(path.parent.iterdir()) == [path]
    assert path.read_bytes().startswith(start)
    if kind == "png":  # the default network: fits a page
        width, height = Image.open(path).size
        assert width / 2 < height < 2 * width
    path.unlink()
    assert make_graph.main([*flags.split(), "--out", "graph.dot"]) == 0
    drawn = subprocess.run(["dot", "-Tsvg", "graph.dot"], capture_output=True, encoding="utf-8")
    assert drawn.returncode == 0 and drawn.stderr == "" and "</svg>" in drawn.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--out model.jpeg", "--out model.jpeg: needs one of the suffixes .svg, .png, .pdf, .dot"),
        ("--depth 43", "depth 43: a network with bottlenecks needs depth = 6n + 4, such as 40 or 46"),
        ("--arch densenet121 --depth 40", "--arch densenet121 sets the depth: leave out one of the two"),
        ("--depth 10 --part blocks.3", "part 'blocks.3': choose one of stem, blocks.0, transitions.0, blocks.1"),
        ("--depth 10 --image-size 2", "images of 2×2 pixels are too small"),
        ("--depth 10 --out file/model.dot", "file: File exists"),
        ("--depth 10 --out folder.dot", "folder.dot: is not a file that can be replaced"),
        ("--depth 10", "the program dot is missing or cannot draw images/model.svg: install it (apt install graphviz)"),
    ],
)
def test_a_mistake_ends_with_one_line_and_status_2(tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.setenv("PATH", str(tmp_path))  # has no dot
    Path("file").touch()
    Path("folder.dot").mkdir()
    assert status_of(make_graph.main, flags.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("make_graph.py: error: ") and words in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.dot"]
