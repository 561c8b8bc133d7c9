"""Triton kernels of the shared-buffer dense block, and their launchers: the steps that __init__.py has in plain torch.

Every matrix has one row per pixel (M = N·H·W). x is a view of the block's buffer: C columns of a wider row. Products
accumulate in float32, offsets along rows are int64. A kernel that sums over rows writes one partial sum per program,
and the partial sums are added in a fixed order: no atomics, so that runs repeat bit for bit.
"""

import math

import torch
import triton
import triton.language as tl


def power_of_2(n, least=16):
    """The smallest power of 2 that covers n columns; tl.dot needs 16."""
    return max(least, triton.next_power_of_2(n))


# Tile sizes: rows of a tile, input columns of a tile, output columns of a tile at most.
ROWS, COLUMNS, MOST_OUTPUTS = 64, 32, 64
# Programs of a launch that sums over rows: enough for a large GPU, few enough that their partial sums stay small.
PROGRAMS = 528


def vector(*sizes):
    """How many neighbouring columns a thread may read at once, 8 of bf16 at most: what divides all strides and ends.

    Triton itself asks only whether 16 divides them, and would read one by one. Kernels see it as n // V * V.
    """
    return math.gcd(8, *sizes)


def row_programs(rows, others):
    """How many programs share the tiles of rows, beside ``others`` programs that share something else."""
    return min(triton.cdiv(rows, ROWS), triton.cdiv(PROGRAMS, others))


# a = relu(x·s + t): the tile of x at rows × cols, normalised and rectified, zero outside.
@triton.jit
def load_bn_relu(x, stride, scale, shift, rows, cols, inside, C):
    mask = inside[:, None] & (cols < C)[None, :]
    value = tl.load(x + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)
    s = tl.load(scale + cols, mask=cols < C, other=0.0)
    t = tl.load(shift + cols, mask=cols < C, other=0.0)
    y = value.to(tl.float32) * s[None, :] + t[None, :]
    a = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)  # as torch's ReLU: a network that diverged must show it
    return tl.where(mask, a, 0.0).to(value.dtype)


# Mean and sum of squared deviations of the columns of a tile, over its rows inside the matrix.
@triton.jit
def store_tile_statistics(value, partial, tile, rows, cols, M, C):
    inside = (rows < M)[:, None]
    count = tl.minimum(M - tl.min(rows, 0), value.shape[0]).to(tl.float32)
    mean = tl.sum(tl.where(inside, value, 0.0), 0) / count
    centred = tl.where(inside, value - mean[None, :], 0.0)
    tl.store(partial + (2 * tile) * C + cols, mean, mask=cols < C)
    tl.store(partial + (2 * tile + 1) * C + cols, tl.sum(centred * centred, 0), mask=cols < C)


