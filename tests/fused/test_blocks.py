"""The blocks compute one function: outputs, gradients and statistics are those of the naive block."""

import copy

import pytest
import torch
import torch.nn as nn
from candidates import saved_bytes
from helpers import OTHERS, assert_as_exact_as_naive, make, step, with_block

import densenet
import fused
from densenet import BLOCKS, DenseNet

# After an edit that fused does not know, it is naive, and what makes it another block cannot be seen.
KNOWN = not densenet.differing_blocks(DenseNet(depth=10, growth_rate=4), "fused")
needs_fused = pytest.mark.skipif(not KNOWN, reason="densenet.py has layers that fused does not know")
FUSED = pytest.param("fused", marks=needs_fused)


def assert_same(result, expected, rtol=1e-9):
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert result[name] is None, name
        else:
            scale = max(value.double().abs().max().item(), 1e-4)  # a gradient may be 0 but for rounding
            torch.testing.assert_close(result[name], value, rtol=0, atol=rtol * scale, msg=lambda m, name=name: f"{name}: {m}")


SHAPES = [(3, 3, 8, 8), (1, 3, 9, 7), (2, 3, 33, 20)]


@pytest.mark.parametrize("block", OTHERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"bottleneck": False}, {"depth": 10}, {"growth_rate": 5, "reduction": 0.7}])
def test_a_training_step_in_float64(block, shape, options):
    model, x = make(**options), torch.randn(shape, dtype=torch.float64)
    assert_same(step(with_block(model, block), x), step(with_block(model, "naive"), x))


