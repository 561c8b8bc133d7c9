"""The shared-buffer dense block: memory linear in depth, nothing concatenated, no statistic computed twice.

A dense block writes all its features into one buffer, a matrix of M = N·H·W rows (pixels) and C0 + L·k columns
(channels): an image tensor in channels-last memory. Layer l reads the first C = C0 + l·k columns and writes the next k.

    forward   a = relu(x·s + t)      x = buf[:, :C]; batch norm as s = γ·r, t = β − μ·s      computed again when needed
              h = a·W1ᵀ              (M, 4k), the bottleneck                                kept
              o = conv3×3(relu(h·s2 + t2), W2)                                              the next k columns of buf

The mean μ and the variance of a column do not depend on the layer that reads it: they are computed once, when it is
written. Kept for the backward pass are buf, every h and the statistics.

    backward  D (M, C0 + L·k), the gradient of buf, is complete in a layer's k columns once all later layers have added
              to it. Let dA be the gradient of a and dR = dA·[a > 0]. Batch norm's gradient is, with r = 1/σ,

                  dx = s·dR − s·Σ dR / M − s·(x − μ)·r·Σ(dR·x̂) / M,        x̂ = (x − μ)·r

              The sums dβ = Σ dR and dγ = Σ dR·x̂ are known only after a pass over dR, but their terms are affine in x.
              So s·dR is added to D at once and the terms are deferred: P += s·dβ/M and Q += s·r·dγ/M, one number per
              column. The gradient of a column is D − P − Q·(x − μ), formed when its own layer asks for it.

A network without bottlenecks has the 3×3 convolution alone: o = conv3×3(relu(x·s + t), W1).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

# A CPU works through the rows of a matrix in tiles of this many elements, so that a layer's steps find them in cache.
CPU_TILE = 2**19


@torch.compiler.disable  # the graph breaks here: the compiler has nothing to fuse across this node
def dense_block(layers, x):
    """Run a dense block's layers on x (N, C0, H, W) → (N, C0 + L·k, H, W), channels last.

    ``layers`` are SingleLayer or BottleneckLayer modules, used as containers: their hooks are not called. Computes in
    autocast's dtype where that is on; statistics are float32 or better. Raises ValueError for dropout, and RuntimeError
    in a backward pass that is itself to be differentiated.
    """
    if any(layer.drop_rate > 0 and layer.training for layer in layers):
        raise ValueError("block 'fused' has no dropout: train with block 'naive' or 'checkpoint', or with drop rate 0")
    return SharedBuffer.apply(x, layers, *(parameter for layer in layers for parameter in layer_parameters(layer)))


def layer_parameters(layer):
    """γ1, β1, W1 and, with a bottleneck, γ2, β2, W2."""
    parameters = [layer.norm1.weight, layer.norm1.bias, layer.conv1.weight]
    if hasattr(layer, "norm2"):
        parameters += [layer.norm2.weight, layer.norm2.bias, layer.conv2.weight]
    return parameters


class SharedBuffer(torch.autograd.Function):
    """The block as one node of the graph: forward(x, layers, *parameters of all layers) → buf."""

    @staticmethod
    def forward(ctx, x, layers, *parameters):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        start, growth_rate = x.shape[1], parameters[-1].shape[0]
        total = start + len(layers) * growth_rate
        saved, batch_flags = [], []
        with torch.autocast(kind, enabled=False):
            buf = x.new_empty(x[:, 0].numel(), total, dtype=dtype)  # (M, C0 + L·k)
            mean, var = (x.new_empty(total, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2))

            def write(columns, values):
                buf[:, columns] = values
                mean[columns], var[columns] = statistics(values.to(dtype))

            write(slice(0, start), rows(x))
            for i, layer in enumerate(layers):
                end = start + i * growth_rate
                norm = take_norm(layer.norm1, mean[:end], var[:end], len(buf))
                saved += [norm.mean, norm.rstd]
                batch_flags.append([norm.batch])
                inputs, weight = buf[:, :end], layer.conv1.weight
                if hasattr(layer, "norm2"):
                    h = bn_relu_conv1x1(inputs, norm, weight.to(dtype))
                    norm = take_norm(layer.norm2, *statistics(h), len(h))
                    saved += [h, norm.mean, norm.rstd]
                    batch_flags[-1].append(norm.batch)
                    inputs, weight = h, layer.conv2.weight
                write(slice(end, end + growth_rate), bn_relu_conv3x3(inputs, norm, weight.to(dtype), x.shape))
        out = images(buf, x.shape)
        ctx.save_for_backward(out, mean, *saved, *parameters)
        ctx.layers, ctx.batch_flags, ctx.x_info = len(layers), batch_flags, (start, x.dtype)
        return out

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("block 'fused' cannot be differentiated twice: use block 'naive'")
        out, mean, *tensors = ctx.saved_tensors
        (start, x_dtype), shape, buf = ctx.x_info, out.shape, rows(out)
        flags = ctx.batch_flags
        bottleneck = len(flags[0]) == 2
        saved_per_layer, parameters_per_layer = (5, 6) if bottleneck else (2, 3)
        saved, parameters = tensors[: saved_per_layer * ctx.layers], tensors[saved_per_layer * ctx.layers :]
        grads, needed = [], ctx.needs_input_grad[2:]
        growth_rate = parameters[-1].shape[0]
        gradient = BufferGradient(rows(grad).to(out.dtype, copy=True), buf, mean)
        with torch.autocast(out.device.type, enabled=False):
            for i in reversed(range(ctx.layers)):
                end = start + i * growth_rate
                mean1, rstd1, *rest = saved[i * saved_per_layer : (i + 1) * saved_per_layer]
                mine = slice(i * parameters_per_layer, (i + 1) * parameters_per_layer)
                weight1, bias1, conv1, *more = parameters[mine]
                norm1 = Norm(mean1, rstd1, weight1, bias1, flags[i][0])
                d_out = gradient.complete(slice(end, end + growth_rate))
                if bottleneck:
                    h, mean2, rstd2 = rest
                    weight2, bias2, conv2 = more
                    norm2 = Norm(mean2, rstd2, weight2, bias2, flags[i][1])
                    d_relu, d_conv2 = conv3x3_backward(d_out, h, norm2, conv2, shape, needed[mine][5])
                    dh, *d_norm2 = norm_backward(d_relu, h, norm2)
                    d_conv1, *d_norm1 = conv1x1_backward(dh, gradient, end, norm1, conv1)
                    grads = [*d_norm1, d_conv1, *d_norm2, d_conv2, *grads]
                else:
                    d_relu, d_conv1 = conv3x3_backward(d_out, buf[:, :end], norm1, conv1, shape, needed[mine][2])
                    d_norm1 = gradient.add(slice(None), d_relu, norm1)
                    grads = [*d_norm1, d_conv1, *grads]
                gradient.defer(norm1, *d_norm1)
            dx = images(gradient.complete(slice(0, start)), shape).to(x_dtype)
        return dx, None, *(g if need else None for g, need in zip(grads, needed, strict=True))


class Norm(NamedTuple):
    """Batch norm of C columns, (x − mean)·rstd·weight + bias, all of shape (C,).

    ``batch``: mean and rstd are those of the batch, so that they have gradients; not so in evaluation mode.
    """

    mean: torch.Tensor
    rstd: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    batch: bool

    @property
    def scale(self):
        return self.weight * self.rstd

    @property
    def shift(self):
        return self.bias - self.mean * self.scale


def take_norm(module, mean, var, count):
    """The Norm of a BatchNorm2d for columns with batch statistics mean and var over ``count`` rows; updates its own."""
    batch = module.training or module.running_mean is None
    if batch and count == 1:
        raise ValueError("batch norm needs more than one value per channel while training: use a larger batch or image")
    if module.training and module.track_running_stats:
        module.num_batches_tracked += 1
        momentum = 1 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
        module.running_mean.lerp_(mean.to(module.running_mean.dtype), momentum)
        module.running_var.lerp_((var * (count / (count - 1))).to(module.running_var.dtype), momentum)
    if not batch:
        mean, var = module.running_mean.to(mean.dtype, copy=True), module.running_var.to(var.dtype)
    return Norm(mean, (var + module.eps).rsqrt(), module.weight.detach(), module.bias.detach(), batch)


def rows(x):
    """(N, C, H, W) → (M, C), a view where x is channels last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def images(x, shape):
    """(M, C) → (N, C, H, W), channels last, with N, H, W of ``shape``."""
    return x.view(shape[0], shape[2], shape[3], x.shape[1]).permute(0, 3, 1, 2)


