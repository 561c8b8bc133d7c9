"""Triton kernels of the shared-buffer dense block, and their launchers: the steps that __init__.py has in plain torch.

Arguments and results of the launchers are described there. Every matrix has one row per pixel (M = N·H·W). x is a view
of the block's buffer: C columns of a wider row. Products accumulate in float32, row offsets are int64. Kernels compute
a batch norm's scale and shift themselves, and read weights as the optimiser keeps them: no launch only prepares.

A program takes a span of rows. A program that sums over rows writes a partial sum; a second, small launch adds those in
a fixed order. There are no atomics, so runs repeat bit for bit. In training, a layer with a bottleneck makes five
launches forward and six backward.
"""

import functools
import math

import torch
import triton
import triton.language as tl


def power_of_2(n, least=16):
    """The smallest power of 2 that covers n columns; tl.dot needs 16."""
    return max(least, triton.next_power_of_2(n))


# Tiles: at most BM rows; columns of the input (BC, BJ) and of outputs (BQ); warps. TILES fit the registers of every
# GPU; HOPPER_TILES fit Hopper's, for bottlenecks of at most NARROW columns. They were the best on an H200
# (bench/README.md).
TILES = {
    "bn_relu_conv1x1": {"BM": 64, "BC": 32, "num_warps": 4},
    "bn_relu": {"BM": 64, "BJ": 64, "num_warps": 4},
    "conv3x3": {"BM": 128, "BJ": 16, "num_warps": 4},
    "complete": {"BM": 64, "num_warps": 8},
    "conv3x3_backward": {"BM": 128, "BQ": 16, "BJ": 64, "num_warps": 8},
    "conv3x3_weight": {"BM": 64, "BQ": 64, "BJ": 64, "num_warps": 4},
    "conv1x1_backward": {"BM": 32, "BC": 32, "num_warps": 8},
}
HOPPER, NARROW = (9, 0), 64  # compute capability; columns
HOPPER_TILES = TILES | {
    "bn_relu_conv1x1": {"BM": 128, "BC": 32, "num_warps": 4},
    "conv3x3": {"BM": 256, "BJ": 16, "num_warps": 4},
    "conv3x3_backward": {"BM": 256, "BQ": 16, "BJ": 64, "num_warps": 8},
    "conv3x3_weight": {"BM": 128, "BQ": 64, "BJ": 64, "num_warps": 8},
    "conv1x1_backward": {"BM": 32, "BC": 64, "num_warps": 4},
}
# A tile has so few rows that IMAGES images give every multiprocessor a tile. A launch that sums over rows has PROGRAMS
# programs per multiprocessor: enough to keep it busy, and few partial sums to add.
IMAGES, PROGRAMS = 64, 2
# Partial sums that are added at once (BP), and columns that a program finishes (BC).
STATISTICS, GRADIENTS = {"BP": 128, "BC": 16}, {"BP": 64, "BC": 64}


def vector(*sizes):
    """Neighbouring columns that a thread may read at once, at most 8 of bf16: the largest divisor of all sizes.

    Triton itself only asks if 16 divides a size, and else reads one by one. Kernels tell it by n // V * V.
    """
    return math.gcd(8, *sizes)


@functools.cache
def hardware(device):
    """Compute capability and multiprocessors of a GPU; Triton's interpreter, on a CPU, stands for an H200."""
    if device.type != "cuda":
        return HOPPER, 132
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor), found.multi_processor_count


