"""The boxes and arrows of a network: those of the network that runs."""

import re

import pytest
import torch

import make_graph
from densenet import BottleneckLayer, DenseNet, SingleLayer, Transition
from reports.drawing import model_graph, size


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


@pytest.mark.parametrize(
    ("flags", "options"), [("", {"growth_rate": 12}), ("--growth-rate 5 --no-bottleneck --reduction 1", {"growth_rate": 5, "bottleneck": False, "reduction": 1.0})]
)
def test_layers_and_transitions_have_the_sizes_of_the_model(text, flags, options):
    """Those that hooks see in a pass with real tensors."""
    model, shapes = DenseNet(depth=16, **options), {}
    for name, module in model.named_modules():
        if isinstance(module, (BottleneckLayer, SingleLayer, Transition)):
            module.register_forward_hook(lambda _, x, y, name=name: shapes.update({name: (x[0].shape[1:], y.shape[1:])}))
    model.eval()(torch.zeros(1, 3, 32, 32))
    drawn = {name: lines(label) for name, label in boxes(text("--depth", "16", *flags.split())).items()}
    for name, (x, y) in shapes.items():
        if name.startswith("transitions"):
            assert drawn[name][-1] == f"{size(x)} → {size(y)}"
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
    imagenet = boxes(text("--arch", "densenet121"))
    assert "max pool 3×3 stride 2" in imagenet["stem"] and lines(imagenet["classifier"])[-1] == "1024×7×7 → 1000"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--depth 10", ["dense block 1: 1 layer", "BN-ReLU-Conv 1×1 → 48", "BN-ReLU-Conv 3×3 → 12"]),
        ("--depth 16 --no-bottleneck --reduction 1", ["dense block 1: 4 layers", "BN-ReLU-Conv 3×3 → 12"]),
        ("--depth 10 --drop-rate 0.2", [*["dense block 1: 1 layer", "BN-ReLU-Conv 1×1 → 48"], "dropout 0.2-BN-ReLU-Conv 3×3 → 12", "dropout 0.2"]),
    ],
)
def test_a_frame_says_what_a_dense_block_is(text, flags, words):
    [frame] = re.findall(r"label=<(<b>dense block 1:.*)> ", text(*flags.split()))
    assert lines(re.sub(r"<br[^>]*>", "\n", frame)) == words


def test_an_operation_that_is_not_known_has_the_name_of_its_class():
    model = DenseNet(depth=10)
    model.blocks[0].layers[0].relu2 = torch.nn.GELU()
    model.to("meta")
    assert "BN-ReLU-Conv 1×1 → 48" in (source := model_graph(model, 32, None, "down").source) and "BN-GELU-Conv 3×3 → 12" in source
