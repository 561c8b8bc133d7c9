"""The network as boxes and arrows: its operations, as torch.fx traces them, grouped; what make_graph.py draws.

The tensors have no data, and dense blocks run as the naive one.
"""

import re
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.fx import GraphModule, Tracer
from torch.fx.passes.shape_prop import ShapeProp

INPUT, CONCATENATION = "input", "concatenation"


@dataclass
class Op:
    """One operation of the network."""

    name: str
    text: str  # what it does: "Conv 3×3"
    path: str  # of the module that it belongs to: "blocks.0.layers.1.conv2"
    reads: list  # names of the operations whose output it reads
    shape: tuple  # of its output, without N: (C, H, W)

    @cached_property
    def part(self):
        """What the network is made of: image, stem, blocks.I, transitions.I, classifier."""
        found = re.match(r"image|stem|(blocks|transitions)\.\d+", self.path)
        return found[0] if found else "classifier"

    @cached_property
    def layer(self):
        """Index of the layer in its dense block, or None."""
        found = re.match(r"blocks\.\d+\.layers\.(\d+)", self.path)
        return int(found[1]) if found else None


class Parts(Tracer):
    """Sees the layers' parts, and those of transitions, as one operation each, whatever they are made of."""

    def is_leaf_module(self, module, path):
        part = re.match(r"(blocks\.\d+\.layers|transitions)\.\d+\.", path) and not isinstance(module, nn.Sequential)
        return bool(part) or super().is_leaf_module(module, path)


def trace(model, image_size):
    """The operations of ``model`` by name, in the order of the forward pass; without dropout of 0.

    What is no tensor, such as a size, or no activation, such as a weight that is used by itself, is left out.
    """
    traced = GraphModule(model, Parts().trace(model))
    ShapeProp(traced).propagate(example(model, image_size))
    ops, names = {}, {}
    for node in traced.graph.nodes:
        reads = [names[source] for source in node.all_input_nodes if source in names]
        if node.op == "get_attr":
            continue
        off = node.target is F.dropout and node.kwargs.get("p") == 0
        if node.op == "output" or off or not hasattr(node.meta.get("tensor_meta"), "shape"):
            names[node] = reads[0]
            continue
        names[node] = node.name
        scopes = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        path = "image" if node.op == "placeholder" else "".join(scopes[-1:])
        ops[node.name] = Op(node.name, describe(node, model), path, reads, tuple(node.meta["tensor_meta"].shape[1:]))
    return add_inputs(ops)


def add_inputs(ops):
    """Give every dense block an operation that stands for its input, which all of its layers read."""
    result = {}
    for op in ops.values():
        for i, name in enumerate(op.reads):
            if op.part.startswith("blocks") and ops[name].part != op.part:
                op.reads[i] = f"{op.part}.{INPUT}"
                result.setdefault(op.reads[i], Op(op.reads[i], INPUT, op.part, [name], ops[name].shape))
        result[op.name] = op
    return result


def example(model, image_size):
    """(2, C, H, W) without data; two images, since batch norm refuses a single value per channel."""
    return torch.empty(2, model.stem.conv.in_channels, image_size, image_size, device="meta")


def describe(node, model):
    """What a node of the trace does, in the paper's words where it has some."""
    if node.op == "call_module":
        module = model.get_submodule(node.target)
        if isinstance(module, nn.Conv2d):
            stride = f" stride {module.stride[0]}" if module.stride[0] > 1 else ""
            return f"Conv {module.kernel_size[0]}×{module.kernel_size[1]}{stride}"
        if isinstance(module, nn.MaxPool2d):
            return f"max pool {module.kernel_size}×{module.kernel_size} stride {module.stride}"
        name = type(module).__name__
        return {"BatchNorm2d": "BN", "Linear": "linear"}.get(name, name)
    function = node.target if isinstance(node.target, str) else node.target.__name__
    return {
        "relu": "ReLU",
        "cat": CONCATENATION,
        "dropout": f"dropout {node.kwargs.get('p')}",
        "avg_pool2d": "average pool 2×2",
        "adaptive_avg_pool2d": "global average pool",
    }.get(function, "image" if node.op == "placeholder" else function)


