"""Each Triton kernel against the same step in plain torch: on a GPU, else in Triton's interpreter on the CPU."""

import functools

import pytest
import torch

pytest.importorskip("triton")  # torch comes without it on some systems
from helpers import assert_as_exact_as_naive, make, step, with_block
from triton.runtime.errors import OutOfResources, PTXASError

import fused
from fused import Buffer, Norm, kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# With a GPU these tests are among those of pytest -m gpu.
pytestmark = [pytest.mark.usefixtures("poison"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]

# (N, H, W), columns, k. M = 35, 150 and 3 are multiples of no tile, 128 is; 4·72 columns are a tile of 512
SHAPES = [((n, h, w), 24, 12) for n, h, w in ((2, 8, 8), (3, 5, 10), (1, 1, 3))]
SHAPES += [((1, 5, 7), *sizes) for sizes in ((24, 12), (36, 12), (60, 24), (204, 12), (342, 12), (88, 40), (24, 72))]


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    """The reference has no loops of its own."""
    monkeypatch.setattr(fused, "loops", None)


# In float32, tiles made for tensor cores need more shared memory than some GPUs have; there they run in bf16 alone.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def inputs(image, channels, growth_rate, bottleneck=True, dtype=DTYPE, spare=5):
    """Random arguments of the steps of one layer that reads ``channels`` columns of a wider buffer.

    ``spare`` columns of it are neither read nor written.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    n, height, width = image
    m, j = n * height * width, 4 * growth_rate if bottleneck else channels
    shape = (n, channels, height, width)
    norms = [Norm(draw(c), draw(c).abs() + 0.5, draw(c), draw(c), 1e-5, True) for c in (channels, j)]
    buf = draw(m, channels + growth_rate + spare).to(dtype)
    # The gradient of the buffer, whose columns beside those of x must stay as they are.
    buffer = Buffer(buf, draw(m, buf.shape[1]).to(dtype), *(draw(buf.shape[1]) for _ in range(3)))
    return {
        "shape": shape,
        "x": buf[:, :channels],
        "out": buf[:, channels : channels + growth_rate],
        "h": draw(m, j).to(dtype),
        "d_relu": draw(m, j).to(dtype),
        "buffer": buffer,
        "norm1": norms[0],
        "norm2": norms[1],
        "d_weight2": draw(j) * m**0.5,
        "d_bias2": draw(j) * m**0.5,
        "conv1": draw(j, channels, 1, 1) / channels**0.5,
        "conv2": draw(growth_rate, j, 3, 3) / (9 * j) ** 0.5,
    }


def run(step, v):
    """The results of one step, from kernels or fused, with copies of what it changes."""
    name, columns = step.__name__, v["x"].shape[1]
    nan = functools.partial(torch.full, fill_value=float("nan"), device=DEVICE)
    wide = torch.promote_types(v["x"].dtype, torch.float32)
    if name == "bn_relu_conv1x1":
        h, statistics = nan(v["h"].shape, dtype=v["h"].dtype), nan((2, v["h"].shape[1]), dtype=wide)
        step(v["x"], v["norm1"], v["conv1"], v["shape"], h, statistics)
        return h, *statistics
    if name == "bn_relu_conv3x3":
        matrix = torch.full((len(v["x"]), 500), 7.0, dtype=v["x"].dtype, device=DEVICE)
        place, statistics = matrix[:, 3 : 3 + v["out"].shape[1]], nan((2, v["out"].shape[1]), dtype=wide)
        step(v["h"], v["norm2"], v["conv2"], v["shape"], place.fill_(float("nan")), statistics)
        return matrix, *statistics
    buffer = Buffer(*(value.clone() for value in v["buffer"][:5]))
    if name == "complete":
        return [step(buffer.select(slice(columns)), v["shape"])]
    if name == "conv3x3_backward":
        new = buffer.select(slice(columns, columns + len(v["conv2"])))
        return *step(new, v["h"], v["norm2"], v["conv2"], v["shape"]), buffer.d
    h = v["d_relu"], v["h"], v["norm2"], v["d_weight2"], v["d_bias2"]
    results = step(*h, buffer.select(slice(columns)), v["norm1"], v["conv1"], v["shape"])
    return *results, buffer.d, buffer.p, buffer.q


def doubled(value):
    """Arguments in float64, for a reference."""
    if isinstance(value, torch.Tensor):
        return value.double()
    return type(value)(*map(doubled, value)) if isinstance(value, (Norm, Buffer)) else value


def assert_as_exact_as_torch(name, v):
    """Every result's error against float64 is at most twice that of plain torch in the same precision.

    That is the largest error or, on a GPU in bf16, where a single one is a matter of luck, its norm.
    """
    size = torch.Tensor.norm if DEVICE == "cuda" else lambda error: error.abs().max()
    exact = run(getattr(fused, name), {key: doubled(value) for key, value in v.items()})
    results = zip(run(getattr(kernels, name), v), run(getattr(fused, name), v), exact, strict=True)
    for i, (ours, torch_s, reference) in enumerate(results):
        error, torch_error = (size(result.double() - reference) / size(reference) for result in (ours, torch_s))
        allowed = 2 * torch_error + 1e-6
        assert error <= allowed, f"{name}, result {i}: {error:.2e} > {allowed:.2e}"  # NaN fails, too


STEPS = ["bn_relu_conv1x1", "bn_relu_conv3x3", "conv3x3_backward", "conv1x1_backward", "complete"]


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_awkward_shapes(name, shape):
    assert_as_exact_as_torch(name, inputs(*shape))


@pytest.mark.parametrize("name", ["bn_relu_conv1x1", "conv1x1_backward"])
@pytest.mark.parametrize(("channels", "spare", "columns"), [(24, 4, 8), (36, 4, 4), (342, 2, 2)])
def test_columns_read_together(name, channels, spare, columns):
    v = inputs((1, 5, 7), channels, 12, spare=spare)
    assert kernels.vector(channels, v["x"].stride(0)) == columns
    assert_as_exact_as_torch(name, v)


@pytest.mark.parametrize("name", ["bn_relu_conv3x3", "conv3x3_backward"])
def test_without_bottleneck(name):
    v = inputs((2, 5, 7), 60, 12, bottleneck=False)
    v["h"] = torch.cat((v["x"], v["x"]), 1)[:, :60]  # with the stride of a wider matrix
    assert_as_exact_as_torch(name, v)


def set_tiles(monkeypatch, capability, multiprocessors, images, added=64):
    monkeypatch.setattr(kernels, "hardware", lambda device: (capability, multiprocessors))
    monkeypatch.setattr(kernels, "IMAGES", images)
    for tile in (kernels.STATISTICS, kernels.GRADIENTS):
        monkeypatch.setitem(tile, "BP", added)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("channels", "growth_rate"), [(36, 12), (204, 12), (60, 24), (88, 40)])
def test_half_precision(name, channels, growth_rate, monkeypatch):
    """bf16 on a GPU. The interpreter cannot multiply bf16 matrices: there float16, whose rounding is finer."""
    set_tiles(monkeypatch, kernels.HOPPER, 1, 0)  # two programs for three tiles
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    assert_as_exact_as_torch(name, inputs((2, 6, 6), channels, growth_rate, dtype=dtype))


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(
    "tiles",
    [
        (kernels.HOPPER, 1, 0),  # many small ones for each of two programs
        (kernels.HOPPER, 1, 64),  # of up to 256 rows, as for 64 images of 32×32 pixels
        ((8, 0), 1, 64),
        (kernels.HOPPER, 132, 64, 2),  # more partial sums than are added at once
    ],
)
def test_tiles_and_programs(name, tiles, monkeypatch):
    set_tiles(monkeypatch, *tiles)
    assert_as_exact_as_torch(name, inputs((5, 9, 9), 24, 12))


@pytest.mark.parametrize("name", ["bn_relu_conv3x3", "conv3x3_backward"])
def test_weights_are_read_and_their_gradient_written_as_they_lie(name):
    v = inputs((2, 5, 7), 24, 12)
    v["conv2"] = v["conv2"].to(memory_format=torch.channels_last)
    assert_as_exact_as_torch(name, v)
    if name == "conv3x3_backward":
        assert run(kernels.conv3x3_backward, v)[3].stride() == v["conv2"].stride()


@pytest.mark.parametrize("name", ["conv3x3_backward", "conv1x1_backward"])
@pytest.mark.parametrize("frozen", ["norm1", "norm2"])
def test_statistics_of_earlier_batches_have_no_gradient(name, frozen):
    v = inputs((2, 5, 7), 24, 12)
    v[frozen] = v[frozen]._replace(batch=False)
    assert_as_exact_as_torch(name, v)
    if (name, frozen) == ("conv1x1_backward", "norm1"):
        assert all(torch.equal(a, b) for a, b in zip(run(kernels.conv1x1_backward, v)[-2:], v["buffer"][3:5], strict=True))


def test_nan_is_not_rectified_away():
    v = inputs((1, 5, 7), 24, 12)
    v["x"][3, 5] = float("nan")  # a view of the buffer
    h, _, _ = run(kernels.bn_relu_conv1x1, v)
    assert h[3].isnan().all() and not h[4].isnan().any()


@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize(("training", "count"), [(True, 2), (False, 1)])  # a single image has other strides
def test_whole_block(monkeypatch, bottleneck, training, count):
    """Forward and backward of a network in which every step is a kernel."""
    model = make(torch.float32, depth=16, growth_rate=12, bottleneck=bottleneck).train(training).to(DEVICE)
    x = torch.randn(count, 3, 8, 8, device=DEVICE)
    exact = step(with_block(model, "naive").double(), x.double())
    amp = DEVICE == "cuda"  # in bf16, as above
    naive = step(with_block(model, "naive"), x, amp)
    monkeypatch.setattr(fused, "steps_for", lambda x: kernels)
    assert_as_exact_as_naive(step(with_block(model, "fused"), x, amp), naive, exact)


@pytest.mark.parametrize(
    ("capability", "hip", "error", "words"),
    [
        ((9, 0), None, None, ""),
        ((8, 0), "6.4", None, "nobody has tried them on ROCm"),  # whose MI200 says (9, 0)
        ((7, 5), None, None, "need compute capability 8.0"),
        ((9, 0), None, OutOfResources(98_304, 65_536, "shared memory"), "Python's headers (out of resource: shared memory, Req"),
        ((9, 0), None, PTXASError("no such GPU\nand more"), "(PTXAS error: no such GPU)"),
        ((9, 0), None, ImportError("No module named 'triton'"), "Triton, a C compiler"),
        ((9, 0), None, ValueError(), "(ValueError)"),
    ],
)
def test_where_kernels_cannot_run_a_line_says_so(monkeypatch, capsys, capability, hip, error, words):
    def fails(*args):
        raise error

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.version, "hip", hip)
    if error:
        monkeypatch.setattr(kernels, "finish_statistics", fails)
    found = fused.kernels_for.__wrapped__(torch.device(DEVICE))  # not what is remembered
    line = capsys.readouterr().err
    assert (found is kernels, line.count("\n")) == ((False, 1) if words else (True, 0)) and words in line