@pytest.mark.parametrize("block", OTHERS)
def test_strided_inputs_and_evaluation(block):
    model = make()
    for training, x in (
        (True, torch.randn(8, 8, 3, 2, dtype=torch.float64).permute(3, 2, 1, 0)),
        (True, torch.randn(2, 3, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)),
        (False, torch.randn(2, 3, 16, 16, dtype=torch.float64)[:, :, ::2, ::2]),
    ):
        assert_same(step(with_block(model.train(training), block), x), step(with_block(model, "naive"), x))
    with torch.no_grad():
        torch.testing.assert_close(with_block(model, block)(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("amp", [False, True])
def test_an_empty_batch_in_evaluation(block, amp):
    model = make(torch.float32, block=block).eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = model(torch.empty(0, 3, 8, 8))
    assert out.shape == (0, 10)
    out.float().sum().backward()


HOOKS = [f"register_{kind}_hook" for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre")]


def seen(model, x, register, name=None):
    """What a hook on a module, or without a name on all, is given in a training step: the first tensor of each call."""
    found = []

    def hook(module, *given):
        found.append(next(part for part in (given[-1] if isinstance(given[-1], tuple) else (given[-1],)) if part is not None))

    handle = getattr(model.get_submodule(name) if name else torch.nn.modules.module, register)(hook)
    step(model, x)
    handle.remove()
    return found


@pytest.mark.parametrize("block", ["checkpoint", FUSED])
@pytest.mark.parametrize("register", HOOKS)
def test_hooks_see_what_naive_shows(block, register, capsys):
    model, x = make(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    ours, naive = with_block(model, block), with_block(model, "naive")
    densenet.print_once.cache_clear()
    layer = "blocks.1.layers.1"
    names = [layer, *(f"{layer}.{part}" for part in ("norm1", "relu1", "conv1", "norm2", "relu2", "conv2")), "transitions.0.norm", "relu"]
    for name in names:
        found, expected = seen(ours, x, register, name), seen(naive, x, register, name)
        assert len(found) == len(expected) == 1, name
        torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-9)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"dense block: it has hooks: runs as block 'naive', not {block!r}" and len(lines) == (2 if block == "fused" else 1)
    kinds = [type(network.blocks[0](network.stem(x)).grad_fn) for network in (ours, naive)]
    assert block != "fused" or kinds[0] is not kinds[1]  # without hooks, the block is itself again


@pytest.mark.parametrize("block", OTHERS)
def test_hooks_on_all_modules_see_what_naive_shows(block):
    model, x = make(depth=10), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    found = [seen(with_block(model, name), x, "register_module_forward_hook") for name in (block, "naive")]
    assert len(found[0]) == len(found[1]) > 30


@pytest.mark.parametrize("block", BLOCKS)
def test_features_by_name(block):
    from torchvision.models.feature_extraction import create_feature_extractor

    model, x = make(block=block).eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    kept = {}
    for name in ("blocks.1", "norm", "relu"):
        model.get_submodule(name).register_forward_hook(lambda module, inputs, output, name=name: kept.update({name: output}))
    features = create_feature_extractor(model, ["blocks.1", "norm", "relu", "blocks.0.layers.1.relu2"])(x)
    model(x)
    for name, value in kept.items():
        torch.testing.assert_close(features[name], value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(features["relu"], model.forward_features(x), rtol=1e-9, atol=1e-9)
    assert features["blocks.0.layers.1.relu2"].shape == (2, 24, 8, 8)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_traces_and_exports(block):
    model, x = make(block=block, depth=10).eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    traced = torch.jit.trace(model, x)
    for size in (1, 5):
        x = torch.randn(size, 3, 8, 8, dtype=torch.float64)
        for other in (exported.module(), traced):
            torch.testing.assert_close(other(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", OTHERS)
def test_gradients_have_the_strides_of_weights_that_are_laid_out_differently(block):
    model, x = make(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for weight in model.parameters():
        if weight.dim() == 4:
            weight.data = weight.data.transpose(0, 1).contiguous().transpose(0, 1)
    ours = with_block(model, block)
    assert_same(step(ours, x), step(with_block(model, "naive"), x))
    strided = [p for p in ours.blocks.parameters() if p.dim() == 4]
    assert all(p.grad.stride() == p.stride() for p in strided if p.shape[2] == 1)


@pytest.mark.parametrize("block", OTHERS)
def test_frozen_parameters_and_frozen_batch_norms(block):
    model, x = make(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != 0)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for i, norm in enumerate(norms):
        norm.train(i % 4 != 1)
        norm.momentum = None if i % 5 == 2 else 0.3  # None: the average over all batches
    ours, naive = with_block(model, block), with_block(model, "naive")
    for _ in range(2):
        assert_same(step(ours, x), step(naive, x))


@pytest.mark.parametrize("block", OTHERS)
def test_a_graph_can_be_gone_through_twice(block):
    model, x = make(block=block), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    loss = model(x).square().sum()
    statistics = copy.deepcopy(dict(model.named_buffers()))
    once = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    for first, second in zip(once, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    for name, value in model.named_buffers():
        assert torch.equal(value, statistics[name]), name


@pytest.mark.parametrize("block", ["checkpoint", FUSED])
@pytest.mark.parametrize("amp", [False, True])
def test_rounding_errors(block, amp):
    """In float32 and under bf16 autocast."""
    model, x = make(torch.float32, depth=22), torch.randn(8, 3, 16, 16)
    exact = step(copy.deepcopy(model).double(), x.double())
    assert_as_exact_as_naive(step(with_block(model, block), x, amp), step(with_block(model, "naive"), x, amp), exact)


@pytest.mark.skipif(fused.loops is None, reason="without Numba, fused.norm_relu is what torch does")
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_norm_relu_gradcheck_in_float64(training, pool):
    norm = nn.BatchNorm2d(3).double().train(training)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)

    def norm_relu(x, weight, bias):
        return fused.NormReLU.apply(x, norm, True, pool, weight, bias)

    assert torch.autograd.gradcheck(norm_relu, (x, norm.weight, norm.bias), fast_mode=False)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(fused.norm_relu(norm, nn.ReLU(), x, pool).sum(), x, create_graph=True)


def test_fused_gradcheck_in_float64():
    for bottleneck in (True, False):
        layers = make(depth=16, growth_rate=3, bottleneck=bottleneck).blocks[0].layers
        parameters = [p for layer in layers for p in fused.layer_parameters(layer)]
        x = torch.randn(2, layers[0].norm1.num_features, 2, 3, dtype=torch.float64, requires_grad=True)

        def block(x, *parameters, layers=layers):
            return fused.SharedBuffer.apply(x, layers, True, *parameters)

        assert torch.autograd.gradcheck(block, (x, *parameters), fast_mode=False)


@needs_fused
def test_fused_says_what_it_cannot_do():
    x = torch.randn(2, 3, 8, 8)
    model = DenseNet(depth=10, growth_rate=4, block="fused")
    with pytest.raises(RuntimeError, match="cannot be differentiated twice: use block 'naive'"):
        torch.autograd.grad(model(x.requires_grad_()).sum(), x, create_graph=True)
    with pytest.raises(ValueError, match="more than one value per channel"):
        DenseNet(depth=10, growth_rate=4, block="fused").blocks[0](torch.randn(1, 8, 1, 1))


def test_fused_leaves_nothing_behind():
    """No reference cycle: the buffer dies with its output."""
    import gc
    import weakref

    model = DenseNet(depth=10, growth_rate=4, block="fused")
    model.blocks[0](torch.randn(2, 8, 8, 8)).sum().backward()  # the first call of a loop leaves cycles of its compiler
    gc.collect()
    gc.disable()
    try:
        out = model.blocks[0](torch.randn(2, 8, 8, 8))
        buffer = weakref.ref(out)
        del out  # without a backward pass, which would free what the graph keeps
        assert buffer() is None
        model.blocks[0](torch.randn(2, 8, 8, 8)).sum().backward()
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_checkpoint_has_the_same_dropout_masks_bit_for_bit():
    model, x = make(torch.float32, drop_rate=0.3), torch.randn(4, 3, 8, 8)
    results = {name: step(with_block(model, name), x) for name in ("naive", "checkpoint")}
    assert_same(results["checkpoint"], results["naive"], rtol=0)


@pytest.mark.parametrize("amp", [False, True])
def test_checkpoint_changes_no_bit_of_statistics_and_gradients(amp):
    model, x = make(torch.float32), torch.randn(4, 3, 8, 8)
    assert_same(step(with_block(model, "checkpoint"), x, amp), step(with_block(model, "naive"), x, amp), rtol=0)


def kept_bytes(batch_size, **options):
    torch.manual_seed(0)
    model, x = DenseNet(**options), torch.randn(batch_size, 3, 32, 32)
    return saved_bytes(lambda: model(x), model)


@pytest.mark.slow
def test_memory_of_a_training_step():
    """DenseNet-BC-100-12 at batch 64: what autograd keeps between forward and backward pass, relative to naive."""
    kept = {name: kept_bytes(64, block=name) for name in BLOCKS}
    assert kept["checkpoint"] <= 0.45 * kept["naive"]
    assert kept["fused"] <= 0.22 * kept["naive"]


@pytest.mark.parametrize(("block", "linear"), [("naive", False), ("checkpoint", True), pytest.param("fused", True, marks=needs_fused)])
def test_memory_grows_linearly_with_depth(block, linear):
    depths = torch.tensor([40.0, 70, 100, 130], dtype=torch.float64)
    kept = torch.tensor([kept_bytes(1, depth=int(depth), block=block) for depth in depths], dtype=torch.float64)
    second = (kept[2:] - 2 * kept[1:-1] + kept[:-2]) / kept[1:-1]  # second differences: 0 for a straight line
    assert (second.abs().max() < 0.02) == linear


def ddp_rank(rank, rendezvous):
    """One of two gloo ranks: a step of every block on this rank's images equals that of naive."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    model, x = make(), torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    alone = step(with_block(model, "naive"), x)
    results = {}
    for name in BLOCKS:
        ddp = nn.parallel.DistributedDataParallel(with_block(model, name))
        results[name] = {key.replace("module.", ""): value for key, value in step(ddp, x).items()}
    for name in OTHERS:
        assert_same(results[name], results["naive"])
    key = "gradient of stem.conv.weight"
    assert not torch.allclose(results["naive"][key], alone[key])  # the ranks did average
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    torch.multiprocessing.spawn(ddp_rank, (tmp_path / "rendezvous",), nprocs=2)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_torch_compile_changes_nothing(block):
    model, x = make(torch.float32, depth=10), torch.randn(4, 3, 8, 8)
    compiled = with_block(model, block)
    compiled.compile()
    assert_same(step(compiled, x), step(with_block(model, "naive"), x), rtol=1e-4)