# h = relu(x·s + t)·Wᵀ and its tile statistics. Program (i, j): rows i, outputs j; loops over the C input columns.
@triton.jit
def bn_relu_conv1x1_kernel(
    x, x_stride, scale, shift, weight, h, partial, M, C, J,
    BM: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    x_stride, C = x_stride // V * V, C // V * V
    tile = tl.program_id(0).to(tl.int64)
    rows = tile * BM + tl.arange(0, BM)
    outs = tl.program_id(1) * BJ + tl.arange(0, BJ)
    acc = tl.zeros((BM, BJ), tl.float32)
    for first in range(0, C, BC):
        cols = first + tl.arange(0, BC)
        a = load_bn_relu(x, x_stride, scale, shift, rows, cols, rows < M, C)  # (BM, BC)
        mask = (cols < C)[:, None] & (outs < J)[None, :]
        w = tl.load(weight + outs[None, :] * C + cols[:, None], mask=mask, other=0.0)  # (BC, BJ)
        acc = tl.dot(a, w, acc, input_precision="ieee")
    value = acc.to(h.dtype.element_ty)
    tl.store(h + rows[:, None] * J + outs[None, :], value, mask=(rows < M)[:, None] & (outs < J)[None, :])
    store_tile_statistics(value.to(tl.float32), partial, tile, rows, outs, M, J)


def bn_relu_conv1x1(x, norm, weight):
    """x (M, C), weight (J, C) → h (M, J) and the mean and variance of its columns."""
    (m, c), j = x.shape, len(weight)
    h = x.new_empty(m, j)
    bj = min(MOST_OUTPUTS, power_of_2(j))
    grid = (triton.cdiv(m, ROWS), triton.cdiv(j, bj))
    partial = x.new_empty(grid[0], 2, j, dtype=torch.float32)
    bn_relu_conv1x1_kernel[grid](
        x, x.stride(0), norm.scale, norm.shift, weight.contiguous(), h, partial, m, c, j,
        BM=ROWS, BC=COLUMNS, BJ=bj, V=vector(c, x.stride(0)),
    )  # fmt: skip
    return h, combine_statistics(partial, m)


# o = conv3×3(relu(x·s + t), W) into columns of the buffer, and its tile statistics. Program i: rows i, all K outputs;
# loops over the 9 taps and the J input columns. weight is (9, J, K).
@triton.jit
def bn_relu_conv3x3_kernel(
    x, x_stride, scale, shift, weight, out, out_stride, partial, M, height, width, J, K,
    BM: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    rows = tile * BM + tl.arange(0, BM)
    row_y, row_x = rows // width % height, rows % width
    outs = tl.arange(0, BK)
    acc = tl.zeros((BM, BK), tl.float32)
    for tap in range(9):
        dy, dx = tap // 3 - 1, tap % 3 - 1
        inside = (rows < M) & (row_y + dy >= 0) & (row_y + dy < height) & (row_x + dx >= 0) & (row_x + dx < width)
        for first in range(0, J, BJ):
            cols = first + tl.arange(0, BJ)
            a = load_bn_relu(x, x_stride, scale, shift, rows + dy * width + dx, cols, inside, J)  # (BM, BJ)
            mask = (cols < J)[:, None] & (outs < K)[None, :]
            w = tl.load(weight + (tap * J + cols)[:, None] * K + outs[None, :], mask=mask, other=0.0)  # (BJ, BK)
            acc = tl.dot(a, w, acc, input_precision="ieee")
    value = acc.to(out.dtype.element_ty)
    mask = (rows < M)[:, None] & (outs < K)[None, :]
    tl.store(out + rows[:, None] * out_stride + outs[None, :], value, mask=mask)
    store_tile_statistics(value.to(tl.float32), partial, tile, rows, outs, M, K)


def bn_relu_conv3x3(x, norm, weight, shape, out):
    """x (M, J), weight (K, J, 3, 3) → writes out (M, K); returns the mean and variance of its columns."""
    (m, j), k = x.shape, len(weight)
    grid = (triton.cdiv(m, ROWS),)
    partial = x.new_empty(grid[0], 2, k, dtype=torch.float32)
    taps = weight.permute(2, 3, 1, 0).contiguous()  # (3, 3, J, K)
    bn_relu_conv3x3_kernel[grid](
        x, x.stride(0), norm.scale, norm.shift, taps, out, out.stride(0), partial, m, shape[2], shape[3], j, k,
        BM=ROWS, BJ=COLUMNS, BK=power_of_2(k),
    )  # fmt: skip
    return combine_statistics(partial, m)


def combine_statistics(partial, count):
    """Tiles' means and squared deviations (tiles, 2, C) → mean and biased variance (C,), by Chan's formula."""
    tiles = torch.full((len(partial), 1), float(ROWS), device=partial.device)
    tiles[-1] = count - (len(partial) - 1) * ROWS
    mean = (partial[:, 0] * tiles).sum(0) / count
    return mean, (partial[:, 1] + tiles * (partial[:, 0] - mean).square()).sum(0) / count


# The 9·K columns that a row's gradient comes from: column q is output q % K at the pixel that tap q // K reads from
# here, zero outside the image. (BM, BQ)
@triton.jit
def load_taps(d_out, rows, q, M, height, width, K):
    tap = q // K
    dy, dx = 1 - tap // 3, 1 - tap % 3  # the tap (−1 … 1) with its sign turned
    y, x = (rows // width % height)[:, None] + dy[None, :], (rows % width)[:, None] + dx[None, :]
    mask = (rows < M)[:, None] & (q < 9 * K)[None, :] & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    source = rows[:, None] + (dy * width + dx)[None, :]
    return tl.load(d_out + source * K + (q % K)[None, :], mask=mask, other=0.0)


# dR = (Σ over taps d_out·W)·[x·s + t > 0], and partial sums of dR·x̂ and dR. Program (p, j): rows p, p + P, …, and
# columns j; loops over the 9·K columns of taps. weight is (9·K, J).
@triton.jit
def conv3x3_backward_kernel(
    d_out, x, x_stride, scale, shift, mean, rstd, weight, d_relu, partial, M, height, width, J, K,
    BM: tl.constexpr, BQ: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.program_id(1) * BJ + tl.arange(0, BJ)
    mu = tl.load(mean + cols, mask=cols < J, other=0.0)
    r = tl.load(rstd + cols, mask=cols < J, other=0.0)
    d_weight, d_bias = tl.zeros((BJ,), tl.float32), tl.zeros((BJ,), tl.float32)
    for tile in range(program, tl.cdiv(M, BM), programs):
        rows = (tile * BM + tl.arange(0, BM)).to(tl.int64)
        acc = tl.zeros((BM, BJ), tl.float32)
        for first in range(0, 9 * K, BQ):
            q = first + tl.arange(0, BQ)
            d = load_taps(d_out, rows, q, M, height, width, K)
            mask = (q < 9 * K)[:, None] & (cols < J)[None, :]
            w = tl.load(weight + q[:, None] * J + cols[None, :], mask=mask, other=0.0)  # (BQ, BJ)
            acc = tl.dot(d, w, acc, input_precision="ieee")
        a = load_bn_relu(x, x_stride, scale, shift, rows, cols, rows < M, J)
        mask = (rows < M)[:, None] & (cols < J)[None, :]
        dr = tl.where(a > 0, acc, 0.0).to(d_relu.dtype.element_ty)
        tl.store(d_relu + rows[:, None] * J + cols[None, :], dr, mask=mask)
        value = tl.load(x + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dr = tl.where(mask, dr.to(tl.float32), 0.0)
        d_weight += tl.sum(dr * (value - mu[None, :]), 0) * r
        d_bias += tl.sum(dr, 0)
    tl.store(partial + (2 * program) * J + cols, d_weight, mask=cols < J)
    tl.store(partial + (2 * program + 1) * J + cols, d_bias, mask=cols < J)


# dW, partial: (programs, 9·K, J). Program (p, q, j): rows p, p + P, …, columns q of taps, input columns j.
@triton.jit
def conv3x3_weight_kernel(
    d_out, x, x_stride, scale, shift, partial, M, height, width, J, K,
    BM: tl.constexpr, BQ: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    q = tl.program_id(1) * BQ + tl.arange(0, BQ)
    cols = tl.program_id(2) * BJ + tl.arange(0, BJ)
    acc = tl.zeros((BQ, BJ), tl.float32)
    for tile in range(program, tl.cdiv(M, BM), programs):
        rows = (tile * BM + tl.arange(0, BM)).to(tl.int64)
        d = load_taps(d_out, rows, q, M, height, width, K)
        a = load_bn_relu(x, x_stride, scale, shift, rows, cols, rows < M, J)
        acc = tl.dot(tl.trans(d), a, acc, input_precision="ieee")
    mask = (q < 9 * K)[:, None] & (cols < J)[None, :]
    tl.store(partial + (program.to(tl.int64) * 9 * K + q[:, None]) * J + cols[None, :], acc, mask=mask)


def conv3x3_backward(d_out, x, norm, weight, shape):
    """d_out (M, K) → dR (M, J), and the gradients of γ, β (J,) and of W (K, J, 3, 3). Inverse of bn_relu_conv3x3."""
    (m, j), k = x.shape, len(weight)
    d_out, d_relu = d_out.contiguous(), x.new_empty(m, j)
    bj = min(MOST_OUTPUTS, power_of_2(j))
    column_tiles = triton.cdiv(j, bj)
    programs = row_programs(m, column_tiles)
    bn = x, x.stride(0), norm.scale, norm.shift
    size = m, shape[2], shape[3], j, k
    by_tap = weight.permute(2, 3, 0, 1).contiguous()  # (3, 3, K, J)
    sums = x.new_empty(programs, 2, j, dtype=torch.float32)
    conv3x3_backward_kernel[(programs, column_tiles)](
        d_out, *bn, norm.mean, norm.rstd, by_tap, d_relu, sums, *size, BM=ROWS, BQ=COLUMNS, BJ=bj, num_warps=8
    )
    bq = 64
    tap_tiles = triton.cdiv(9 * k, bq)
    programs = row_programs(m, tap_tiles * column_tiles)
    partial = x.new_empty(programs, 3, 3, k, j, dtype=torch.float32)
    conv3x3_weight_kernel[(programs, tap_tiles, column_tiles)](
        d_out, *bn, partial, *size, BM=ROWS, BQ=bq, BJ=bj, num_warps=8
    )
    d_weight, d_bias = sums.sum(0)
    return d_relu, d_weight, d_bias, partial.sum(0).permute(2, 3, 0, 1)


# One pass over x, C columns of the buffer, with dh = u·dR2 + v·h + w (batch norm's backward, u, v, w (J,) given):
#   dA = dh·W, dR = dA·[x·s + t > 0], D += s·dR, partial sums of dR·x̂, dR, and of dW = dhᵀ·a.
# Program (p, c): rows p, p + P, …, columns c. weight is (J, C).
@triton.jit
def conv1x1_backward_kernel(
    d_relu, h, u, v, w, x, x_stride, scale, shift, mean, rstd, weight, d, d_stride, sums, partial, M, C, J,
    BM: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    x_stride, d_stride, C = x_stride // V * V, d_stride // V * V, C // V * V
    program, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    outs = tl.arange(0, BJ)
    in_c, in_j = cols < C, outs < J
    s = tl.load(scale + cols, mask=in_c, other=0.0)
    mu = tl.load(mean + cols, mask=in_c, other=0.0)
    r = tl.load(rstd + cols, mask=in_c, other=0.0)
    u = tl.load(u + outs, mask=in_j, other=0.0)
    v = tl.load(v + outs, mask=in_j, other=0.0)
    w = tl.load(w + outs, mask=in_j, other=0.0)
    in_weight = in_j[:, None] & in_c[None, :]
    conv = tl.load(weight + outs[:, None] * C + cols[None, :], mask=in_weight, other=0.0)  # (BJ, BC)
    d_weight, d_bias = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    acc = tl.zeros((BJ, BC), tl.float32)
    for tile in range(program, tl.cdiv(M, BM), programs):
        rows = (tile * BM + tl.arange(0, BM)).to(tl.int64)
        inside = rows < M
        mask_j = inside[:, None] & in_j[None, :]
        dr2 = tl.load(d_relu + rows[:, None] * J + outs[None, :], mask=mask_j, other=0.0).to(tl.float32)
        hv = tl.load(h + rows[:, None] * J + outs[None, :], mask=mask_j, other=0.0).to(tl.float32)
        dh = tl.where(mask_j, dr2 * u[None, :] + hv * v[None, :] + w[None, :], 0.0).to(conv.dtype)  # (BM, BJ)
        da = tl.dot(dh, conv, input_precision="ieee")  # (BM, BC)
        a = load_bn_relu(x, x_stride, scale, shift, rows, cols, inside, C)
        acc = tl.dot(tl.trans(dh), a, acc, input_precision="ieee")
        mask = inside[:, None] & in_c[None, :]
        dr = tl.where(a > 0, da, 0.0)
        value = tl.load(x + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        d_weight += tl.sum(dr * (value - mu[None, :]), 0) * r
        d_bias += tl.sum(dr, 0)
        place = d + rows[:, None] * d_stride + cols[None, :]
        before = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        tl.store(place, (before + dr * s[None, :]).to(d.dtype.element_ty), mask=mask)
    tl.store(sums + (2 * program) * C + cols, d_weight, mask=in_c)
    tl.store(sums + (2 * program + 1) * C + cols, d_bias, mask=in_c)
    place = partial + (program.to(tl.int64) * J + outs[:, None]) * C + cols[None, :]
    tl.store(place, acc, mask=in_weight)


def conv1x1_backward(d_relu, h, coefficients, x, d, norm, weight):
    """dR2 and h (M, J), three coefficients (J,) that make dh of them, weight (J, C): adds s·dR to d (M, C).

    Returns the gradients of γ and β (C,) and of W (J, C). Inverse of bn_relu_conv1x1.
    """
    (m, c), j = x.shape, len(weight)
    bj = power_of_2(j)
    bm = max(16, min(ROWS, ROWS * MOST_OUTPUTS // bj))  # all j outputs are in one tile: a wider one has fewer rows
    column_tiles = triton.cdiv(c, COLUMNS)
    programs = row_programs(m, column_tiles)
    sums = x.new_empty(programs, 2, c, dtype=torch.float32)
    partial = x.new_empty(programs, j, c, dtype=torch.float32)
    conv1x1_backward_kernel[(programs, column_tiles)](
        d_relu, h, *coefficients, x, x.stride(0), norm.scale, norm.shift, norm.mean, norm.rstd, weight.contiguous(),
        d, d.stride(0), sums, partial, m, c, j,
        BM=bm, BC=COLUMNS, BJ=bj, V=vector(c, x.stride(0), d.stride(0)), num_warps=8,
    )  # fmt: skip
    d_weight, d_bias = sums.sum(0)
    return d_weight, d_bias, partial.sum(0)
