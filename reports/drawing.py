"""The network as boxes and arrows: its operations, as torch.fx traces them, grouped; what make_graph.py draws.

The tensors have no data, and dense blocks run as the naive one: the others compute the same function.
"""

import itertools
import re
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn as nn
from torch.fx import symbolic_trace
from torch.fx.passes.shape_prop import ShapeProp

from common.console import Mistake
from common.files import written_whole

INPUT, CONCATENATION = "input", "concatenation"
SHOWN = 4  # layers of a dense block that get boxes of their own
FORMATS = ("svg", "png", "pdf", "dot")
FONT = "Helvetica,Arial,sans-serif"
RANKDIR = {"down": "TB", "right": "LR"}
SIDES = {"down": "we", "right": "sn"}  # compass points to the left and right of the way
GREY, LINE = "#EDEDED", "#555555"
FILLS = {"image": "#FFFFFF", "stem": "#FFF3CF", "transitions": "#FFF3CF", "classifier": "#FFF3CF"}
# Tints and full tones after Okabe and Ito's colours, which colour-blind readers can tell apart. A layer's box and the
# arrows that leave it have one colour.
LAYER_COLORS = (("#D6E8F5", "#0072B2"), ("#FBE0CF", "#D55E00"), ("#D3EFE4", "#009E73"), ("#F6E1EC", "#B04A87"))


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


def trace(model, image_size):
    """The operations of ``model`` by name, in the order of the forward pass; without dropout of 0."""
    traced = symbolic_trace(model)
    ShapeProp(traced).propagate(example(model, image_size))
    ops, names = {}, {}
    for node in traced.graph.nodes:
        reads = [names[source] for source in node.all_input_nodes]
        if node.op == "output" or (node.name.startswith("dropout") and node.kwargs["p"] == 0):
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
        return {"BatchNorm2d": "BN", "ReLU": "ReLU", "Linear": "linear"}[type(module).__name__]
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


def group(ops):
    """The boxes to draw: name → operations in it. Layers of dense blocks have boxes, and whole other parts.

    A concatenation that only its own dense block reads gets no box. Of a block with more than SHOWN layers, all between
    the first ones and the last share a box.
    """
    leaving = {name for op in ops.values() for name in op.reads if ops[name].part != op.part}
    counts = {part: len(layers_of(ops.values(), part)) for part in {op.part for op in ops.values()}}
    boxes = {}
    for op in ops.values():
        first, last = SHOWN - 2, counts[op.part] - 2  # of the layers that share a box
        if not op.part.startswith("blocks"):
            name = op.part
        elif op.layer is None:
            name = op.name
        elif counts[op.part] > SHOWN and first <= op.layer <= last:
            name = f"{op.part}.layers.{first}-{last}"
        else:
            name = f"{op.part}.layers.{op.layer}"
        if op.layer is not None or op.text != CONCATENATION or op.name in leaving:
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


def part_title(part):
    kind, _, index = part.partition(".")
    kind = {"blocks": "dense block", "transitions": "transition"}.get(kind, kind)
    return f"{kind} {int(index) + 1}" if index else kind


def describe_box(name, members, ops):
    """Title and lines of a box: what is in it, and the sizes of what it reads and returns."""
    first, last = members[0], members[-1]
    if name == first.name or not first.reads:  # a single operation
        return first.text, [size(first.shape)]
    if first.layer is None:
        lines = [*compose(members), f"{size(ops[first.reads[0]].shape)} → {size(last.shape)}"]
        return part_title(first.part), lines
    inputs = [ops[layer[0].reads[0]].shape[0] for layer in layers_of(members, first.part).values()]  # channels
    if first.layer == last.layer:
        return f"layer {first.layer + 1}", [f"{inputs[0]} → {last.shape[0]} channels"]
    title = f"layers {first.layer + 1} … {last.layer + 1}"
    return title, [f"{inputs[0]} … {inputs[-1]} → {last.shape[0]} channels each"]


def html(title, lines, align="center"):
    """A label of Graphviz: the title bold, the lines below smaller."""
    end = f'<br align="{align}"/>'
    return f"<<b>{title}</b>{end}" + "".join(f'<font point-size="11">{line}</font>{end}' for line in lines) + ">"


def new_graph(name, direction):
    try:
        import graphviz
    except ImportError as error:
        raise Mistake("the Python package graphviz is missing: pip install graphviz") from error
    graph = graphviz.Digraph(name)
    graph.attr(rankdir=RANKDIR[direction], bgcolor="white", fontname=FONT, nodesep="0.3", ranksep="0.24")
    graph.attr("node", shape="box", style="filled,rounded", fontname=FONT, fontsize="13", margin="0.15,0.05")
    graph.attr("edge", color=LINE, penwidth="1.3", arrowsize="0.7")
    return graph