def tile_rows(x):
    """How many rows of x (M, C) to work on at a time: a cache-sized tile on a CPU, elsewhere all."""
    return min(len(x), max(1, CPU_TILE // x.shape[1])) if x.device.type == "cpu" else len(x)


def tiles(x):
    """Slices of the rows of x (M, C)."""
    return [slice(first, first + tile_rows(x)) for first in range(0, len(x), tile_rows(x))]


def column_sums(x):
    """(M, C) → (C,), in float32 or better."""
    return x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32))


def statistics(x):
    """Mean and biased variance of each column in float32 or better, (M, C) → 2 × (C,)."""
    # The running statistics that torch updates here are of no use but for their dtype, which the result takes.
    running = x.new_zeros(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.batch_norm_update_stats(x, *running, 0.0)


def bn_relu(x, norm, out=None):
    """relu(x·s + t) in x's dtype, (M, C)."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out[: len(x)]
    return torch.addcmul(norm.shift, x, norm.scale, out=out).relu_()


def bn_relu_conv1x1(x, norm, weight):
    """(M, C) and (J, C, 1, 1) → h (M, J)."""
    h, weight = x.new_empty(len(x), len(weight)), weight.flatten(1).t()
    scratch = x.new_empty(tile_rows(x), x.shape[1])
    for tile in tiles(x):
        torch.mm(bn_relu(x[tile], norm, out=scratch), weight, out=h[tile])
    return h


def bn_relu_conv3x3(x, norm, weight, shape):
    """(M, J) and (k, J, 3, 3) → (M, k)."""
    return rows(F.conv2d(images(bn_relu(x, norm), shape), weight, padding=1))


def conv3x3_backward(d_out, x, norm, weight, shape, weight_needed):
    """Backward of bn_relu_conv3x3 from d_out (M, k): the gradient of batch norm's output, dR (M, J), and of W."""
    a = bn_relu(x, norm)
    da, d_weight, _ = torch.ops.aten.convolution_backward(
        images(d_out, shape), images(a, shape), weight.to(x.dtype), None,
        [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, weight_needed, False],
    )  # fmt: skip
    d_relu = torch.ops.aten.threshold_backward(rows(da), a, 0)
    return d_relu, d_weight.to(weight.dtype) if weight_needed else None


def norm_backward(d_relu, x, norm):
    """Batch norm's gradients: of x (M, J), of weight and bias (J,)."""
    dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
        d_relu, x, norm.weight, norm.mean, norm.rstd, norm.mean, norm.rstd, True, 0.0, [True, True, True]
    )
    if not norm.batch:
        dx = (d_relu * norm.scale).to(x.dtype)
    return dx, d_weight, d_bias


