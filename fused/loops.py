"""The passes over memory of the fused dense block, on the CPU: each one loop, compiled by Numba.

The functions up to ``combine`` do what those of the same names in passes.py do with several operations of torch each.
A matrix (M, C) has a row for each pixel and a column for each channel. Sums run over slices of ROWS rows first, then
over the slices: they depend on the shape of the matrix alone, not on the number of threads.

Numba has no bfloat16. It sees the bits of such a matrix as uint16, the upper halves of float32 numbers: ``wide`` adds
the lower halves, ``store`` rounds them away. Sums and coefficients are float32.
"""

import contextlib
import os

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core.caching import FunctionCache
from numba.extending import intrinsic, overload
from numpy.lib.stride_tricks import as_strided

ROWS = 256  # of a slice: few enough for the cache of a core, enough to be worth handing out


def start_threads():
    """Start Numba's threads, so that they and torch's do not compete for the cores.

    Both use GNU OpenMP. In some installations they have one pool of threads, whose size Numba then sets. In others
    there are two copies of the library, whose threads spin while they wait for work: let Numba's soon sleep.
    """
    numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
    threads, given = torch.get_num_threads(), os.environ.get("GOMP_SPINCOUNT")
    os.environ["GOMP_SPINCOUNT"] = given or "1000"  # read when the library is loaded
    numba.get_num_threads()
    if given is None:
        del os.environ["GOMP_SPINCOUNT"]
    torch.set_num_threads(threads)


start_threads()


def compiled(loop):
    """Compile a loop when it is first called, and keep the result on disk, in a file of the module's full name.

    The kept code imports the module by that name, which differs if hubconf.py has imported it. Sums may be reordered
    into vector lanes; NaN and infinity keep their meaning.
    """
    loop.__qualname__ = f"{__name__}.{loop.__name__}"
    function = numba.njit(loop, parallel=True, fastmath={"reassoc", "contract", "nsz"})
    function._cache = Cache(loop)
    return function


class Cache(FunctionCache):
    """Numba's compiled code on disk. Compiles anew if a file is damaged; keeps nothing if the disk is full."""

    def load_overload(self, *args):
        try:
            return super().load_overload(*args)
        except Exception:  # whatever a damaged pickle raises
            with contextlib.suppress(OSError):
                self.flush()

    def save_overload(self, *args):
        with contextlib.suppress(OSError):
            super().save_overload(*args)


def bn_relu(x, norm):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    run(bn_relu_loop, x, *vectors(norm), norm.eps, out)
    return out


def statistics(x):
    means, squares = slices_of(x)
    result = means.new_empty(2, x.shape[1])
    run(statistics_loop, x, means, squares, result)
    return result


def relu_backward(da, x, norm, d=None, latest=None):
    sums = slices_of(x)
    d_weight, d_bias = sums.new_empty(2, x.shape[1])
    latest = x.new_empty(2, 0, 0) if latest is None else latest
    run(relu_backward_loop, da, x, *vectors(norm), norm.eps, *sums, d_weight, d_bias, d, *latest)
    return da, d_weight, d_bias


def combine(d, x, u, v, w):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    run(combine_loop, d, x, u, v, w, out)
    return out


def vectors(norm):
    """Mean, variance, weight and bias of a Norm, in one dtype."""
    return [vector.to(norm.mean.dtype) for vector in norm[:4]]


