"""The shared-buffer dense block: memory linear in depth, nothing concatenated, no statistic computed twice.

A dense block writes all its features into one buffer, a matrix of M = N·H·W rows (pixels) and C0 + L·k columns
(channels): an image tensor in channels-last memory. Layer l reads the first C = C0 + l·k columns and writes the next k.

    forward   a = relu(x·s + t)      x = buf[:, :C]; batch norm as s = γ/σ, t = β − μ·s      computed again when needed
              h = a·W1ᵀ              (M, 4k), the bottleneck                                kept
              o = conv3×3(relu(h·s2 + t2), W2)                                              the next k columns of buf

The mean μ and the variance σ² of a column do not depend on the layer that reads it: they are computed once, when it is
written. Kept for the backward pass are buf, every h and the statistics.

    backward  D (M, C0 + L·k), the gradient of buf, is complete in a layer's k columns once all later layers have added
              to it. Let dA be the gradient of a and dR = dA·[a > 0]. Batch norm's gradient is, with r = 1/σ,

                  dx = s·dR − s·Σ dR / M − s·(x − μ)·r·Σ(dR·x̂) / M,        x̂ = (x − μ)·r

              The sums dβ = Σ dR and dγ = Σ dR·x̂ are known only after a pass over dR, but their terms are affine in x.
              So s·dR is added to D at once and the terms are deferred: P += s·dβ/M and Q += s·r·dγ/M, one number per
              column. The gradient of a column is D − P − Q·(x − μ), formed when its own layer asks for it.

A network without bottlenecks has the 3×3 convolution alone: o = conv3×3(relu(x·s + t), W1).

The four steps, bn_relu_conv1x1, bn_relu_conv3x3 and their backward passes, stand below in plain torch, which runs
everywhere, and in kernels.py for CUDA in bf16 and fp16.
"""

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F

try:
    from fused import loops
except (ImportError, RuntimeError):  # without Numba, or without a place where Numba may keep what it compiles
    loops = None


@torch.compiler.disable  # the graph breaks here: the compiler has nothing to fuse across this node
def dense_block(layers, x):
    """Run a dense block's layers on x (N, C0, H, W) → (N, C0 + L·k, H, W), channels last.

    ``layers`` are SingleLayer or BottleneckLayer modules, used as containers: their hooks are not called. Under
    autocast the result has autocast's dtype; statistics are float32 or better. Raises ValueError for dropout, and
    RuntimeError in a backward pass that is itself to be differentiated.
    """
    if any(layer.drop_rate > 0 and layer.training for layer in layers):
        raise ValueError("block 'fused' has no dropout: train with block 'naive' or 'checkpoint', or with drop rate 0")
    parameters = [parameter for layer in layers for parameter in layer_parameters(layer)]
    return SharedBuffer.apply(x, layers, torch.is_grad_enabled(), *parameters)


def layer_parameters(layer):
    """γ1, β1, W1 and, with a bottleneck, γ2, β2, W2."""
    parameters = [layer.norm1.weight, layer.norm1.bias, layer.conv1.weight]
    if hasattr(layer, "norm2"):
        parameters += [layer.norm2.weight, layer.norm2.bias, layer.conv2.weight]
    return parameters


def steps_for(x):
    """Where the four steps for tensors like x come from: the module kernels, or this one.

    The kernels' tiles are made for tensor cores. In float32, exact products of that size do not fit into registers.
    """
    if x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16):
        from fused import kernels

        return kernels
    return sys.modules[__name__]