def conv1x1_backward(dh, gradient, end, norm, weight):
    """Backward of bn_relu_conv1x1 on the first ``end`` columns, from dh (M, J): one pass over the buffer's rows.

    Adds s·dR to ``gradient``. Returns the gradients of W1 (J, C, 1, 1), γ1 and β1 (C,).
    """
    matrix, x = weight.flatten(1).to(dh.dtype), gradient.x[:, :end]
    d_matrix, d_weight, d_bias = torch.zeros_like(matrix, dtype=norm.mean.dtype), 0, 0
    scratch = x.new_empty(3, tile_rows(x), end)
    for tile in tiles(x):
        a = bn_relu(x[tile], norm, out=scratch[0])
        d_relu = torch.mm(dh[tile], matrix, out=scratch[1, : len(a)])
        torch.ops.aten.threshold_backward.grad_input(d_relu, a, 0, grad_input=d_relu)
        d_matrix += dh[tile].t() @ a
        tile_weight, tile_bias = gradient.add(tile, d_relu, norm, scratch[2, : len(a)])
        d_weight, d_bias = d_weight + tile_weight, d_bias + tile_bias
    return d_matrix.view_as(weight).to(weight.dtype), d_weight, d_bias


class BufferGradient:
    """The gradient of the buffer x (M, C0 + L·k) while it is being summed: D, and the deferred P and Q."""

    def __init__(self, d, x, mean):
        self.d, self.x, self.mean = d, x, mean
        self.p, self.q = torch.zeros_like(mean), torch.zeros_like(mean)

    def add(self, tile, d_relu, norm, scratch=None):
        """Add s·dR of a tile of rows to the first columns. Returns the tile's part of dγ and dβ."""
        end = d_relu.shape[1]
        self.d[tile, :end].addcmul_(d_relu, norm.scale)
        centred = torch.sub(self.x[tile, :end], norm.mean, out=scratch)
        return column_sums(centred.mul_(d_relu)) * norm.rstd, column_sums(d_relu)

    def defer(self, norm, d_weight, d_bias):
        """Note what the batch's mean and variance contribute, to be applied when a column is complete."""
        if norm.batch:
            end = len(d_bias)
            self.p[:end] += norm.scale * d_bias / len(self.x)
            self.q[:end] += norm.scale * norm.rstd * d_weight / len(self.x)

    def complete(self, columns):
        """The gradient of columns to which nothing will be added any more, (M, columns)."""
        centred = self.x[:, columns] - self.mean[columns]
        return (self.d[:, columns] - self.p[columns] - self.q[columns] * centred).to(self.d.dtype).contiguous()
