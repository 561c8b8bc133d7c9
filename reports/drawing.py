"""The network as boxes and arrows: groups of the operations that torch.fx traces. make_graph.py draws it.

The tensors have no data. Dense blocks run as the naive one; the others compute the same function.
"""

import itertools
import re
from typing import NamedTuple

import graphviz
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.fx import GraphModule, Tracer
from torch.fx.passes.shape_prop import ShapeProp

from common.console import Mistake, counted
from common.files import written_whole

INPUT, CONCATENATION = "input", "concatenation"
SHOWN = 4  # boxes for the layers of a dense block, at most
FORMATS = ("svg", "png", "pdf", "dot")
FONT = "Helvetica,Arial,sans-serif"
SIDES = {"down": "we", "right": "sn"}  # compass points to the left and right of the direction
GREY, LINE = "#EDEDED", "#555555"
FILLS = {"image": "#FFFFFF", "stem": "#FFF3CF", "transitions": "#FFF3CF", "classifier": "#FFF3CF"}
# Of a layer's box and of the arrows that leave it, after Okabe and Ito's colours, which colour-blind readers can tell
# apart.
LAYER_COLORS = (("#D6E8F5", "#0072B2"), ("#FBE0CF", "#D55E00"), ("#D3EFE4", "#009E73"), ("#F6E1EC", "#B04A87"))


class Parts(Tracer):
    """Traces each part of a layer or a transition as one operation, whatever it is made of."""

    def is_leaf_module(self, module, path):
        part = re.match(r"(blocks\.\d+\.layers|transitions)\.\d+\.", path) and not isinstance(module, nn.Sequential)
        return bool(part) or super().is_leaf_module(module, path)


class Op(NamedTuple):
    """One operation of the network."""

    text: str  # "Conv 3×3"
    part: str  # image, stem, blocks.I, transitions.I or classifier
    layer: int | None  # index in the dense block
    reads: tuple  # shape of its input without N: (C, H, W)
    shape: tuple  # of its output


def trace(model, image_size):
    """The boxes to draw, {name: its operations}, and the arrows, {(from box, to box): None}, in forward order.

    A box is a layer of a dense block, or a whole part outside of them. Layers read a concatenation of all outputs
    before them (equation 2): the arrows to a layer come from these outputs. A block's input has a box, and so has a
    concatenation that other parts read.
    """
    traced = GraphModule(model, Parts().trace(model))
    ShapeProp(traced).propagate(example(model, image_size))
    boxes, arrows = {}, {}
    drawn = {}  # node → the node to draw for it: not dropout of 0, nor what is no tensor, such as a size
    places, held = {}, {}  # node → its part and layer; node → the boxes whose outputs it holds
    for node in traced.graph.nodes:
        if node.op == "get_attr":  # a weight
            continue
        sources = [drawn[source] for source in node.all_input_nodes if source in drawn]
        off = node.target is F.dropout and node.kwargs.get("p") == 0
        if node.op == "output" or off or not hasattr(node.meta.get("tensor_meta"), "shape"):
            drawn[node] = sources[0]
            continue
        drawn[node] = node
        part, layer = places[node] = place_of(node)
        text, reads = describe(node, model), []
        for source in sources:
            other, shape = places[source][0], shape_of(source)
            if part != other and part.startswith("blocks"):
                name, op = f"{part}.{INPUT}", Op(INPUT, part, None, shape, shape)
            elif part != other and other.startswith("blocks"):
                name, op = source.name, Op(CONCATENATION, other, None, shape, shape)
            else:
                reads += held[source]
                continue
            boxes.setdefault(name, [op])
            arrows |= dict.fromkeys((tail, name) for tail in held[source])
            reads.append(name)
        if text == CONCATENATION and part.startswith("blocks"):
            held[node] = list(dict.fromkeys(reads))
            continue
        if layer is not None:
            name = layer_box(part, layer, len(model.get_submodule(part).layers))
        else:
            name = node.name if part.startswith("blocks") else part
        arrows |= dict.fromkeys((tail, name) for tail in reads if tail != name)
        boxes.setdefault(name, []).append(Op(text, part, layer, shape_of((*sources, node)[0]), shape_of(node)))
        held[node] = [name]
    return boxes, arrows


def place_of(node):
    """The part of the network that a node belongs to, and the index of its layer in a dense block, or None."""
    modules = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    path = "image" if node.op == "placeholder" else modules[-1] if modules else ""
    match = re.match(r"(image|stem|(?:blocks|transitions)\.\d+)(?:\.layers\.(\d+))?", path)
    part, layer = match.groups() if match else ("classifier", None)
    return part, layer and int(layer)


def layer_box(part, layer, count):
    """The name of a layer's box. If there are more layers than SHOWN, all but the first ones and the last share one."""
    first, last = SHOWN - 2, count - 2
    shared = count > SHOWN and first <= layer <= last
    return f"{part}.layers.{first}-{last}" if shared else f"{part}.layers.{layer}"


def shape_of(node):
    return tuple(node.meta["tensor_meta"].shape[1:])


def example(model, image_size):
    """(2, C, H, W) without data. Batch norm refuses one image if there is one value per channel."""
    return torch.empty(2, model.stem.conv.in_channels, image_size, image_size, device="meta")


def describe(node, model):
    """The operation of a traced node, in the paper's words if there are any."""
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


def size(shape):
    return "×".join(map(str, shape))


