"""The passes over memory of the fused dense block, on the CPU in float32 and float64: each one loop, compiled by Numba.

The functions up to ``combine`` do what those of the same names in __init__.py do with several operations of torch each.
A matrix (M, C) has a row for each pixel and a column for each channel. Sums are taken over slices of ROWS rows first,
then over the slices: they depend on the shape of the matrix alone, not on the number of threads.
"""

import numba
import torch

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
    count = x.new_full((len(mean), 1), ROWS)
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
    """Two uninitialised matrices with x's columns and a row for each slice."""
    return x.new_empty(2, -(-len(x) // ROWS), x.shape[1]).unbind()


def run(loop, *tensors):
    """Call a compiled loop on NumPy's views of tensors, with torch's number of threads."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    loop(*(whole_rows(tensor.detach()).numpy() for tensor in tensors))


def whole_rows(x):
    """The contiguous matrix whose first columns x is, since Numba vectorises no other; x itself where there is none."""
    step, end = x.stride(0), x.storage_offset() + len(x) * x.stride(0)
    if x.dim() == 1 or x.stride(1) != 1 or end * x.element_size() > x.untyped_storage().nbytes():
        return x
    return x.as_strided((len(x), step), (step, 1))


@numba.njit
def rows_of(part, matrix):
    return range(part * ROWS, min((part + 1) * ROWS, len(matrix)))


@compiled
def bn_relu_loop(x, scale, shift, out):
    for part in numba.prange(-(-len(x) // ROWS)):
        for i in rows_of(part, x):
            for j in range(len(scale)):
                a = x[i, j] * scale[j] + shift[j]
                out[i, j] = 0 if a < 0 else a  # a NaN stays one


@compiled
def statistics_loop(x, mean, square):
    for part in numba.prange(len(mean)):
        rows = rows_of(part, x)
        mean[part] = 0
        square[part] = 0
        for i in rows:
            for j in range(mean.shape[1]):
                mean[part, j] += x[i, j]
        for j in range(mean.shape[1]):
            mean[part, j] /= len(rows)
        for i in rows:
            for j in range(mean.shape[1]):
                square[part, j] += (x[i, j] - mean[part, j]) ** 2


@compiled
def relu_backward_loop(da, x, scale, shift, mean, d_weight, d_bias):
    for part in numba.prange(len(d_bias)):
        d_weight[part] = 0
        d_bias[part] = 0
        for i in rows_of(part, x):
            for j in range(len(scale)):
                a = x[i, j] * scale[j] + shift[j]
                d_relu = 0 * a if a <= 0 else da[i, j]
                d_weight[part, j] += d_relu * (x[i, j] - mean[j])
                d_bias[part, j] += d_relu
                da[i, j] = d_relu


@compiled
def relu_backward_add_loop(da, x, scale, shift, mean, d_weight, d_bias, d):
    for part in numba.prange(len(d_bias)):
        d_weight[part] = 0
        d_bias[part] = 0
        for i in rows_of(part, x):
            for j in range(len(scale)):
                a = x[i, j] * scale[j] + shift[j]
                d_relu = 0 * a if a <= 0 else da[i, j]
                d_weight[part, j] += d_relu * (x[i, j] - mean[j])
                d_bias[part, j] += d_relu
                d[i, j] += scale[j] * d_relu
                da[i, j] = 0 if a < 0 else a


@compiled
def combine_loop(d, x, u, v, w, out):
    for part in numba.prange(-(-len(x) // ROWS)):
        for i in rows_of(part, x):
            for j in range(len(u)):
                out[i, j] = d[i, j] * u[j] + x[i, j] * v[j] + w[j]
