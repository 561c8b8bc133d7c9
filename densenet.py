"""DenseNet and DenseNet-BC (Huang, Liu, van der Maaten and Weinberger, arXiv 1608.06993).

    from densenet import DenseNet, densenet121
    model = DenseNet(depth=100, growth_rate=12)       # the paper's DenseNet-BC for CIFAR, 769,162 parameters
    logits = model(torch.randn(64, 3, 32, 32))        # (64, 10)
"""

import contextlib
import functools
import re
import sys
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fused
from fused import compare, known

# Table 2 (CIFAR, SVHN) and Table 1 (ImageNet) of the paper, and the wide networks that its authors recommend
# (github.com/liuzhuang13/DenseNet), as arguments of DenseNet.
ARCHITECTURES = {
    "densenet_40_12": dict(depth=40, growth_rate=12, bottleneck=False, reduction=1.0),
    "densenet_100_12": dict(depth=100, growth_rate=12, bottleneck=False, reduction=1.0),
    "densenet_100_24": dict(depth=100, growth_rate=24, bottleneck=False, reduction=1.0),
    "densenet_bc_100_12": dict(depth=100, growth_rate=12, bottleneck=True, reduction=0.5),
    "densenet_bc_250_24": dict(depth=250, growth_rate=24, bottleneck=True, reduction=0.5),
    "densenet_bc_190_40": dict(depth=190, growth_rate=40, bottleneck=True, reduction=0.5),
    **{f"densenet_bc_40_{k}": dict(depth=40, growth_rate=k, bottleneck=True, reduction=0.5) for k in (36, 48, 60)},
    **{
        name: dict(block_config=layers, growth_rate=k, bottleneck=True, reduction=0.5, stem="imagenet")
        for name, layers, k in (
            ("densenet121", (6, 12, 24, 16), 32),
            ("densenet169", (6, 12, 32, 32), 32),
            ("densenet201", (6, 12, 48, 32), 32),
            ("densenet161", (6, 12, 36, 24), 48),
        )
    },
}


class Layer(nn.Module):
    """A layer of a dense block, in two parts: block "checkpoint" computes the first one, whose input is wide, twice."""

    def forward(self, x):
        return self.after_conv1(self.up_to_conv1(x))

    def up_to_conv1(self, x):
        # ReLU is not in place: a hook on norm1 must see what norm1 returned.
        return self.conv1(self.relu1(self.norm1(x)))


class SingleLayer(Layer):
    """BN-ReLU-Conv3×3: (N, C, H, W) → (N, k, H, W) (section 3, "composite function")."""

    def __init__(self, in_channels, growth_rate, drop_rate):
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(in_channels), nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, growth_rate, 3, padding=1, bias=False)
        self.drop_rate = drop_rate

    def after_conv1(self, x):
        return F.dropout(x, self.drop_rate, self.training)


class BottleneckLayer(Layer):
    """BN-ReLU-Conv1×1 to 4k channels, BN-ReLU-Conv3×3: (N, C, H, W) → (N, k, H, W) (section 3, "bottleneck layers")."""

    def __init__(self, in_channels, growth_rate, drop_rate):
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(in_channels), nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, 4 * growth_rate, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(4 * growth_rate), nn.ReLU()
        self.conv2 = nn.Conv2d(4 * growth_rate, growth_rate, 3, padding=1, bias=False)
        self.drop_rate = drop_rate

    def after_conv1(self, x):
        x = F.dropout(x, self.drop_rate, self.training)
        x = self.conv2(self.relu2(self.norm2(x)))
        return F.dropout(x, self.drop_rate, self.training)


def naive_block(layers, x):
    """Concatenate after every layer; autograd keeps every copy, so memory grows with the square of the depth."""
    for layer in layers:
        x = torch.cat((x, layer(x)), 1)
    return x


def checkpoint_block(layers, x):
    """Keep each layer's output once; concatenate, normalise, rectify and convolve anew in the backward pass.

    Memory grows linearly with depth. The recomputed part is the one whose input is wide, up to the first convolution.
    Parameters that torch.func.functional_call lends must still be there in the backward pass, which reads them again.
    """
    outputs = [x]
    for layer in layers:

        def recomputed(*outputs, layer=layer):
            return layer.up_to_conv1(torch.cat(outputs, 1))

        # Under torch.compile the recomputation happens within the graph, where batch norm updates its statistics once.
        keep = {} if torch.compiler.is_compiling() else {"context_fn": lambda layer=layer: keep_statistics(layer)}
        x = checkpoint(recomputed, *outputs, use_reentrant=False, preserve_rng_state=False, **keep)
        outputs.append(layer.after_conv1(x))
    return torch.cat(outputs, 1)