def compose(members):
    """Successive operations in the paper's notation: a line per convolution, with its output channels."""
    text = ""
    for op in members:
        if op.text.startswith("Conv"):
            text += f"{op.text} → {op.shape[0]}\n"
        elif op.text != "flatten":
            text += f"{op.text}-"
    return text.rstrip("-\n").split("\n")


def part_title(part):
    name, _, index = part.partition(".")
    name = {"blocks": "dense block", "transitions": "transition"}.get(name, name)
    return f"{name} {int(index) + 1}" if index else name


def describe_box(members):
    """Title and lines of a box: its operations, and the sizes of its input and output."""
    first, last = members[0], members[-1]
    if first.layer is None and first.part.startswith(("image", "blocks")):  # a single operation
        return first.text, [size(first.shape)]
    if first.layer is None:
        return part_title(first.part), [*compose(members), f"{size(first.reads)} → {size(last.shape)}"]
    if first.layer == last.layer:
        return f"layer {first.layer + 1}", [f"{first.reads[0]} → {last.shape[0]} channels"]
    of_last = next(op for op in members if op.layer == last.layer)
    title = f"layers {first.layer + 1} … {last.layer + 1}"
    return title, [f"{first.reads[0]} … {of_last.reads[0]} → {last.shape[0]} channels each"]


def html(title, lines, align="center"):
    """A label for Graphviz: a bold title, and smaller lines below."""
    end = f'<br align="{align}"/>'
    return f"<<b>{title}</b>{end}" + "".join(f'<font point-size="11">{line}</font>{end}' for line in lines) + ">"


def model_graph(model, image_size, part, direction):
    """The network, or one ``part`` and what it reads, as a graphviz.Digraph."""
    boxes, arrows = trace(model, image_size)
    _, *parts = dict.fromkeys(members[0].part for members in boxes.values())  # the first is the image
    if part not in (None, *parts):
        raise Mistake(f"part {part!r}: choose one of {', '.join(parts)}")
    arrows = [(tail, head) for tail, head in arrows if part in (None, boxes[head][0].part)]
    shown = {name for arrow in arrows for name in arrow}
    drawn = {name: members for name, members in boxes.items() if name in shown}
    graph, colors = graphviz.Digraph("model"), {}
    rankdir = "TB" if direction == "down" else "LR"
    graph.attr(rankdir=rankdir, bgcolor="white", fontname=FONT, nodesep="0.3", ranksep="0.24")
    graph.attr("node", shape="box", style="filled,rounded", fontname=FONT, fontsize="13", margin="0.15,0.05")
    graph.attr("edge", color=LINE, penwidth="1.3", arrowsize="0.7")
    for current in dict.fromkeys(members[0].part for members in drawn.values()):
        inside = {name: members for name, members in drawn.items() if members[0].part == current}
        if not current.startswith("blocks"):
            colors |= add_boxes(graph, inside)
            continue
        with graph.subgraph(name=f"cluster_{current}") as frame:
            count = len(model.get_submodule(current).layers)
            title = f"{part_title(current)}: {counted(count, 'layer')}"
            label = html(title, compose(boxes[f"{current}.layers.0"]), align="left")
            frame.attr(label=label, labeljust="l", fontsize="13", margin="20")
            frame.attr(style="rounded,filled", fillcolor="#F7F7F7", color="#BBBBBB")
            colors |= add_boxes(frame, inside)
    add_arrows(graph, drawn, arrows, colors, SIDES[direction])
    return graph


def add_boxes(graph, boxes):
    """Add the boxes of a part. Returns the colour of each, for the arrows that leave it."""
    colors, of_layers = {}, itertools.cycle(LAYER_COLORS)
    for name in sorted(boxes, key=lambda name: boxes[name][0].layer is not None):
        first, last = boxes[name][0], boxes[name][-1]
        fill, colors[name] = FILLS.get(first.part.partition(".")[0], GREY), LINE
        if first.layer is not None and first.layer == last.layer:  # layers that share a box are grey
            fill, colors[name] = next(of_layers)
        label = html(*describe_box(boxes[name]))
        graph.node(name, label, fillcolor=fill, color=colors[name], group="row")  # dot keeps a group in a straight row
    return colors


def add_arrows(graph, boxes, arrows, colors, sides):
    """Add the arrows: straight to the next box, else around the boxes between, on one side for each box they leave.

    A transition stands beside the end of the dense block before it, which makes the drawing shorter.
    """
    order = {name: i for i, name in enumerate(boxes)}
    for tail, head in arrows:
        source, reader = boxes[tail][0], boxes[head][0]
        style = {"color": LINE if (source.part, source.layer) == (reader.part, reader.layer) else colors[tail]}
        if reader.part.startswith("transitions"):
            style["minlen"] = "0"
        elif order[head] - order[tail] == 1:
            style["weight"] = "20"
        else:
            side = sides[(order[tail] - order[f"{source.part}.{INPUT}"]) % 2]
            style |= {"tailport": side, "headport": side}
        graph.edge(tail, head, **style)


def save(graph, path):
    """Write the graph in the format of the path's suffix, in one step. Raises Mistake if dot fails or is missing."""
    suffix = path.suffix[1:]
    if suffix == "png":
        graph.attr(dpi="108")  # screens have 96: a page that scales the picture stays sharp
    try:
        content = graph.source.encode() if suffix == "dot" else graph.pipe(format=suffix, quiet=True)
    except (graphviz.ExecutableNotFound, graphviz.CalledProcessError) as error:
        instead = "install it (apt install graphviz), or write the graph as text with --out model.dot"
        raise Mistake(f"the program dot is missing or cannot draw {path}: {instead}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        file.write(content)
