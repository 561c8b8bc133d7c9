"""Recognises the layers that the fused block can compute: those that densenet.py makes. Others run as written.

Every forward pass looks anew, since anything may have changed: 0.4 ms for 336 modules.
"""

from operator import itemgetter

import torch
import torch.nn as nn
from torch.nn.modules.module import _has_any_global_hook as has_hooks_everywhere

# (type, size of the kernel) of each part of a layer
SINGLE = {"norm1": (nn.BatchNorm2d, None), "relu1": (nn.ReLU, None), "conv1": (nn.Conv2d, 3)}
SECOND = {"norm2": (nn.BatchNorm2d, None), "relu2": (nn.ReLU, None), "conv2": (nn.Conv2d, 3)}
BOTTLENECK = SINGLE | {"conv1": (nn.Conv2d, 1)} | SECOND
BETWEEN = {"norm": (nn.BatchNorm2d, None), "relu": (nn.ReLU, None), "conv": (nn.Conv2d, 1)}  # the blocks
SETTINGS = ("stride", "dilation", "groups", "padding_mode", "padding")  # of a convolution
AS_MADE = {size: ((1, 1), (1, 1), 1, "zeros", (size // 2, size // 2)) for size in (1, 3)}
settings, statistics = itemgetter(*SETTINGS), itemgetter("running_mean", "running_var", "num_batches_tracked")


def watched(x, modules):
    """Why each module has to be called, or None: it has hooks, or x is being traced (torch.fx passes no tensor)."""
    if not isinstance(x, torch.Tensor) or torch.jit.is_tracing() or torch.compiler.is_exporting():
        return "it is traced or exported"
    hooks = has_hooks_everywhere() or any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules
    )
    return "it has hooks" if hooks else None


def parts(layers):
    """The layers and all modules in them. Many times as fast as ``modules()``: every step calls it."""
    for layer in layers:
        yield layer
        for module in layer._modules.values():
            yield from module.modules() if module._modules else (module,)


def unknown(layers, x):
    """Why the fused block cannot compute these layers on x (N, C, H, W), or None."""
    if reason := watched(x, parts(layers)) or (None if len(layers) else "no layers"):
        return reason
    expected = BOTTLENECK if "norm2" in layers[0]._modules else SINGLE
    channels, growth_rate = x.shape[1], None
    for layer in layers:
        if layer._modules.keys() != expected.keys():
            return f"a layer with other parts ({', '.join(sorted(layer._modules.keys() ^ expected.keys()))})"
        if layer.training and getattr(layer, "drop_rate", 0) > 0:
            return "dropout"
        width = channels
        for name, module in layer._modules.items():
            kind, size = expected[name]
            if reason := odd(module, kind, width, size):
                return f"{name} {reason}"
            width = module._parameters["weight"].shape[0] if size else width
        growth_rate = growth_rate or width
        if width != growth_rate:
            return f"layers that add {growth_rate} and {width} channels"
        channels += growth_rate
    return None


def unknown_between(x, modules):
    """The same for {name: module} between the blocks: batch norm, ReLU and, in a transition, the 1×1 convolution."""
    if reason := watched(x, modules.values()):
        return reason
    for name, module in modules.items():
        kind, size = BETWEEN[name]
        if reason := odd(module, kind, x.shape[1], size):
            return f"{name} {reason}"
    return None


def odd(module, kind, width, size=None):
    """How a module on ``width`` channels differs from densenet.py's, or None. ``size`` is a convolution's kernel's."""
    state = module.__dict__
    if type(module) is not kind:
        return f"is a {type(module).__name__}"
    if "forward" in state:
        return "has a forward of its own"
    if kind is nn.ReLU:
        return None
    weight, bias = map(state["_parameters"].get, ("weight", "bias"))
    if kind is nn.BatchNorm2d:
        mean, var, count = statistics(state["_buffers"])
        none = mean is var is count is None and not module.track_running_stats
        if not none and (mean is None or var is None or count is None):
            return "has not all of its running statistics"
        return None if weight is not None and bias is not None and weight.shape[0] == width else "has other parameters"
    if (found := settings(state)) != AS_MADE[size]:
        differing = zip(SETTINGS, found, AS_MADE[size], strict=True)
        return "has " + ", ".join(f"{name} {value}" for name, value, made in differing if value != made)
    if bias is not None or weight is None:
        return "has a bias" if weight is not None else "has no weight of its own"
    shape = weight.shape
    as_made = shape[1] == width and shape[2] == shape[3] == size
    return None if as_made else f"has a weight of shape {tuple(shape)}"