def keep_statistics(layer):
    """Contexts for a forward pass and for its recomputations: only the first is to count in the running statistics."""
    return contextlib.nullcontext(), KeptStatistics(layer)


class KeptStatistics:
    """A context in which batch norms of ``layer`` update copies of their running statistics, which are thrown away.

    Without it, recomputation would update them a second time in every step. Each backward pass through the graph
    enters it anew. norm2 is not recomputed, so it is left alone.
    """

    def __init__(self, layer):
        self.layer = layer

    def __enter__(self):
        modules = (m for m in known.parts([self.layer]) if m._buffers and m is not self.layer._modules.get("norm2"))
        self.statistics = [(m, name, value) for m in modules for name, value in m._buffers.items() if value is not None]
        for module, name, value in self.statistics:
            setattr(module, name, value.clone())

    def __exit__(self, *_):
        for module, name, value in self.statistics:
            setattr(module, name, value)


def unknown_to_checkpoint(layers, x):
    """Why layers cannot be computed in two parts, one of them twice, in words, or None."""
    for layer in layers:
        if type(layer).forward is not Layer.forward or "forward" in vars(layer):
            return f"a {type(layer).__name__} with a forward of its own"
        if any("parametrizations" in module._modules for module in known.parts([layer])):
            return "a parametrised weight, which changes whenever it is read"
    return known.watched(x, known.parts(layers))


METHODS = ("forward", "up_to_conv1", "after_conv1")
MADE_HERE = {kind: [getattr(kind, name) for name in METHODS] for kind in (SingleLayer, BottleneckLayer)}


def unknown_to_fused(layers, x):
    """Why the fused block would not compute what layers do, in words, or None."""
    for layer in layers:
        kind = type(layer)
        if kind is not type(layers[0]) or MADE_HERE.get(kind) != [getattr(kind, name, None) for name in METHODS]:
            return f"a {kind.__name__} that fused was not made for"
        if not vars(layer).keys().isdisjoint(METHODS):
            return f"a {kind.__name__} with methods of its own"
    return known.unknown(layers, x)


# The ways to run a dense block, (N, C, H, W) → (N, C + L·k, H, W). All compute the same function of the same
# parameters, so a state_dict trained with one loads into a model that uses another. A block that does not call the
# layers as they are has a function in UNKNOWN: it says for which layers or x naive has to run instead.
BLOCKS = {"naive": naive_block, "checkpoint": checkpoint_block, "fused": fused.dense_block}
UNKNOWN = {"checkpoint": unknown_to_checkpoint, "fused": unknown_to_fused}


class DenseBlock(nn.Module):
    """L layers, each reading the block's input (N, in_channels, H, W) and the outputs of all before it (equation 2)."""

    def __init__(self, layers, in_channels, block):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.in_channels, self.block = in_channels, block

    def forward(self, x):
        naive = as_naive("dense block", self.block, self.unknown(x))
        return BLOCKS["naive" if naive else self.block](self.layers, x)

    def unknown(self, x):
        """Why the layers have to be run as naive for x, in words, or None."""
        return UNKNOWN[self.block](self.layers, x) if self.block in UNKNOWN else None

    def extra_repr(self):
        return f"block={self.block!r}"


def as_naive(what, block, reason):
    """True if there is a reason to run something as naive, which is printed once."""
    if reason and not torch.compiler.is_dynamo_compiling():  # which does not print
        print_once(f"{what}: {reason}: runs as block 'naive', not {block!r}")
    return bool(reason)


@functools.cache
def print_once(line):
    print(line, file=sys.stderr)


def differing_blocks(model, block):
    """The dense blocks and transitions that compute something else as ``block`` than their code says: {name: why}."""
    return compare.differing(model, (DenseBlock, Transition), block)