def model_graph(model, image_size, part, direction):
    """The graph of the network, or of one part of it and what that reads, as a graphviz.Digraph."""
    ops = trace(model, image_size)
    _, *parts = dict.fromkeys(op.part for op in ops.values())  # the first is the image
    if part not in (None, *parts):
        raise Mistake(f"part {part!r}: choose one of {', '.join(parts)}")
    boxes = group(ops)
    pairs = [(tail, head) for tail, head in arrows(boxes, ops) if part in (None, boxes[head][0].part)]
    shown = {name for pair in pairs for name in pair}
    boxes = {name: members for name, members in boxes.items() if name in shown}
    graph, colors = new_graph("model", direction), {}
    for current in dict.fromkeys(members[0].part for members in boxes.values()):
        inside = {name: members for name, members in boxes.items() if members[0].part == current}
        if not current.startswith("blocks"):
            colors |= add_boxes(graph, inside, ops)
            continue
        with graph.subgraph(name=f"cluster_{current}") as frame:
            layers = layers_of(ops.values(), current)
            title = f"{part_title(current)}: {len(layers)} layer{'s' if len(layers) > 1 else ''}"
            label = html(title, compose(layers[0]), align="left")
            frame.attr(label=label, labeljust="l", fontsize="13", margin="20")
            frame.attr(style="rounded,filled", fillcolor="#F7F7F7", color="#BBBBBB")
            colors |= add_boxes(frame, inside, ops)
    add_arrows(graph, boxes, pairs, colors, SIDES[direction])
    return graph


def add_boxes(graph, boxes, ops):
    """Add the boxes of a part. Returns the colour of each, which the arrows that leave it have, too."""
    colors, turns = {}, itertools.cycle(LAYER_COLORS)
    for name in sorted(boxes, key=lambda name: boxes[name][0].layer is not None):
        first, last = boxes[name][0], boxes[name][-1]
        fill, colors[name] = FILLS.get(first.part.partition(".")[0], GREY), LINE
        if first.layer is not None and first.layer == last.layer:  # layers that share a box are grey
            fill, colors[name] = next(turns)
        label = html(*describe_box(name, boxes[name], ops))
        graph.node(name, label, fillcolor=fill, color=colors[name], group="row")  # dot keeps a group in a straight row
    return colors


def add_arrows(graph, boxes, pairs, colors, sides):
    """Add the arrows: to the next box straight; others around the boxes between, on one side per box they leave.

    What follows an opened dense block stands beside its end: stairs are less long than one row.
    """
    order = {name: i for i, name in enumerate(boxes)}
    for tail, head in pairs:
        source, reader = boxes[tail][0], boxes[head][0]
        style = {"color": LINE if (source.part, source.layer) == (reader.part, reader.layer) else colors[tail]}
        if reader.part.startswith("transitions") and tail != source.part != reader.part:
            style["minlen"] = "0"
        elif order[head] - order[tail] == 1:
            style["weight"] = "20"
        else:
            side = sides[(order[tail] - order[f"{source.part}.{INPUT}"]) % 2]
            style |= {"tailport": side, "headport": side}
        graph.edge(tail, head, **style)


def autograd_graph(model, image_size, direction):
    """The graph of the backward functions and of the parameters that get gradients, as a graphviz.Digraph.

    Arrows go the way of the forward pass, as in bamos/densenet.pytorch.
    """
    graph = new_graph("autograd", direction)
    logits = model(example(model, image_size))
    parameters = {id(value): name for name, value in model.named_parameters()}
    names, waiting = {logits.grad_fn: "0"}, [logits.grad_fn]
    while waiting:  # no recursion: deep networks would pass Python's limit
        function = waiting.pop()
        if hasattr(function, "variable"):  # AccumulateGrad, which ends at a parameter
            lines = [size(function.variable.shape)]
            graph.node(names[function], html(parameters[id(function.variable)], lines), fillcolor=LAYER_COLORS[0][0])
        else:
            graph.node(names[function], html(function.name(), []), fillcolor=GREY, group="row")
        for source, _ in function.next_functions:
            if source is None:  # the images need no gradient
                continue
            if source not in names:
                names[source] = str(len(names))
                waiting.append(source)
            graph.edge(names[source], names[function])
    return graph


def save(graph, path):
    """Write the graph in the format of the path's suffix, in one step. Returns the path written.

    Without the program dot that is a .dot file beside it.
    """
    import graphviz

    kind = path.suffix[1:]
    if kind == "png":
        graph.attr(dpi="108")  # finer than the 96 of screens: stays sharp when a page scales it
    try:
        content = graph.source.encode() if kind == "dot" else graph.pipe(format=kind, quiet=True)
    except graphviz.ExecutableNotFound:
        path, content = path.with_suffix(".dot"), graph.source.encode()
    except graphviz.CalledProcessError as error:
        reason = (error.stderr or b"").decode(errors="replace").strip().partition("\n")[0]
        raise Mistake(f"dot cannot draw {path} ({reason or error}): try --out {path.with_suffix('.dot')}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        file.write(content)
    return path
