"""The passes over memory of the fused dense block, on the CPU: each one loop, compiled by Numba.

The functions up to ``combine`` do what those of the same names in __init__.py do with several operations of torch each.
A matrix (M, C) has a row for each pixel and a column for each channel. Sums are taken over slices of ROWS rows first,
then over the slices: they depend on the shape of the matrix alone, not on the number of threads.

Numba knows no bfloat16. It sees the bits of such a matrix as uint16: the upper halves of float32 numbers, to which
``wide`` adds the lower halves and from which ``store`` takes them off again. Sums and coefficients are float32.
"""

import numba
import torch
from llvmlite import ir
from numba.extending import intrinsic, overload

ROWS = 256  # of a slice: few enough for the cache of a core, enough to be worth handing out

# GNU OpenMP, which torch uses: two pools of threads would fight each other for the cores.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
# Starting them sets the number of threads of both.
threads = torch.get_num_threads()
numba.get_num_threads()
torch.set_num_threads(threads)

# Sums may be reordered into vector lanes; NaN and infinity keep their meaning.
compiled = numba.njit(parallel=True, cache=True, fastmath={"reassoc", "contract", "nsz"})


def bn_relu(x, norm):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    run(bn_relu_loop, x, norm.scale, norm.shift, out)
    return out


def statistics(x):
    mean, square = slices_of(x)
    run(statistics_loop, x, mean, square)
    # From slices to the whole: squares about the slices' means, and those of the means (Chan, Golub, LeVeque 1979).
    count = mean.new_full((len(mean), 1), ROWS)
    count[-1] = len(x) - ROWS * (len(mean) - 1)
    whole = (mean * count).sum(0) / len(x)
    return whole, (square + (mean - whole).square() * count).sum(0) / len(x)


def relu_backward(da, x, norm):
    d_weight, d_bias = slices_of(x)
    run(relu_backward_loop, da, x, norm.scale, norm.shift, norm.mean, d_weight, d_bias)
    return da, d_weight.sum(0) * norm.rstd, d_bias.sum(0)


def relu_backward_add(da, x, norm, d):
    d_weight, d_bias = slices_of(x)
    run(relu_backward_add_loop, da, x, norm.scale, norm.shift, norm.mean, d_weight, d_bias, d)
    return da, d_weight.sum(0) * norm.rstd, d_bias.sum(0)


def combine(d, x, u, v, w):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    run(combine_loop, d.contiguous(), x.contiguous(), u, v, w, out)
    return out


def slices_of(x):
    """Two uninitialised matrices with x's columns and a row for each slice, in float32 or better."""
    return x.new_empty(2, -(-len(x) // ROWS), x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32)).unbind()


def run(loop, *tensors):
    """Call a compiled loop on NumPy's views of tensors, with torch's number of threads."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    loop(*(as_array(whole_rows(tensor.detach())) for tensor in tensors))


def as_array(x):
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def whole_rows(x):
    """The contiguous matrix whose first columns x is, since Numba vectorises no other; x itself where there is none."""
    step, end = x.stride(0), x.storage_offset() + len(x) * x.stride(0)
    if x.dim() == 1 or x.stride(1) != 1 or end * x.element_size() > x.untyped_storage().nbytes():
        return x
    return x.as_strided((len(x), step), (step, 1))


@intrinsic
def float_of_bits(context, bits):
    """The float32 number with the bits of a uint32."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return numba.float32(numba.uint32), generate


@intrinsic
def bits_of_float(context, value):
    """The bits of a float32 number as a uint32."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return numba.uint32(numba.float32), generate


def wide(value):
    """A number of a matrix as the loops compute with it."""


@overload(wide)
def overload_wide(value):
    if value == numba.uint16:
        return lambda value: float_of_bits(numba.uint32(value) << numba.uint32(16))
    return lambda value: value


def store(matrix, i, j, value):
    """matrix[i, j] = value, in bfloat16 rounded to the nearest, ties to even."""


@overload(store)
def overload_store(matrix, i, j, value):
    if matrix.dtype != numba.uint16:

        def store_as_it_is(matrix, i, j, value):
            matrix[i, j] = value

        return store_as_it_is

    def store_rounded(matrix, i, j, value):
        value = numba.float32(value)
        bits = bits_of_float(value)
        odd = (bits >> numba.uint32(16)) & numba.uint32(1)
        rounded = (bits + numba.uint32(0x7FFF) + odd) >> numba.uint32(16)
        # The sum could carry a NaN's bits over to infinity, or to zero.
        matrix[i, j] = numba.uint16(rounded if value == value else numba.uint32(0x7FC0))

    return store_rounded


@numba.njit
def rows_of(part, matrix):
    return range(part * ROWS, min((part + 1) * ROWS, len(matrix)))


@compiled
def bn_relu_loop(x, scale, shift, out):
    for part in numba.prange(-(-len(x) // ROWS)):
        for i in rows_of(part, x):
            for j in range(len(scale)):
                a = wide(x[i, j]) * scale[j] + shift[j]
                store(out, i, j, 0 * a if a < 0 else a)  # a NaN stays one


@compiled
def statistics_loop(x, mean, square):
    for part in numba.prange(len(mean)):
        rows = rows_of(part, x)
        mean[part] = 0
        square[part] = 0
        for i in rows:
            for j in range(mean.shape[1]):
                mean[part, j] += wide(x[i, j])
        for j in range(mean.shape[1]):
            mean[part, j] /= len(rows)
        for i in rows:
            for j in range(mean.shape[1]):
                square[part, j] += (wide(x[i, j]) - mean[part, j]) ** 2


@compiled
def relu_backward_loop(da, x, scale, shift, mean, d_weight, d_bias):
    for part in numba.prange(len(d_bias)):
        d_weight[part] = 0
        d_bias[part] = 0
        for i in rows_of(part, x):
            for j in range(len(scale)):
                value = wide(x[i, j])
                a = value * scale[j] + shift[j]
                d_relu = 0 * a if a <= 0 else wide(da[i, j])
                d_weight[part, j] += d_relu * (value - mean[j])
                d_bias[part, j] += d_relu
                store(da, i, j, d_relu)


@compiled
def relu_backward_add_loop(da, x, scale, shift, mean, d_weight, d_bias, d):
    for part in numba.prange(len(d_bias)):
        d_weight[part] = 0
        d_bias[part] = 0
        for i in rows_of(part, x):
            for j in range(len(scale)):
                value = wide(x[i, j])
                a = value * scale[j] + shift[j]
                d_relu = 0 * a if a <= 0 else wide(da[i, j])
                d_weight[part, j] += d_relu * (value - mean[j])
                d_bias[part, j] += d_relu
                store(d, i, j, wide(d[i, j]) + scale[j] * d_relu)
                store(da, i, j, 0 * a if a < 0 else a)


@compiled
def combine_loop(d, x, u, v, w, out):
    for part in numba.prange(-(-len(x) // ROWS)):
        for i in rows_of(part, x):
            for j in range(len(u)):
                store(out, i, j, wide(d[i, j]) * u[j] + wide(x[i, j]) * v[j] + w[j])