class Transition(nn.Module):
    """BN-ReLU-Conv1×1 and 2×2 average pooling: (N, C, H, W) → (N, out_channels, H/2, W/2) (section 3)."""

    def __init__(self, in_channels, out_channels, drop_rate, block):
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(in_channels), nn.ReLU()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.drop_rate = drop_rate
        self.in_channels, self.block = in_channels, block

    def forward(self, x):
        dropped = self.training and self.drop_rate > 0
        if self.block == "fused" and not dropped and known_between(x, norm=self.norm, relu=self.relu, conv=self.conv):
            # A mean over pixels and a sum over channels commute: the convolution is left a quarter of the pixels.
            return self.conv(fused.norm_relu(self.norm, self.relu, x, pool=True))
        x = self.conv(self.relu(self.norm(x)))
        return F.avg_pool2d(F.dropout(x, self.drop_rate, self.training), 2)


def known_between(x, **modules):
    """True if fused knows these modules between dense blocks. Otherwise prints once that they run as naive."""
    return not as_naive("between dense blocks", "fused", known.unknown_between(x, modules))


def make_stem(kind, in_channels, out_channels):
    """The layers before the first dense block: (N, C, H, W) → (N, out_channels, H, W), or H/4, W/4 for ImageNet."""
    if kind == "cifar":
        return nn.Sequential(OrderedDict(conv=nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)))
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(in_channels, out_channels, 7, stride=2, padding=3, bias=False),
            norm=nn.BatchNorm2d(out_channels),
            relu=nn.ReLU(),
            pool=nn.MaxPool2d(3, stride=2, padding=1),
        )
    )


def layers_per_block(depth, bottleneck):
    """Layers in each of the three dense blocks of a CIFAR network, from its depth (section 4.2).

    Raises ValueError, which names the nearest valid depths, if the depth does not divide.
    """
    step = 6 if bottleneck else 3  # 3 blocks of layers with 2 convolutions or 1; 4 = stem, 2 transitions, classifier
    layers, rest = divmod(depth - 4, step)
    if layers >= 1 and rest == 0:
        return layers
    below = 4 + step * max(1, layers)
    names = f"{below}" if layers < 1 else f"{below} or {below + step}"
    kind = "network with bottlenecks" if bottleneck else "network without bottlenecks"
    raise ValueError(f"depth {depth}: a {kind} needs depth = {step}n + 4, such as {names}")