def features(op, ops):
    """Names of the operations whose output ``op`` reads; concatenations in its dense block stand for their parts.

    A block concatenates its concatenation so far with each layer's output: that is all outputs before (equation 2).
    """
    found, waiting = [], list(op.reads)
    while waiting:
        name = waiting.pop(0)
        if ops[name].text == CONCATENATION and ops[name].part == op.part:
            waiting = ops[name].reads + waiting
        else:
            found.append(name)
    return found


def group(ops, depth_limit, max_layers):
    """The boxes to draw: name → operations in it.

    A concatenation that only its own dense block reads gets no box. Of a block with more than ``max_layers`` layers,
    all between the first ones and the last share a box.
    """
    leaving = {name for op in ops.values() for name in op.reads if ops[name].part != op.part}
    counts = {part: len(layers_of(ops.values(), part)) for part in {op.part for op in ops.values()}}
    boxes = {}
    for op in ops.values():
        first, last = max_layers - 2, counts[op.part] - 2  # of the layers that share a box
        if depth_limit == 1 or (depth_limit == 2 and not op.part.startswith("blocks")):
            name = op.part
        elif op.layer is not None and counts[op.part] > max_layers and first <= op.layer <= last:
            name = f"{op.part}.layers.{first}-{last}"
        elif op.layer is not None and depth_limit == 2:
            name = f"{op.part}.layers.{op.layer}"
        elif op.text == CONCATENATION and op.name not in leaving:
            continue
        else:
            name = op.name
        boxes.setdefault(name, []).append(op)
    return boxes


def layers_of(ops, part):
    """Layer index → operations, of a dense block."""
    layers = {}
    for op in ops:
        if op.part == part and op.layer is not None:
            layers.setdefault(op.layer, []).append(op)
    return layers


def arrows(boxes, ops):
    """Pairs (box read, box that reads), each once."""
    box_of = {op.name: name for name, members in boxes.items() for op in members}
    pairs = {}  # a dict keeps the order
    for name, members in boxes.items():
        for op in members:
            for source in features(op, ops):
                if box_of[source] != name:
                    pairs[box_of[source], name] = None
    return list(pairs)


def part_title(part):
    kind, _, index = part.partition(".")
    kind = {"blocks": "dense block", "transitions": "transition"}.get(kind, kind)
    return f"{kind} {int(index) + 1}" if index else kind


def layer_title(layers):
    first, last = min(layers) + 1, max(layers) + 1
    return f"layer {first}" if first == last else f"layers {first} … {last}"


def size(shape):
    return "×".join(map(str, shape))


def compose(members):
    """Operations in a row in the paper's notation, a line per convolution, with the channels that it makes."""
    text = ""
    for op in members:
        if op.text.startswith("Conv"):
            text += f"{op.text} → {op.shape[0]}\n"
        elif op.text != "flatten":
            text += f"{op.text}-"
    return text.rstrip("-\n").split("\n")


def heading(part, layers):
    """Title and lines that say what a part is: of a dense block, how many layers of which operations."""
    if not layers:
        return part_title(part), []
    return f"{part_title(part)}: {len(layers)} layer{'s' * (len(layers) > 1)}", compose(layers[0])


def describe_box(name, members, ops):
    """Title and lines of a box: what is in it, and the sizes of what it reads and returns."""
    first, last = members[0], members[-1]
    if name == first.name or not first.reads:  # a single operation
        return first.text, [size(first.shape)]
    layers = layers_of(members, first.part)
    if first.layer is not None:
        reads = [ops[layer[0].reads[0]].shape[0] for layer in layers.values()]  # channels
        if len(reads) == 1:
            return layer_title(layers), [f"{reads[0]} → {last.shape[0]} channels"]
        return layer_title(layers), [f"{reads[0]} … {reads[-1]} → {last.shape[0]} channels each"]
    title, lines = heading(first.part, layers)
    return title, [*(lines or compose(members)), f"{size(ops[first.reads[0]].shape)} → {size(last.shape)}"]
