"""The passes over memory of the fused dense block in plain torch: the reference for loops.py, and its substitute.

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


def relu_backward(da, x, norm, d=None, latest=None):
    """dR = da·[a > 0], dγ = Σ dR·x̂ and dβ = Σ dR (C,), from da, which may be lost, and x (M, C).

    With d (M, C), s·dR is added to it, and a = relu(x·s + t) is returned in place of dR; ``latest`` (2, M, k) gets the
    last k columns of d and x.
    """
    a = bn_relu(x, norm)
    d_relu = torch.ops.aten.threshold_backward.grad_input(da, a, 0, grad_input=da)
    centred = torch.sub(x, norm.mean, out=torch.empty_like(a))
    gradients = column_sums(centred.mul_(d_relu)) * norm.rstd, column_sums(d_relu)
    if d is None:
        return d_relu, *gradients
    d.addcmul_(d_relu, norm.scale)
    if latest is not None:
        latest.copy_(torch.stack((d[:, -latest.shape[2] :], x[:, -latest.shape[2] :])))
    return a, *gradients


def combine(d, x, u, v, w):
    """u·d + v·x + w, contiguous, from d and x (M, C) and three coefficients (C,)."""
    return torch.addcmul(torch.addcmul(w, x, v), d, u).to(x.dtype)


def column_sums(x):
    """(M, C) → (C,), in float32 or better."""
    return x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32))
