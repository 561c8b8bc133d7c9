"""The passes over memory of the fused dense block in plain torch: the reference for the module loops, and its stand-in.

x is a matrix of M pixels and C channels, norm a Norm of its columns.
"""

import torch


def bn_relu(x, norm):
    """relu(x·s + t) in x's dtype, (M, C)."""
    out, scale = torch.empty_like(x, memory_format=torch.contiguous_format), norm.scale
    return torch.addcmul(norm.bias - norm.mean * scale, x, scale, out=out).relu_()


def statistics(x):
    """Mean and biased variance of each column in float32 or better, (M, C) → (2, C)."""
    # The running statistics that torch updates here are of no use but for their dtype, which the result takes.
    running = x.new_zeros(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.stack(torch.batch_norm_update_stats(x.contiguous(), *running, 0.0))


def relu_backward(da, x, norm):
    """dR = da·[a > 0], perhaps in place of da, and dγ = Σ dR·x̂, dβ = Σ dR (C,), from da and x (M, C)."""
    a = bn_relu(x, norm)
    d_relu = torch.ops.aten.threshold_backward(da, a, 0)
    return d_relu, *norm_gradients(d_relu, x, norm, a)


def relu_backward_add(da, x, norm, d, latest=None):
    """Adds s·dR to d (M, C); returns a = relu(x·s + t), dγ and dβ (C,), from x and da, which may be lost, (M, C).

    ``latest`` (2, M, k) gets the last k columns of d and x.
    """
    a = bn_relu(x, norm)
    d_relu = torch.ops.aten.threshold_backward.grad_input(da, a, 0, grad_input=da)
    d.addcmul_(d_relu, norm.scale)
    if latest is not None:
        latest.copy_(torch.stack((d[:, -latest.shape[2] :], x[:, -latest.shape[2] :])))
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
