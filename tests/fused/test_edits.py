"""A changed network trains as changed: with every block it computes what naive does, and says where it is naive."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import assert_same_run
from test_blocks import OTHERS, assert_same, make, step, with_block
from torch.nn.utils import prune

import densenet
from densenet import BLOCKS, BottleneckLayer, Layer, differing_blocks
from training import choice


class Leaky(nn.ReLU):
    def forward(self, x):
        return F.leaky_relu(x, 0.3)


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class LowRank(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv, self.down = conv, nn.Conv2d(conv.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False)

    def forward(self, x):
        return self.conv(x) + self.up(self.down(x))


class Other(BottleneckLayer):
    def forward(self, x):
        return super().forward(x) + 1


def put(name, make):
    """A change that puts another module, made of the old one, in a layer's place of that name."""
    return lambda layer: setattr(layer, name, make(getattr(layer, name)))


def conv(old, size=3, **options):
    return nn.Conv2d(old.in_channels, old.out_channels, size, **{"padding": size // 2, "bias": False} | options)


def weighted(method):
    """A change of the weight of conv1 by one of torch's methods, in place."""
    return lambda layer: method(layer.conv1) and None


def patched(name, function):
    return lambda layer: setattr(layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], function)


# What is changed in a layer, and how the line names it for checkpoint, where that is naive, and for fused.
CHANGES = {
    "SiLU": (put("relu1", lambda old: nn.SiLU()), None, "relu1 is a SiLU"),
    "a subclass of ReLU": (put("relu1", lambda old: Leaky()), None, "relu1 is a Leaky"),
    "a subclass of BatchNorm2d": (put("norm1", lambda old: Doubled(old.num_features)), None, "norm1 is a Doubled"),
    "InstanceNorm": (put("norm2", lambda old: nn.InstanceNorm2d(old.num_features)), None, "norm2 is a InstanceNorm2d"),
    "no affine": (put("norm1", lambda old: nn.BatchNorm2d(old.num_features, affine=False)), None, "norm1 has other parameters"),
    "dilation": (put("conv2", lambda old: conv(old, dilation=2, padding=2)), None, "conv2 has dilation (2, 2), padding (2, 2)"),
    "circular padding": (put("conv2", lambda old: conv(old, padding_mode="circular")), None, "conv2 has padding_mode circular"),
    "another kernel": (put("conv2", lambda old: conv(old, 5)), None, "conv2 has padding (2, 2)"),
    "groups": (put("conv2", lambda old: conv(old, groups=2)), None, "conv2 has groups 2"),
    "a bias": (put("conv1", lambda old: conv(old, 1, bias=True)), None, "conv1 has a bias"),
    "LoRA": (put("conv1", LowRank), None, "conv1 is a LowRank"),
    "a patched module": (patched("conv2.forward", lambda x: x[:, :6].sin()), None, "conv2 has a forward of its own"),
    "a patched layer": (patched("after_conv1", lambda x: x[:, :6].sin()), None, "a BottleneckLayer with methods of its own"),
    "a patched forward": (patched("forward", lambda x: x[:, :6].sin()),) + ("a BottleneckLayer with",) * 2,
    "spectral_norm": (weighted(nn.utils.parametrizations.spectral_norm), "a parametrised weight", "conv1 is a ParametrizedConv2d"),
    "old spectral_norm": (weighted(nn.utils.spectral_norm), "it has hooks", "it has hooks"),
    "one child more": (lambda layer: layer.register_module("se", nn.Conv2d(1, 1, 1)), None, "a layer with other parts (se)"),
    "dropout": (patched("drop_rate", 0.2), None, "dropout"),
}  # fmt: skip


def changed(change, layers):
    model = make()
    for i, layer in enumerate(model.blocks[1].layers):
        if i in layers:
            change(layer)
    return model.double()


def steps(model, block, x):
    """Two training steps of a model that runs as that kind of block."""
    densenet.print_once.cache_clear()
    # In which all blocks compute, so that masks of dropout are drawn alike.
    model, x = with_block(model, block).to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    step(model, x)
    return step(model, x)


@pytest.mark.parametrize("layers", [(0, 1), (1,)])
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_module_is_computed_as_it_is(name, layers, capsys):
    change, *reasons = CHANGES[name]
    torch.manual_seed(0)
    model, x = changed(change, layers), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = steps(model, "naive", x)
    assert capsys.readouterr().err == ""
    for block, reason in zip(OTHERS, reasons, strict=True):
        assert_same(steps(model, block, x), expected)
        err = capsys.readouterr().err
        assert err.count("\n") == (reason is not None)
        assert reason is None or (err.startswith(f"dense block: {reason}") and err.endswith(f": runs as block 'naive', not '{block}'\n"))


def test_other_classes_and_other_widths(capsys):
    model, x = make(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for i, layer in enumerate(model.blocks[1].layers):
        layer.__class__ = (BottleneckLayer, Other)[i]
    first, second = model.blocks[2].layers
    first.conv2 = conv(first.conv2).double()
    second.conv2 = nn.Conv2d(24, 9, 3, padding=1, bias=False).double()
    model.norm, model.classifier = nn.BatchNorm2d(model.norm.num_features + 3).double(), nn.LazyLinear(10).double()
    with_block(model, "naive")(x[:1])
    model(x)
    for block in OTHERS:
        assert_same(steps(model, block, x), steps(model, "naive", x))
    err = capsys.readouterr().err
    assert "a Other that fused was not made for" in err and "a Other with a forward of its own" in err and "layers that add 6 and 9 channels" in err


def test_what_is_honoured_stays_fused(capsys):
    """Among it are eps, momentum and batch norms without running statistics."""
    model, x = make(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for i, norm in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eps, norm.momentum = 1e-3 * (i + 1), (None, 0.0, 0.7)[i % 3]
        if i % 4 == 0:
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
            norm.track_running_stats = False
    assert_same(steps(model, "fused", x), steps(model, "naive", x))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("name", "module", "reason"), [
    ("relu", nn.GELU(), "relu is a GELU"), ("relu", Leaky(), "relu is a Leaky"), ("norm", nn.Identity(), "norm is a Identity"),
])  # fmt: skip
def test_between_the_blocks(name, module, reason, capsys):
    model, x = make(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for part in (model, model.transitions[0]):
        setattr(part, name, module)
    assert_same(steps(model, "fused", x), steps(model, "naive", x))
    assert capsys.readouterr().err == f"between dense blocks: {reason}: runs as block 'naive', not 'fused'\n"


def test_float64_stays_float64_under_autocast():
    model, x = make(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for block in OTHERS:
        assert_same(step(with_block(model, block), x, amp=True), step(with_block(model, "naive"), x, amp=True))


# What an edit of densenet.py makes of a method, and which blocks a comparison finds to be others then.


def residual(self, x):
    out = self.conv2(self.relu2(self.norm2(x)))
    return out + x[:, : out.shape[1]]


def random_part(self, x):
    return self.conv1(F.dropout(self.relu1(self.norm1(x)), 0.1, self.training))


EDITS = {
    "after_conv1": (BottleneckLayer, "after_conv1", residual, {"fused"}),
    "another order": (Layer, "up_to_conv1", lambda self, x: self.conv1(self.norm1(self.relu1(x))), {"fused"}),
    "forward": (Layer, "forward", lambda self, x: self.after_conv1(self.up_to_conv1(x)).tanh(), {"fused", "checkpoint"}),
    "a random part": (Layer, "up_to_conv1", random_part, {"fused", "checkpoint"}),
    "statistics": (Layer, "up_to_conv1", lambda self, x: self.conv1(self.norm1(x).relu() * self.norm2.running_mean.mean()), {"fused", "checkpoint"}),
    "evaluation": (Layer, "up_to_conv1", lambda self, x: self.conv1(self.norm1(x).relu() * (1 + (not self.training))), {"fused"}),
}  # fmt: skip


@pytest.fixture
def edit(monkeypatch):
    def apply(name):
        kind, method, function, blocks = EDITS[name]
        monkeypatch.setattr(kind, method, function)
        made = {kind: [getattr(kind, name) for name in densenet.METHODS] for kind in densenet.MADE_HERE}
        monkeypatch.setattr(densenet, "MADE_HERE", made)  # as if the file had it
        return blocks

    return apply


@pytest.mark.parametrize("name", EDITS)
def test_a_comparison_finds_edited_methods(edit, name):
    expected, model = edit(name), make(torch.float32)
    found = {block: differing_blocks(model, block) for block in OTHERS}
    assert {block for block, names in found.items() if names} == expected
    for block in expected:
        assert found[block].keys() == {"blocks.0", "blocks.1", "blocks.2"}


def test_a_comparison_finds_transitions_that_differ(monkeypatch):
    monkeypatch.setattr(densenet.fused, "norm_relu", lambda norm, relu, x, pool: F.max_pool2d(relu(norm(x)), 2))
    assert differing_blocks(make(torch.float32), "fused").keys() == {"transitions.0", "transitions.1"}


@pytest.mark.parametrize("bottleneck", [True, False])
def test_a_comparison_leaves_everything_as_it_was(bottleneck):
    model = make(torch.float32, bottleneck=bottleneck).eval()
    model.blocks[0].requires_grad_(False)
    before, random = copy.deepcopy(model), torch.get_rng_state()
    with torch.no_grad():
        assert all(differing_blocks(model, block) == {} for block in BLOCKS)
    assert torch.equal(torch.get_rng_state(), random)
    for (name, one), two in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(one, two) and one.grad is None and one.requires_grad == two.requires_grad, name
    assert all(torch.equal(one, two) for one, two in zip(model.buffers(), before.buffers(), strict=True))
    assert not any(module.training for module in model.modules()) and str(model) == str(before)


def test_what_cannot_be_compared_is_not_trusted(monkeypatch):
    monkeypatch.setitem(BLOCKS, "mine", lambda layers, x: x.nothing)
    found = differing_blocks(make(), "mine")
    assert found["blocks.0"].startswith("mine cannot be tried on a few pixels ('Tensor' object has no attribute 'nothing'")
    model = make(torch.float32)
    prune.random_unstructured(model.blocks[1].layers[0].conv1, "weight", 0.5)  # which torch cannot copy
    assert differing_blocks(model, "fused")["blocks.1"].startswith("naive cannot be tried")


def config_of(run):
    return json.loads((Path(run) / "config.json").read_text())


def test_a_run_takes_naive_for_a_block_that_differs(tiny, edit, capsys):
    edit("forward")
    for block in BLOCKS:
        assert tiny("--save", block, "--epochs", "1", "--block", block) == 0
        out = capsys.readouterr().out
        assert ", block naive, " in out and (f"block {block} does not compute this network (blocks.0: other outputs" in out) == (block != "naive")
        assert out.count("this run takes naive") == (block != "naive")
        assert config_of(block)["block"] == "naive" and config_of(block).get("refused", {}).keys() == {block} - {"naive"}
        assert_same_run(block, "naive")
    assert tiny("--save", "fused", "--resume", "--epochs", "2", args=[]) == 0
    assert "block fused does not compute this network" in capsys.readouterr().out
    assert "fused" in config_of("fused")["resumed"][0]["refused"]
    assert tiny("--save", "auto", "--epochs", "1") == 0
    assert_same_run("auto", "naive")


def test_auto_measures_what_computes_the_same(tiny, edit, monkeypatch):
    edit("after_conv1")
    jobs = []
    monkeypatch.setattr(choice, "STEPS", 1)
    monkeypatch.setattr(choice, "measure_apart", lambda job: jobs.append(job) or {"seconds": {}, "refused": {}})
    assert tiny("--save", "run", "--epochs", "1") == 0
    assert jobs[0]["blocks"] == ["naive", "checkpoint"] and config_of("run")["refused"].keys() == {"fused"}