class SharedBuffer(torch.autograd.Function):
    """The block as one node of the graph: forward(x, layers, keep, *parameters of all layers) → buf.

    ``keep``: there will be a backward pass.
    """

    @staticmethod
    def forward(ctx, x, layers, keep, *parameters):
        kind, shape = x.device.type, x.shape
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        start, growth_rate = shape[1], parameters[-1].shape[0]
        total = start + len(layers) * growth_rate
        saved, ctx.batch_flags = [], []
        with torch.autocast(kind, enabled=False), torch.cuda.device_of(x):
            buf = x.new_empty(x[:, 0].numel(), total, dtype=dtype)  # (M, C0 + L·k)
            mean, var = (x.new_empty(total, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2))
            steps = steps_for(buf)
            buf[:, :start] = to_rows(x)
            mean[:start], var[:start] = statistics(buf[:, :start].contiguous())
            for i, layer in enumerate(layers):
                end = start + i * growth_rate
                norm = take_norm(layer.norm1, mean[:end], var[:end], len(buf))
                kept, flags, inputs, weight = [norm.mean, norm.rstd], [norm.batch], buf[:, :end], layer.conv1.weight
                if hasattr(layer, "norm2"):
                    h, h_statistics = steps.bn_relu_conv1x1(inputs, norm, weight.flatten(1).to(dtype))
                    norm = take_norm(layer.norm2, *h_statistics, len(h))
                    kept += [norm.mean, norm.rstd, h]
                    flags, inputs, weight = [*flags, norm.batch], h, layer.conv2.weight
                new = slice(end, end + growth_rate)
                mean[new], var[new] = steps.bn_relu_conv3x3(inputs, norm, weight.to(dtype), shape, buf[:, new])
                saved += kept if keep else []
                ctx.batch_flags.append(flags)
        out = to_images(buf, shape)
        ctx.save_for_backward(out, mean, *saved, *parameters)
        ctx.start, ctx.x_dtype = start, x.dtype
        return out

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("block 'fused' cannot be differentiated twice: use block 'naive'")
        out, mean, *tensors = ctx.saved_tensors
        layers, bottleneck = len(ctx.batch_flags), len(ctx.batch_flags[0]) == 2
        split = layers * (5 if bottleneck else 2)
        saved, parameters = in_groups(tensors[:split], layers), in_groups(tensors[split:], layers)
        layer_backward = bottleneck_backward if bottleneck else single_backward
        growth_rate = parameters[0][-1].shape[0]
        gradient = BufferGradient(to_rows(grad).to(out.dtype, copy=True).contiguous(), to_rows(out), mean)
        grads = []
        with torch.autocast(out.device.type, enabled=False):
            for i in reversed(range(layers)):
                end = ctx.start + i * growth_rate
                d_out = gradient.complete(slice(end, end + growth_rate))
                layer = saved[i], parameters[i], ctx.batch_flags[i]
                grads = [*layer_backward(d_out, gradient, end, *layer, out.shape), *grads]
            dx = to_images(gradient.complete(slice(0, ctx.start)), out.shape).to(ctx.x_dtype)
        needed = ctx.needs_input_grad[3:]
        return dx, None, None, *(g if need else None for g, need in zip(grads, needed, strict=True))


def in_groups(items, count):
    """Cut a list into ``count`` lists of equal length."""
    size = len(items) // count
    return [items[i * size : (i + 1) * size] for i in range(count)]


def bottleneck_backward(d_out, gradient, end, saved, parameters, flags, shape):
    """From d_out (M, k): adds to the gradient of the first ``end`` columns; returns those of a layer's parameters."""
    mean1, rstd1, mean2, rstd2, h = saved
    weight1, bias1, conv1, weight2, bias2, conv2 = parameters
    norm1, norm2 = Norm(mean1, rstd1, weight1, bias1, flags[0]), Norm(mean2, rstd2, weight2, bias2, flags[1])
    steps = steps_for(h)
    d_relu, d_weight2, d_bias2, d_conv2 = steps.conv3x3_backward(d_out, h, norm2, conv2.to(h.dtype), shape)
    dh = norm2.input_gradient(d_weight2, d_bias2, len(h))
    x, d = gradient.x[:, :end], gradient.d[:, :end]
    d_weight1, d_bias1, d_conv1 = steps.conv1x1_backward(d_relu, h, dh, x, d, norm1, conv1.flatten(1).to(h.dtype))
    gradient.defer(norm1, d_weight1, d_bias1)
    d_conv1 = d_conv1.to(conv1.dtype).contiguous().as_strided(conv1.shape, conv1.stride())  # as DDP expects them
    d_conv2 = d_conv2.to(conv2.dtype)
    return d_weight1, d_bias1, d_conv1, d_weight2, d_bias2, d_conv2


def single_backward(d_out, gradient, end, saved, parameters, flags, shape):
    """The same for a layer without bottleneck."""
    weight1, bias1, conv1 = parameters
    norm, x = Norm(*saved, weight1, bias1, flags[0]), gradient.x[:, :end]
    step = steps_for(x).conv3x3_backward
    d_relu, d_weight, d_bias, d_conv = step(d_out, x, norm, conv1.to(x.dtype), shape)
    gradient.d[:, :end].addcmul_(d_relu, norm.scale)
    gradient.defer(norm, d_weight, d_bias)
    return d_weight, d_bias, d_conv.to(conv1.dtype)


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

    def input_gradient(self, d_weight, d_bias, count):
        """Three coefficients (C,), u, v and w: dx = u·dR + v·x + w, from dγ and dβ over ``count`` rows."""
        if not self.batch:
            return self.scale, torch.zeros_like(self.mean), torch.zeros_like(self.mean)
        v = -self.scale * self.rstd * d_weight / count
        return self.scale, v, -self.scale * d_bias / count - v * self.mean


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


