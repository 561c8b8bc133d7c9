import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

import make_graph
from densenet import ARCHITECTURES, BottleneckLayer, DenseNet, SingleLayer, Transition

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="needs the program dot (apt install graphviz)")


@pytest.fixture
def text(tmp_path):
    """The source of a graph, as make_graph.py writes it: text("--depth", "16")."""

    def write(*flags):
        path = tmp_path / "graph.dot"
        assert make_graph.main([*flags, "--out", str(path)]) == 0
        return path.read_text()

    return write


def boxes(source):
    """Name of each box → lines of its text."""
    rows = re.findall(r"^\s*(\S+) \[label=<(.*)> .*\]$", source, re.MULTILINE)
    return {name.strip('"'): re.sub(r"<br[^>]*>", "\n", label) for name, label in rows}


def lines(label):
    return re.sub(r"<[^>]*>", "", label).strip().split("\n")


def arrows(source):
    return [(a.strip('"'), b.strip('"')) for a, b in re.findall(r"^\s*([^\s:]+)(?::\w)? -> ([^\s:]+)", source, re.MULTILINE)]


def measured(model, kinds, image_size=32):
    """Channels and maps that modules of some kinds read and return, from hooks on a pass with real tensors."""
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            module.register_forward_hook(lambda _, x, y, name=name: shapes.update({name: (x[0].shape[1:], y.shape[1:])}))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, image_size, image_size))
    return shapes


@pytest.mark.parametrize("flags", ["--depth 16 --growth-rate 4", "--depth 16 --growth-rate 5 --no-bottleneck --reduction 1"])
def test_layers_and_transitions_have_the_sizes_of_the_model(text, flags):
    args = make_graph.make_parser().parse_args(flags.split())
    given = {"depth": args.depth, "growth_rate": args.growth_rate}
    model = DenseNet(**given, **({"bottleneck": False, "reduction": 1.0} if args.bottleneck is False else {}))
    drawn = {name: lines(label) for name, label in boxes(text(*flags.split())).items()}
    shapes = measured(model, (BottleneckLayer, SingleLayer, Transition))
    for name, (x, y) in shapes.items():
        if name.startswith("transitions"):
            assert drawn[name][-1] == f"{make_graph.size(x)} → {make_graph.size(y)}"
        else:
            assert drawn[name] == [f"layer {int(name[-1]) + 1}", f"{x[0]} → {y[0]} channels"]
    assert {name for name in drawn if "layers" in name or "transitions" in name} == set(shapes)


def test_every_layer_reads_all_before_it(text):
    source = text("--depth", "28", "--part", "blocks.1")
    layers = [f"blocks.1.layers.{i}" for i in range(4)]
    last = next(name for name, label in boxes(source).items() if lines(label)[0] == "concatenation")
    row = ["blocks.1.input", *layers, last]
    expected = [(a, b) for i, a in enumerate(row) for b in row[i + 1 :]]
    assert sorted(arrows(source)) == sorted([*expected, ("transitions.0", "blocks.1.input")])


def test_deep_blocks_are_shortened(text):
    drawn = boxes(text())
    assert len(drawn) < 25
    assert lines(drawn["blocks.1.layers.2-14"]) == ["layers 3 … 15", "132 … 276 → 12 channels each"]
    assert lines(drawn["blocks.1.layers.15"]) == ["layer 16", "288 → 12 channels"]
    assert lines(drawn["classifier"])[-1] == "342×8×8 → 10"
    whole = boxes(text("--max-layers", "16"))
    assert sum(lines(label)[0].startswith("layer ") for label in whole.values()) == 48


def test_depth_limits_open_blocks_and_layers(text):
    blocks = boxes(text("--depth", "16", "--depth-limit", "1"))
    assert list(blocks) == ["image", "stem", "blocks.0", "transitions.0", "blocks.1", "transitions.1", "blocks.2", "classifier"]
    words = ["dense block 1: 2 layers", "BN-ReLU-Conv 1×1 → 48", "BN-ReLU-Conv 3×3 → 12", "24×32×32 → 48×32×32"]
    assert lines(blocks["blocks.0"]) == words
    operations = Counter(lines(label)[0] for label in boxes(text("--depth", "16", "--depth-limit", "3")).values())
    modules = Counter(type(module).__name__ for module in DenseNet(depth=16).modules())
    assert operations["BN"] == operations["ReLU"] == modules["BatchNorm2d"]
    assert operations["Conv 1×1"] + operations["Conv 3×3"] == modules["Conv2d"]
    assert operations["concatenation"] == 3 and operations["linear"] == 1 and "dropout 0.0" not in operations


def test_dropout_is_drawn_where_it_is_on(text):
    source = text("--depth", "10", "--drop-rate", "0.2", "--depth-limit", "3")
    assert source.count("<b>dropout 0.2</b>") == 3 * 2 + 2  # after every convolution but the first


class Gate(torch.nn.Module):
    """Which torch.fx cannot see into."""

    def forward(self, x):
        return x if x.sum() > 0 else x * torch.ones(x.shape[1], 1, 1)


def test_modules_that_are_not_known_have_their_names():
    with torch.device("meta"):
        model = DenseNet(depth=10)
        model.blocks[1].layers[0].relu1, model.blocks[2].layers[0].relu2 = torch.nn.GELU(), Gate()
        model.transitions[0].relu = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.1))
    model.blocks[2].layers[0].relu2.forward = torch.relu  # which can be computed without data
    for depth_limit in (1, 2, 3):
        source = make_graph.model_graph(model, 32, depth_limit, 4, None, "down").source
        assert depth_limit == 2 or all(name in source for name in ("GELU", "Gate", "SiLU"))