def fitting(name, h, shape, outputs=16):
    """The tiles of a kernel for images (N, C, H, W); h has their bottlenecks or, without these, the buffer's columns.

    Tiles do not depend on N, so that an epoch's last batch and evaluation compile nothing anew. Many ``outputs`` in a
    tile leave it fewer rows and columns.
    """
    capability, multiprocessors = hardware(h.device)
    tiles = dict((HOPPER_TILES if capability == HOPPER and h.stride(0) <= NARROW else TILES)[name])
    rows = power_of_2(IMAGES * shape[2] * shape[3] // multiprocessors, 32)
    tiles["BM"] = max(16, min(tiles["BM"], rows, 4096 // outputs))
    if "BC" in tiles:
        tiles["BC"] = max(16, min(tiles["BC"], 8192 // outputs))
    return tiles


def share_rows(x, tile, others=1):
    """(rows per program, programs) of a launch over the rows of x, and ``others`` programs for each span of rows."""
    tiles = triton.cdiv(len(x), tile)
    most = triton.cdiv(PROGRAMS * hardware(x.device)[1], others)
    span = triton.cdiv(tiles, min(tiles, most)) * tile
    return span, triton.cdiv(len(x), span)


# Kernels are not compiled anew for other values of these arguments, which follow from the batch size. M does, too, but
# to know that 16 divides it saves registers.
BY_BATCH = ["programs", "sums_programs", "partial_programs", "asked"]
kernel = triton.jit(do_not_specialize=BY_BATCH)


# Batch norm of some columns, (x − mean)·rstd·weight + bias: mean, rstd, scale and shift.
@triton.jit
def load_norm(mean, var, weight, bias, eps, cols, C):
    inside = cols < C
    mu = tl.load(mean + cols, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.load(var + cols, mask=inside, other=1.0).to(tl.float32) + eps)
    s = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32) * r
    return mu, r, s, tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32) - mu * s


# a = relu(x·s + t): the tile of x at rows × cols, normalised and rectified, zero outside; and x.
@triton.jit
def load_bn_relu(x, stride, s, t, rows, cols, inside, C):
    mask = inside[:, None] & (cols < C)[None, :]
    value = tl.load(x + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)
    y = value.to(tl.float32) * s[None, :] + t[None, :]
    a = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)  # as torch's ReLU: a network that diverged must show it
    return tl.where(mask, a, 0.0).to(value.dtype), value.to(tl.float32)


# Mean and sum of squared deviations of n1 and n2 rows together (Chan, Golub, LeVeque 1979).
@triton.jit
def merge_statistics(n1, mean1, square1, n2, mean2, square2):
    n = n1 + n2
    delta = mean2 - mean1
    return n, mean1 + delta * (n2 / n), square1 + square2 + delta * delta * (n1 * n2 / n)


@triton.jit
def tile_statistics(value, rows, M):
    inside = (rows < M)[:, None]
    count = tl.minimum(M - tl.min(rows, 0), value.shape[0]).to(tl.float32)
    mean = tl.sum(tl.where(inside, value, 0.0), 0) / count
    centred = tl.where(inside, value - mean[None, :], 0.0)
    return count, mean, tl.sum(centred * centred, 0)


@triton.jit
def store_pair(partial, first, second, program, cols, C):
    tl.store(partial + (2 * program) * C + cols, first, mask=cols < C)
    tl.store(partial + (2 * program + 1) * C + cols, second, mask=cols < C)


# h = relu(x·s + t)·Wᵀ and partial statistics of h. Program (p, j): a span of rows, outputs j; loops over columns of x.
@kernel
def bn_relu_conv1x1_kernel(
    x, x_stride, mean, var, gamma, beta, eps, weight, h, partial, asked, span, M, C, J,
    BM: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    x_stride, C = x_stride // V * V, C // V * V
    program = tl.program_id(0).to(tl.int64)
    outs = tl.program_id(1) * BJ + tl.arange(0, BJ)
    count, average, square = 0.0, tl.zeros((BJ,), tl.float32), tl.zeros((BJ,), tl.float32)
    for row in range(program * span, tl.minimum(program * span + span, M), BM):
        rows = row + tl.arange(0, BM)
        acc = tl.zeros((BM, BJ), tl.float32)
        for first in range(0, C, BC):
            cols = first + tl.arange(0, BC)
            _mu, _r, s, t = load_norm(mean, var, gamma, beta, eps, cols, C)
            a, _value = load_bn_relu(x, x_stride, s, t, rows, cols, rows < M, C)  # (BM, BC)
            mask = (cols < C)[:, None] & (outs < J)[None, :]
            w = tl.load(weight + outs[None, :] * C + cols[:, None], mask=mask, other=0.0)  # (BC, BJ)
            acc = tl.dot(a, w.to(a.dtype), acc, input_precision="ieee")
        value = acc.to(h.dtype.element_ty)
        tl.store(h + rows[:, None] * J + outs[None, :], value, mask=(rows < M)[:, None] & (outs < J)[None, :])
        if asked:
            n, m, q = tile_statistics(value.to(tl.float32), rows, M)
            count, average, square = merge_statistics(count, average, square, n, m, q)
    if asked:
        store_pair(partial, average, square, program, outs, J)


def bn_relu_conv1x1(x, norm, weight, shape, out, statistics):
    (m, c), j = x.shape, len(weight)
    tiles, bj = fitting("bn_relu_conv1x1", out, shape), min(128, power_of_2(j))
    tiles["num_warps"] *= 1 if bj <= 64 else 2
    span, programs = share_rows(x, tiles["BM"], triton.cdiv(j, bj))
    partial = x.new_empty(programs, 2, j, dtype=torch.float32)
    bn_relu_conv1x1_kernel[(programs, triton.cdiv(j, bj))](
        x, x.stride(0), *norm[:5], weight.flatten(1).contiguous(), out, partial, int(statistics is not None),
        span, m, c, j,
        **tiles, BJ=bj, V=vector(c, x.stride(0)),
    )  # fmt: skip
    finish_statistics(partial, statistics, span, m)


# a = relu(x·s + t), (M, J). Program (p, j): a tile of rows, columns j.
@kernel
def bn_relu_kernel(
    x, x_stride, mean, var, gamma, beta, eps, a, M, J, BM: tl.constexpr, BJ: tl.constexpr, V: tl.constexpr
):
    x_stride, J = x_stride // V * V, J // V * V
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BJ + tl.arange(0, BJ)
    _mu, _r, s, t = load_norm(mean, var, gamma, beta, eps, cols, J)
    value, _x = load_bn_relu(x, x_stride, s, t, rows, cols, rows < M, J)
    tl.store(a + rows[:, None] * J + cols[None, :], value, mask=(rows < M)[:, None] & (cols < J)[None, :])


# o = conv3×3(a, W) into columns of the buffer, and partial statistics. Program p: a span of rows, all K outputs; loops
# over the 9 taps of tiles of the J input columns. The weight (K, J, 3, 3) has the strides wk, wj, wy and wx.
@kernel
def conv3x3_kernel(
    a, weight, wk, wj, wy, wx, out, out_stride, partial, asked, span, M, J, K, H: tl.constexpr, W: tl.constexpr,
    BM: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    J = J // V * V
    program = tl.program_id(0).to(tl.int64)
    outs = tl.arange(0, BK)
    count, average, square = 0.0, tl.zeros((BK,), tl.float32), tl.zeros((BK,), tl.float32)
    for row in range(program * span, tl.minimum(program * span + span, M), BM):
        rows = row + tl.arange(0, BM)
        row_y, row_x = pixels(rows, H, W)
        acc = tl.zeros((BM, BK), tl.float32)
        for part in range(9 * tl.cdiv(J, BJ)):
            tap, cols = part % 9, part // 9 * BJ + tl.arange(0, BJ)
            dy, dx = tap // 3 - 1, tap % 3 - 1
            inside = in_image(rows, row_y + dy, row_x + dx, M, H, W)
            place = a + (rows + dy * W + dx)[:, None] * J + cols[None, :]
            value = tl.load(place, mask=inside[:, None] & (cols < J)[None, :], other=0.0)  # (BM, BJ)
            place = weight + tap // 3 * wy + tap % 3 * wx + cols[:, None] * wj + outs[None, :] * wk
            w = tl.load(place, mask=(cols < J)[:, None] & (outs < K)[None, :], other=0.0)  # (BJ, BK)
            acc = tl.dot(value, w.to(value.dtype), acc, input_precision="ieee")
        value = acc.to(out.dtype.element_ty)
        mask = (rows < M)[:, None] & (outs < K)[None, :]
        tl.store(out + rows[:, None] * out_stride + outs[None, :], value, mask=mask)
        if asked:
            n, m, q = tile_statistics(value.to(tl.float32), rows, M)
            count, average, square = merge_statistics(count, average, square, n, m, q)
    if asked:
        store_pair(partial, average, square, program, outs, K)


# y and x of rows. Height and width are constants of the compiled code: to divide by others takes many instructions.
@triton.jit
def pixels(rows, H: tl.constexpr, W: tl.constexpr):
    pixel = (rows % (H * W)).to(tl.int32)
    return pixel // W, pixel % W


# True if the pixels y, x lie inside the image.
@triton.jit
def in_image(rows, y, x, M, H: tl.constexpr, W: tl.constexpr):
    return (rows < M) & (y >= 0) & (y < H) & (x >= 0) & (x < W)


def bn_relu_conv3x3(x, norm, weight, shape, out, statistics):
    (m, j), k = x.shape, len(weight)
    a, tiles = x.new_empty(m, j), fitting("bn_relu", x, shape)  # stored, since each pixel is read nine times
    bn_relu_kernel[(triton.cdiv(m, tiles["BM"]), triton.cdiv(j, tiles["BJ"]))](
        x, x.stride(0), *norm[:5], a, m, j, **tiles, V=vector(j, x.stride(0))
    )
    bk = power_of_2(k)  # all outputs are in one tile
    tiles = fitting("conv3x3", x, shape, bk)
    span, programs = share_rows(x, tiles["BM"])
    partial = x.new_empty(programs, 2, k, dtype=torch.float32)
    conv3x3_kernel[(programs,)](
        a, weight, *weight.stride(), out, out.stride(0), partial, int(statistics is not None),
        span, m, j, k, H=shape[2], W=shape[3],
        **tiles, BK=bk, V=vector(j),
    )  # fmt: skip
    finish_statistics(partial, statistics, span, m)


# Partial means and squares (programs, 2, C) of spans of rows → mean and biased variance. Program c: columns c.
@kernel
def finish_statistics_kernel(partial, mean, var, programs, span, M, C, BP: tl.constexpr, BC: tl.constexpr):
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    count, average, square = 0.0, tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    for first in range(0, programs, BP):
        p = first + tl.arange(0, BP)
        rows = tl.maximum(tl.minimum(M - p.to(tl.int64) * span, span), 0).to(tl.float32)[:, None]  # of each program
        mask = (p < programs)[:, None] & (cols < C)[None, :]
        place = partial + (2 * p[:, None]) * C + cols[None, :]
        means = tl.load(place, mask=mask, other=0.0)
        squares = tl.load(place + C, mask=mask, other=0.0)
        n = tl.sum(rows)
        m = tl.sum(means * rows, 0) / n
        deviation = means - m[None, :]
        q = tl.sum(squares + rows * deviation * deviation, 0)
        count, average, square = merge_statistics(count, average, square, n, m, q)
    tl.store(mean + cols, average, mask=cols < C)
    tl.store(var + cols, square / M, mask=cols < C)


def finish_statistics(partial, statistics, span, rows):
    """Write ``statistics`` (2, C), unless None, from the partial ones (programs, 2, C) of spans of rows."""
    if statistics is not None:
        programs, _, columns = partial.shape
        finish_statistics_kernel[(triton.cdiv(columns, STATISTICS["BC"]),)](
            partial, statistics[0], statistics[1], programs, span, rows, columns, **STATISTICS
        )


# g (M, KP): the gradient of K columns y of the buffer is d − p − q·(y − mean); zero beyond K columns. Program (p, k): a
# tile of rows, columns k.
@kernel
def complete_kernel(
    y, y_stride, d, d_stride, mean, p, q, g, M, K,
    KP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    y_stride, d_stride, K = y_stride // V * V, d_stride // V * V, K // V * V
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = cols < K
    mask = (rows < M)[:, None] & inside[None, :]
    value = tl.load(d + rows[:, None] * d_stride + cols[None, :], mask=mask, other=0.0)
    x = tl.load(y + rows[:, None] * y_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    mu = tl.load(mean + cols, mask=inside, other=0.0)
    p = tl.load(p + cols, mask=inside, other=0.0)
    q = tl.load(q + cols, mask=inside, other=0.0)
    complete = value.to(tl.float32) - p[None, :] - q[None, :] * (x - mu[None, :])
    complete = tl.where(inside[None, :], complete, 0.0).to(value.dtype)
    tl.store(g + rows[:, None] * KP + cols[None, :], complete, mask=(rows < M)[:, None] & (cols < KP)[None, :])


def complete(new, shape, multiple=1):
    """``multiple``: of this, g has a multiple of columns, the last ones zero."""
    (m, k), tiles = new.x.shape, fitting("complete", new.x, shape)
    kp = triton.cdiv(k, multiple) * multiple
    g, bk = new.x.new_empty(m, kp), min(64, power_of_2(kp))
    complete_kernel[(triton.cdiv(m, tiles["BM"]), triton.cdiv(kp, bk))](
        new.x, new.x.stride(0), new.d, new.d.stride(0), new.mean, new.p, new.q, g, m, k,
        **tiles, KP=kp, BK=bk, V=vector(k, new.x.stride(0), new.d.stride(0)),
    )  # fmt: skip
    return g


# dR = (Σ over taps g·W)·[x·s + t > 0], and partial sums of dR·x̂ and dR. Program (p, j): a span of rows, columns j of x;
# loops over the 9 taps of tiles of the outputs.
@kernel
def conv3x3_backward_kernel(
    g, x, x_stride, mean, var, gamma, beta, eps, weight, wk, wj, wy, wx,
    d_relu, sums, span, M, J, K, H: tl.constexpr, W: tl.constexpr,
    KP: tl.constexpr, BM: tl.constexpr, BQ: tl.constexpr, BJ: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    x_stride, J = x_stride // V * V, J // V * V
    program = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BJ + tl.arange(0, BJ)
    mu, r, s, t = load_norm(mean, var, gamma, beta, eps, cols, J)
    d_weight, d_bias = tl.zeros((BJ,), tl.float32), tl.zeros((BJ,), tl.float32)
    for row in range(program * span, tl.minimum(program * span + span, M), BM):
        rows = row + tl.arange(0, BM)
        row_y, row_x = pixels(rows, H, W)
        acc = tl.zeros((BM, BJ), tl.float32)
        for part in range(9 * (KP // BQ)):
            tap, outs = part % 9, part // 9 * BQ + tl.arange(0, BQ)
            dy, dx = 1 - tap // 3, 1 - tap % 3  # to the output whose tap reads this pixel: opposite sign
            inside = in_image(rows, row_y + dy, row_x + dx, M, H, W)
            place = g + (rows + dy * W + dx)[:, None] * KP + outs[None, :]
            d_out = tl.load(place, mask=inside[:, None], other=0.0)  # (BM, BQ)
            place = weight + tap // 3 * wy + tap % 3 * wx + outs[:, None] * wk + cols[None, :] * wj
            w = tl.load(place, mask=(outs < K)[:, None] & (cols < J)[None, :], other=0.0)  # (BQ, BJ)
            acc = tl.dot(d_out, w.to(d_out.dtype), acc, input_precision="ieee")
        a, value = load_bn_relu(x, x_stride, s, t, rows, cols, rows < M, J)
        mask = (rows < M)[:, None] & (cols < J)[None, :]
        dr = tl.where(a > 0, acc, 0.0).to(d_relu.dtype.element_ty)
        tl.store(d_relu + rows[:, None] * J + cols[None, :], dr, mask=mask)
        dr = tl.where(mask, dr.to(tl.float32), 0.0)
        d_weight += tl.sum(dr * (value - mu[None, :]), 0) * r
        d_bias += tl.sum(dr, 0)
    store_pair(sums, d_weight, d_bias, program, cols, J)


# dW, partial: (programs, 9·K, J). Program (p, c, j): a span of rows, columns c of the 9·KP of taps, input columns j.
@kernel
def conv3x3_weight_kernel(
    g, x, x_stride, mean, var, gamma, beta, eps, partial, span, M, J, K, H: tl.constexpr, W: tl.constexpr,
    KP: tl.constexpr, BM: tl.constexpr, BQ: tl.constexpr, BJ: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    x_stride, J = x_stride // V * V, J // V * V
    program = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BQ + tl.arange(0, BQ)
    tap, outs = columns // KP, columns % KP
    dy, dx = (1 - tap // 3)[None, :], (1 - tap % 3)[None, :]
    cols = tl.program_id(2) * BJ + tl.arange(0, BJ)
    _mu, _r, s, t = load_norm(mean, var, gamma, beta, eps, cols, J)
    acc = tl.zeros((BQ, BJ), tl.float32)
    for row in range(program * span, tl.minimum(program * span + span, M), BM):
        rows = row + tl.arange(0, BM)
        row_y, row_x = pixels(rows, H, W)
        mask = in_image(rows[:, None], row_y[:, None] + dy, row_x[:, None] + dx, M, H, W) & (tap < 9)[None, :]
        place = g + (rows[:, None] + dy * W + dx) * KP + outs[None, :]
        d_out = tl.load(place, mask=mask, other=0.0)  # (BM, BQ)
        a, _value = load_bn_relu(x, x_stride, s, t, rows, cols, rows < M, J)
        acc = tl.dot(tl.trans(d_out), a, acc, input_precision="ieee")
    mask = ((tap < 9) & (outs < K))[:, None] & (cols < J)[None, :]
    tl.store(partial + ((program * 9 + tap[:, None]) * K + outs[:, None]) * J + cols[None, :], acc, mask=mask)


def conv3x3_backward(new, x, norm, weight, shape):
    (m, j), k, g = x.shape, len(weight), complete(new, shape, 16)  # tl.dot needs 16
    kp, given = g.shape[1], (g, x, x.stride(0), *norm[:5])
    size, common = (m, j, k), {"H": shape[2], "W": shape[3], "KP": kp, "V": vector(j, x.stride(0))}

    d_relu, tiles = x.new_empty(m, j), fitting("conv3x3_backward", x, shape)
    column_tiles = triton.cdiv(j, tiles["BJ"])
    span, programs = share_rows(x, tiles["BM"], column_tiles)
    sums = x.new_empty(programs, 2, j, dtype=torch.float32)
    conv3x3_backward_kernel[(programs, column_tiles)](
        *given, weight, *weight.stride(), d_relu, sums, span, *size, **common, **tiles
    )
    tiles = fitting("conv3x3_weight", x, shape)
    tap_tiles, column_tiles = triton.cdiv(9 * kp, tiles["BQ"]), triton.cdiv(j, tiles["BJ"])
    span, programs = share_rows(x, tiles["BM"], tap_tiles * column_tiles)
    partial = x.new_empty(programs, 9, k, j, dtype=torch.float32)
    conv3x3_weight_kernel[(programs, tap_tiles, column_tiles)](*given, partial, span, *size, **common, **tiles)
    return d_relu, *finish_gradients(sums, partial, weight, norm, m)


# One pass over x, C columns of the buffer, with dh = u·dR2 + v·h + w, the gradient of the second batch norm's input:
#   dA = dh·W, dR = dA·[x·s + t > 0], D += s·dR, partial sums of dR·x̂, dR, and of dW = dhᵀ·a.
# Program (p, c): a span of rows, columns c. weight is (J, C). BATCH: that norm used the batch's statistics.
@kernel
def conv1x1_backward_kernel(
    d_relu, h, mean2, var2, gamma2, beta2, eps2, d_weight2, d_bias2,
    x, x_stride, mean, var, gamma, beta, eps, weight, d, d_stride, sums, partial, span, M, C, J,
    BM: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr, V: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    x_stride, d_stride, C = x_stride // V * V, d_stride // V * V, C // V * V
    program = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    outs = tl.arange(0, BJ)
    in_c, in_j = cols < C, outs < J
    mu, r, s, t = load_norm(mean, var, gamma, beta, eps, cols, C)
    mu2, r2, u, _t2 = load_norm(mean2, var2, gamma2, beta2, eps2, outs, J)
    v, w = tl.zeros((BJ,), tl.float32), tl.zeros((BJ,), tl.float32)
    if BATCH:
        v = -u * r2 * tl.load(d_weight2 + outs, mask=in_j, other=0.0).to(tl.float32) / M
        w = -u * tl.load(d_bias2 + outs, mask=in_j, other=0.0).to(tl.float32) / M - v * mu2
    in_weight = in_j[:, None] & in_c[None, :]
    conv = tl.load(weight + outs[:, None] * C + cols[None, :], mask=in_weight, other=0.0)  # (BJ, BC)
    conv = conv.to(x.dtype.element_ty)
    d_weight, d_bias = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    acc = tl.zeros((BJ, BC), tl.float32)
    for row in range(program * span, tl.minimum(program * span + span, M), BM):
        rows = row + tl.arange(0, BM)
        inside = rows < M
        mask_j = inside[:, None] & in_j[None, :]
        dr2 = tl.load(d_relu + rows[:, None] * J + outs[None, :], mask=mask_j, other=0.0).to(tl.float32)
        hv = tl.load(h + rows[:, None] * J + outs[None, :], mask=mask_j, other=0.0).to(tl.float32)
        dh = tl.where(mask_j, dr2 * u[None, :] + hv * v[None, :] + w[None, :], 0.0).to(conv.dtype)  # (BM, BJ)
        da = tl.dot(dh, conv, input_precision="ieee")  # (BM, BC)
        a, value = load_bn_relu(x, x_stride, s, t, rows, cols, inside, C)
        acc = tl.dot(tl.trans(dh), a, acc, input_precision="ieee")
        mask = inside[:, None] & in_c[None, :]
        dr = tl.where(a > 0, da, 0.0)
        d_weight += tl.sum(dr * (value - mu[None, :]), 0) * r
        d_bias += tl.sum(dr, 0)
        place = d + rows[:, None] * d_stride + cols[None, :]
        before = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        tl.store(place, (before + dr * s[None, :]).to(d.dtype.element_ty), mask=mask)
    store_pair(sums, d_weight, d_bias, program, cols, C)
    place = partial + (program * J + outs[:, None]) * C + cols[None, :]
    tl.store(place, acc, mask=in_weight)


def conv1x1_backward(d_relu, h, norm2, d_weight2, d_bias2, read, norm, weight, shape):
    x, d = read.x, read.d
    (m, c), j = x.shape, len(weight)
    bj = power_of_2(j)  # all outputs are in one tile
    tiles = fitting("conv1x1_backward", h, shape, bj)
    column_tiles = triton.cdiv(c, tiles["BC"])
    span, programs = share_rows(x, tiles["BM"], column_tiles)
    sums = x.new_empty(programs, 2, c, dtype=torch.float32)
    partial = x.new_empty(programs, 1, j, c, dtype=torch.float32)
    conv1x1_backward_kernel[(programs, column_tiles)](
        d_relu, h, *norm2[:5], d_weight2, d_bias2, x, x.stride(0), *norm[:5], weight.flatten(1).contiguous(),
        d, d.stride(0), sums, partial, span, m, c, j,
        **tiles, BJ=bj, V=vector(c, x.stride(0), d.stride(0)), BATCH=norm2.batch,
    )  # fmt: skip
    return finish_gradients(sums, partial, weight, norm, m, read)


# Adds partial sums: dγ and dβ from (programs, 2, C); dW from (programs, taps·K, C), into the weight's strides. If the
# norm used the batch (DEFER), also adds its terms to p and q. The first programs take columns, the others dW.
@kernel
def finish_gradients_kernel(
    sums, sums_programs, d_weight, d_bias, partial, partial_programs, d_conv, wk, wj, wy, wx,
    var, gamma, eps, p, q, M, size, K, C,
    BP: tl.constexpr, BC: tl.constexpr, DEFER: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(C, BC)
    if tl.program_id(0) < column_tiles:
        cols = tl.program_id(0) * BC + tl.arange(0, BC)
        weight_sum, bias_sum = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
        for first in range(0, sums_programs, BP):
            part = first + tl.arange(0, BP)
            mask = (part < sums_programs)[:, None] & (cols < C)[None, :]
            place = sums + (2 * part[:, None]) * C + cols[None, :]
            weight_sum += tl.sum(tl.load(place, mask=mask, other=0.0), 0)
            bias_sum += tl.sum(tl.load(place + C, mask=mask, other=0.0), 0)
        tl.store(d_weight + cols, weight_sum, mask=cols < C)
        tl.store(d_bias + cols, bias_sum, mask=cols < C)
        if DEFER:
            r = tl.rsqrt(tl.load(var + cols, mask=cols < C, other=1.0) + eps)
            s = tl.load(gamma + cols, mask=cols < C, other=0.0).to(tl.float32) * r / M
            tl.store(p + cols, tl.load(p + cols, mask=cols < C, other=0.0) + s * bias_sum, mask=cols < C)
            tl.store(q + cols, tl.load(q + cols, mask=cols < C, other=0.0) + s * r * weight_sum, mask=cols < C)
    else:
        element = (tl.program_id(0) - column_tiles) * BC + tl.arange(0, BC)
        total = tl.zeros((BC,), tl.float32)
        for first in range(0, partial_programs, BP):
            part = first + tl.arange(0, BP)
            mask = (part < partial_programs)[:, None] & (element < size)[None, :]
            place = partial + part.to(tl.int64)[:, None] * size + element[None, :]
            total += tl.sum(tl.load(place, mask=mask, other=0.0), 0)
        row, col = element // C, element % C
        tap = row // K
        place = d_conv + row % K * wk + tap // 3 * wy + tap % 3 * wx + col * wj
        tl.store(place, total, mask=element < size)


def finish_gradients(sums, partial, weight, norm, rows, read=None):
    """Gradients of γ and β (C,) and of a weight, from partial sums (programs, 2, C) and (programs, taps, K, C).

    ``read``: the Buffer whose columns the norm normalised; its p and q take the deferred terms.
    """
    columns, size = sums.shape[2], partial[0].numel()
    d_weight, d_bias = sums.new_empty(2, columns)
    d_conv = torch.empty_like(weight)  # with the strides of the weight
    p, q = (read.p, read.q) if read else (d_weight, d_bias)
    finish_gradients_kernel[(triton.cdiv(columns, GRADIENTS["BC"]) + triton.cdiv(size, GRADIENTS["BC"]),)](
        sums, len(sums), d_weight, d_bias, partial, len(partial), d_conv, *d_conv.stride(),
        norm.var, norm.weight, norm.eps, p, q, rows, size, partial.shape[2], columns,
        **GRADIENTS, DEFER=read is not None and norm.batch,
    )  # fmt: skip
    return d_weight, d_bias, d_conv