def slices_of(x):
    """Two uninitialised matrices with x's columns and a row for each slice, in float32 or better."""
    return x.new_empty(2, -(-len(x) // ROWS), x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))


def run(loop, *arguments):
    """Call a compiled loop on NumPy's views of tensors, and numbers, with torch's number of threads."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    loop(*(as_array(value) if isinstance(value, torch.Tensor) else value for value in arguments))


def as_array(x):
    """NumPy's view of a tensor. For some columns of a matrix: all columns from the first of them on.

    Numba vectorises loops over contiguous matrices only. The last row ends beyond the matrix; no loop goes there.
    """
    array = (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
    if x.dim() == 1 or x.is_contiguous() or x.stride(1) != 1:
        return array
    step, size = array.strides
    return as_strided(array, (len(x), step // size), array.strides)


@intrinsic
def reinterpret(context, value):
    """The uint32 with the bits of a float32 number, or the other way round."""
    number, bits = (numba.float32, ir.FloatType()), (numba.uint32, ir.IntType(32))
    (given, _), (result, kind) = (number, bits) if value == numba.float32 else (bits, number)
    return result(given), lambda context, builder, signature, args: builder.bitcast(args[0], kind)


def wide(value):
    """A number of a matrix as the loops compute with it."""


@overload(wide)
def overload_wide(value):
    if value == numba.uint16:
        return lambda value: reinterpret(numba.uint32(value) << numba.uint32(16))
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
        bits = reinterpret(value)
        odd = (bits >> numba.uint32(16)) & numba.uint32(1)
        rounded = (bits + numba.uint32(0x7FFF) + odd) >> numba.uint32(16)
        # The sum could carry a NaN's bits over to infinity, or to zero.
        matrix[i, j] = numba.uint16(rounded if value == value else numba.uint32(0x7FC0))

    return store_rounded


@numba.njit
def rows_of(part, matrix):
    return range(part * ROWS, min((part + 1) * ROWS, len(matrix)))


@numba.njit
def scale_and_shift(mean, var, weight, bias, eps):
    """Two vectors in batch norm's dtype, and its zero: a plain 0 would make a loop float64, and slow."""
    scale = weight / np.sqrt(var + var.dtype.type(eps))
    return scale, bias - mean * scale, var.dtype.type(0)


@compiled
def bn_relu_loop(x, mean, var, weight, bias, eps, out):
    scale, shift, zero = scale_and_shift(mean, var, weight, bias, eps)
    for part in numba.prange(-(-len(x) // ROWS)):
        for i in rows_of(part, x):
            for j in range(len(scale)):
                a = wide(x[i, j]) * scale[j] + shift[j]
                store(out, i, j, zero if a < 0 else a)  # a NaN stays one


@compiled
def statistics_loop(x, means, squares, result):
    for part in numba.prange(len(means)):
        rows = rows_of(part, x)
        means[part] = 0
        squares[part] = 0
        for i in rows:
            for j in range(means.shape[1]):
                means[part, j] += wide(x[i, j])
        for j in range(means.shape[1]):
            means[part, j] /= len(rows)
        for i in rows:
            for j in range(means.shape[1]):
                squares[part, j] += (wide(x[i, j]) - means[part, j]) ** 2
    combine_slices(x, means, squares, result)


@numba.njit
def combine_slices(x, means, squares, result):
    """Mean and variance of the whole: squares about the slices' means, and those of the means (Chan et al. 1979)."""
    result[:] = 0
    for part in range(len(means)):
        for j in range(means.shape[1]):
            result[0, j] += means[part, j] * len(rows_of(part, x)) / len(x)
    for part in range(len(means)):
        for j in range(means.shape[1]):
            deviation = means[part, j] - result[0, j]
            result[1, j] += (squares[part, j] + deviation * deviation * len(rows_of(part, x))) / len(x)


@numba.njit
def add_slices(d_weights, d_biases, var, eps, d_weight, d_bias):
    d_weight[:] = 0
    d_bias[:] = 0
    for part in range(len(d_weights)):
        for j in range(len(d_weight)):
            d_weight[j] += d_weights[part, j]
            d_bias[j] += d_biases[part, j]
    d_weight /= np.sqrt(var + var.dtype.type(eps))


@compiled
def relu_backward_loop(
    da, x, mean, var, weight, bias, eps, d_weights, d_biases, d_weight, d_bias, d, latest_d, latest_x
):  # two programs: if d is None, the lines for d are not compiled
    scale, shift, zero = scale_and_shift(mean, var, weight, bias, eps)
    first = len(scale) - latest_d.shape[1]
    for part in numba.prange(len(d_biases)):
        d_weights[part] = 0
        d_biases[part] = 0
        for i in rows_of(part, x):
            for j in range(len(scale)):
                value = wide(x[i, j])
                a = value * scale[j] + shift[j]
                d_relu = zero if a <= 0 else wide(da[i, j])
                d_weights[part, j] += d_relu * (value - mean[j])
                d_biases[part, j] += d_relu
                if d is None:
                    store(da, i, j, d_relu)
                else:
                    store(d, i, j, wide(d[i, j]) + scale[j] * d_relu)
                    store(da, i, j, zero if a < 0 else a)
            if d is not None:
                for j in range(latest_d.shape[1]):
                    latest_d[i, j] = d[i, first + j]
                    latest_x[i, j] = x[i, first + j]
    add_slices(d_weights, d_biases, var, eps, d_weight, d_bias)


@compiled
def combine_loop(d, x, u, v, w, out):
    for part in numba.prange(-(-len(x) // ROWS)):
        for i in rows_of(part, x):
            for j in range(len(u)):
                store(out, i, j, wide(d[i, j]) * u[j] + wide(x[i, j]) * v[j] + w[j])