class DenseNet(nn.Module):
    """DenseNet and DenseNet-BC: float images (N, in_channels, H, W) → logits (N, num_classes), H and W at least 4.

    Args:
        depth: layers with weights, 6n + 4 with bottlenecks, 3n + 4 without.
        growth_rate: k, channels that each layer adds.
        reduction: θ in (0, 1], the share of its channels that a transition keeps.
        bottleneck: a 1×1 convolution to 4k channels before each 3×3 one.
        num_classes: length of the logits.
        drop_rate: dropout in [0, 1) after every convolution but the first.
        init_channels: channels of the stem; by default 2k with bottlenecks, else 16 (section 4.2).
        block: how dense blocks run, a key of ``BLOCKS``; it changes memory and time, not the function.
        block_config: layers of each block, in place of ``depth``: (6, 12, 24, 16) is DenseNet-121.
        in_channels: channels of the images, such as 3, or 1 for grey.
        stem: "cifar", a 3×3 convolution, or "imagenet", 7×7 with stride 2 and max-pooling (H and W at least 32).

    Raises ValueError if an argument is out of range.
    """

    def __init__(
        self,
        depth=100,
        growth_rate=12,
        reduction=0.5,
        bottleneck=True,
        num_classes=10,
        drop_rate=0.0,
        init_channels=None,
        block="naive",
        *,
        block_config=None,
        in_channels=3,
        stem="cifar",
    ):
        super().__init__()
        if block_config is None:
            block_config = [layers_per_block(depth, bottleneck)] * 3
        if init_channels is None:
            init_channels = 2 * growth_rate if bottleneck else 16
        check(growth_rate >= 1, f"growth rate {growth_rate}: needs at least 1")
        check(0 < reduction <= 1, f"reduction {reduction}: needs a number in (0, 1], such as 0.5")
        check(0 <= drop_rate < 1, f"drop rate {drop_rate}: needs a number in [0, 1), such as 0.2")
        check(in_channels >= 1, f"{in_channels} input channels: needs at least 1")
        check(init_channels >= 1, f"initial channels {init_channels}: needs at least 1")
        check(num_classes >= 1, f"{num_classes} classes: needs at least 1")
        check(block in BLOCKS, f"block {block!r}: choose one of {', '.join(BLOCKS)}")
        check(stem in ("cifar", "imagenet"), f"stem {stem!r}: choose cifar or imagenet")

        make_layer = BottleneckLayer if bottleneck else SingleLayer
        channels = init_channels
        self.stem = make_stem(stem, in_channels, channels)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for i, num_layers in enumerate(block_config):
            if i > 0:
                kept = int(channels * reduction)
                check(kept >= 1, f"reduction {reduction}: leaves a transition without channels, try 0.5")
                self.transitions.append(Transition(channels, kept, drop_rate, block))
                channels = kept
            layers = [make_layer(channels + j * growth_rate, growth_rate, drop_rate) for j in range(num_layers)]
            self.blocks.append(DenseBlock(layers, channels, block))
            channels += num_layers * growth_rate
        self.norm, self.relu, self.block = nn.BatchNorm2d(channels), nn.ReLU(), block
        self.classifier = nn.Linear(channels, num_classes)
        self.apply(init_weights)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.forward_features(x), 1)
        return self.classifier(x.flatten(1))

    def forward_features(self, x):
        """What is pooled for the classifier, after the last norm and ReLU: (N, in_channels, H, W) → (N, C, H', W')."""
        first, *rest = self.blocks
        x = first(self.stem(x))
        for transition, block in zip(self.transitions, rest, strict=True):
            x = block(transition(x))
        if self.block == "fused" and known_between(x, norm=self.norm, relu=self.relu):
            return fused.norm_relu(self.norm, self.relu, x)
        return self.relu(self.norm(x))

    def set_block(self, block):
        """Let dense blocks, and what is between them, run as another key of ``BLOCKS`` from now on."""
        for module in (self, *self.blocks, *self.transitions):
            module.block = block

    def reset_classifier(self, num_classes):
        """Start with a fresh classifier; for 0 classes without one: the network then returns its features, (N, C)."""
        (channels,), like = self.norm.weight.shape, dict(device=self.norm.weight.device, dtype=self.norm.weight.dtype)
        self.classifier = nn.Linear(channels, num_classes, **like) if num_classes else nn.Identity()
        init_weights(self.classifier)

    def load_torchvision(self, state_dict):
        """Load weights in torchvision's names, those of its early releases ("norm.1") included.

        Raises RuntimeError, as load_state_dict does, if names or shapes do not fit.
        """
        self.load_state_dict({rename(key, FROM_TORCHVISION): value for key, value in state_dict.items()})

    def torchvision_state_dict(self):
        """The weights in torchvision's names: what ``torchvision.models.densenet121().load_state_dict`` takes."""
        return {rename(key, TO_TORCHVISION): value for key, value in self.state_dict().items()}


def check(condition, message):
    if not condition:
        raise ValueError(message)


def init_weights(module):
    """Convolutions N(0, sqrt(2 / (k·k·out))), batch norm 1 and 0, classifier bias 0, as in the paper's Lua code."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


# (pattern, replacement) pairs; a number in angle brackets is shifted by the given offset, since torchvision counts
# blocks and layers from 1.
FROM_TORCHVISION = (
    (r"^module\.", ""),  # of DistributedDataParallel
    (r"^features\.(conv|norm)0\.", r"stem.\1."),
    (r"^features\.denseblock(\d+)\.denselayer(\d+)\.(norm|conv)\.?(\d)\.", r"blocks.<\1-1>.layers.<\2-1>.\3\4."),
    (r"^features\.transition(\d+)\.", r"transitions.<\1-1>."),
    (r"^features\.norm5\.", r"norm."),
)
TO_TORCHVISION = (
    (r"^stem\.(conv|norm)\.", r"features.\g<1>0."),
    (r"^blocks\.(\d+)\.layers\.(\d+)\.", r"features.denseblock<\1+1>.denselayer<\2+1>."),
    (r"^transitions\.(\d+)\.", r"features.transition<\1+1>."),
    (r"^norm\.", r"features.norm5."),
)


def rename(key, rules):
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return re.sub(r"<(\d+)([+-]1)>", lambda match: str(int(match[1]) + int(match[2])), key)


# Networks for 224×224 images and 1000 classes; they take the arguments of DenseNet.
densenet121, densenet169, densenet201, densenet161 = (
    functools.partial(DenseNet, **ARCHITECTURES[f"densenet{depth}"], num_classes=1000) for depth in (121, 169, 201, 161)
)