def to_rows(x):
    """(N, C, H, W) → (M, C), a view where x is channels last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def to_images(x, shape):
    """(M, C) → (N, C, H, W), channels last, with N, H, W of ``shape``."""
    return x.view(shape[0], shape[2], shape[3], x.shape[1]).permute(0, 3, 1, 2)


# The four steps in plain torch, whose passes over memory are below or, in the module loops, compiled.


def bn_relu_conv1x1(x, norm, weight):
    """x (M, C), weight (J, C) → h (M, J) and the mean and variance of its columns."""
    passes = passes_for(x)
    h = passes.bn_relu(x, norm) @ weight.t()
    return h, passes.statistics(h)


def bn_relu_conv3x3(x, norm, weight, shape, out):
    """x (M, J), weight (k, J, 3, 3) → writes out (M, k); returns the mean and variance of its columns."""
    passes = passes_for(x)
    result = to_rows(F.conv2d(to_images(passes.bn_relu(x, norm), shape), weight, padding=1))
    out.copy_(result)
    return passes.statistics(result)


def conv3x3_backward(d_out, x, norm, weight, shape):
    """d_out (M, k) → dR (M, J), and the gradients of γ, β (J,) and of W (k, J, 3, 3). Inverse of bn_relu_conv3x3."""
    passes = passes_for(x)
    da, d_conv, _ = torch.ops.aten.convolution_backward(
        to_images(d_out, shape), to_images(passes.bn_relu(x, norm), shape), weight, None,
        [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False],
    )  # fmt: skip
    return *passes.relu_backward(to_rows(da), x, norm), d_conv


def conv1x1_backward(d_relu, h, coefficients, x, d, norm, weight):
    """dR2 and h (M, J), three coefficients (J,) that make dh of them, weight (J, C): adds s·dR to d (M, C).

    Returns the gradients of γ and β (C,) and of W (J, C). Inverse of bn_relu_conv1x1.
    """
    passes = passes_for(x)
    dh = passes.combine(d_relu, h, *coefficients)
    a, d_weight, d_bias = passes.relu_backward_add(dh @ weight, x, norm, d)
    return d_weight, d_bias, dh.t() @ a


def passes_for(x):
    """Where the passes over tensors like x come from: the module loops, or this one."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64, torch.bfloat16) and loops:
        return loops
    return sys.modules[__name__]


def bn_relu(x, norm):
    """relu(x·s + t) in x's dtype, (M, C)."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.addcmul(norm.shift, x, norm.scale, out=out).relu_()


def statistics(x):
    """Mean and biased variance of each column in float32 or better, (M, C) → 2 × (C,)."""
    # The running statistics that torch updates here are of no use but for their dtype, which the result takes.
    running = x.new_zeros(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.batch_norm_update_stats(x, *running, 0.0)


def relu_backward(da, x, norm):
    """dR = da·[a > 0], perhaps in place of da, and dγ = Σ dR·x̂, dβ = Σ dR (C,), from da and x (M, C)."""
    a = bn_relu(x, norm)
    d_relu = torch.ops.aten.threshold_backward(da, a, 0)
    return d_relu, *norm_gradients(d_relu, x, norm, a)


def relu_backward_add(da, x, norm, d):
    """Adds s·dR to d (M, C); returns a = relu(x·s + t), dγ and dβ (C,), from x and da, which may be lost, (M, C)."""
    a = bn_relu(x, norm)
    d_relu = torch.ops.aten.threshold_backward.grad_input(da, a, 0, grad_input=da)
    d.addcmul_(d_relu, norm.scale)
    return a, *norm_gradients(d_relu, x, norm, torch.empty_like(a))


def combine(d, x, u, v, w):
    """u·d + v·x + w, contiguous, from d and x (M, C) and three coefficients (C,)."""
    return torch.addcmul(torch.addcmul(w, x, v), d, u).to(x.dtype)


def norm_gradients(d_relu, x, norm, scratch):
    """dγ and dβ (C,) from dR and x (M, C); overwrites scratch (M, C)."""
    centred = torch.sub(x, norm.mean, out=scratch)
    return column_sums(centred.mul_(d_relu)) * norm.rstd, column_sums(d_relu)


def column_sums(x):
    """(M, C) → (C,), in float32 or better."""
    return x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32))


class BufferGradient:
    """The gradient of the buffer x (M, C0 + L·k) while it is being summed: D, and the deferred P and Q."""

    def __init__(self, d, x, mean):
        self.d, self.x, self.mean = d, x, mean
        self.p, self.q = torch.zeros_like(mean), torch.zeros_like(mean)

    def defer(self, norm, d_weight, d_bias):
        """Note what the batch's mean and variance contribute, to be applied when a column is complete."""
        if norm.batch:
            end = len(d_bias)
            self.p[:end] += norm.scale * d_bias / len(self.x)
            self.q[:end] += norm.scale * norm.rstd * d_weight / len(self.x)

    def complete(self, columns):
        """The gradient of columns to which nothing will be added any more, (M, columns)."""
        p, q, mean = self.p[columns], self.q[columns], self.mean[columns]
        d, x = self.d[:, columns], self.x[:, columns]
        return passes_for(x).combine(d, x, torch.ones_like(q), -q, q * mean - p)