FAST = ("densenet_40_12", "densenet121")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in ARCHITECTURES])
def test_draws_the_networks_of_the_paper(text, name):
    last = lines(boxes(text("--arch", name))["classifier"])[-1]
    assert last.endswith("→ 10" if "_" in name else "→ 1000")


def test_the_autograd_graph_is_the_one_of_the_cpu(text):
    """Functions without data are those of a real pass."""
    model = DenseNet(depth=10)
    seen, waiting = {}, [model(torch.zeros(2, 3, 32, 32)).grad_fn]
    while waiting:
        function = waiting.pop()
        if function is not None and function not in seen:
            seen[function] = None
            waiting += [source for source, _ in function.next_functions]
    source = text("--depth", "10", "--autograd")
    drawn = Counter(lines(label)[0] for label in boxes(source).values())
    parameters = dict(model.named_parameters())
    assert drawn.keys() >= {"ConvolutionBackward0", "CatBackward0", "ReluBackward0", *parameters}
    functions = Counter(function.name() for function in seen)
    del functions["torch::autograd::AccumulateGrad"]
    assert functions == Counter({name: count for name, count in drawn.items() if name not in parameters})
    assert len(arrows(source)) == sum(parent is not None for function in seen for parent, _ in function.next_functions)


def test_writes_the_same_text_each_time(text):
    assert text("--depth", "10") == text("--depth", "10")
    assert text("--depth", "10", "--autograd") == text("--depth", "10", "--autograd")


@needs_dot
@pytest.mark.parametrize(("kind", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_the_suffix_chooses_the_format(tmp_path, kind, start, capsys):
    path = tmp_path / "new" / f"model.{kind}"
    assert make_graph.main(["--depth", "10", "--depth-limit", "1", "--out", str(path)]) == 0
    assert path.read_bytes().startswith(start)
    assert capsys.readouterr().out == f"{path}\n"
    assert list(path.parent.iterdir()) == [path]


@needs_dot
def test_the_default_picture_fits_a_page(tmp_path):
    assert make_graph.main(["--out", str(tmp_path / "model.png")]) == 0
    width, height = Image.open(tmp_path / "model.png").size
    assert width / 2 < height < 2 * width


@needs_dot
def test_dot_draws_every_kind_of_graph_without_a_warning(text):
    for flags in ("--depth-limit 2", "--depth-limit 3", "--part blocks.1 --direction right", "--autograd"):
        source = text("--depth", "16", *flags.split())
        drawn = subprocess.run(["dot", "-Tsvg"], input=source, capture_output=True, encoding="utf-8")
        assert drawn.returncode == 0 and drawn.stderr == ""
        assert ("CatBackward0" if "--autograd" in flags else "concatenation") in drawn.stdout


def test_without_dot_the_text_is_written_beside(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert make_graph.main(["--depth", "10", "--out", str(tmp_path / "model.svg")]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.dot"]
    assert "dense block 1" in (tmp_path / "model.dot").read_text()
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'model.dot'}\n"
    assert err.count("\n") == 1 and "apt install graphviz" in err and f"-o {tmp_path / 'model.svg'}" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--out model.jpeg", "--out model.jpeg: needs one of the suffixes .svg, .png, .pdf, .dot"),
        ("--out model", "--out model: needs one of the suffixes"),
        ("--depth 43", "depth 43: a network with bottlenecks needs depth = 6n + 4, such as 40 or 46"),
        ("--growth-rate 0", "argument --growth-rate: 0 is not in 1 … 100,000"),
        ("--depth deep", "argument --depth: invalid int value: 'deep'"),
        ("--arch resnet", "argument --arch: invalid choice"),
        ("--arch densenet121 --depth 40", "--arch densenet121 sets the depth: leave out one of the two"),
        ("--depth 10 --part blocks.3", "part 'blocks.3': choose one of stem, blocks.0, transitions.0, blocks.1"),
        ("--depth 10 --image-size 2", "images of 2×2 pixels are too small"),
        ("--depth 10 --image-size 0", "argument --image-size: 0 is not in 1 … 100,000"),
        ("--depth 10 --image-size -1", "argument --image-size: -1 is not in 1 … 100,000"),
        ("--max-layers 2", "--max-layers 2: needs at least 3"),
        ("--autograd --part stem", "--autograd draws every function: leave out --part"),
        ("--depth 10 --out file/model.dot", "file: File exists"),
        ("--depth 10 --out folder.svg", "--out folder.svg: is a directory"),
    ],
)
def test_a_mistake_ends_with_one_line_and_status_2(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder.svg").mkdir()
    try:
        status = make_graph.main(flags.split())
    except SystemExit as error:  # how argparse ends
        status = error.code
    out, err = capsys.readouterr()
    assert status == 2 and out == ""
    assert err.startswith("make_graph.py: error: ") and err.count("\n") == 1
    assert words in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.svg"]


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "graphviz", None)  # makes the import fail
    assert make_graph.main(["--depth", "10", "--out", str(tmp_path / "model.svg")]) == 2
    assert capsys.readouterr().err == "make_graph.py: error: the Python package graphviz is missing: pip install graphviz\n"
