"""Draw the network as a graph: dense blocks, layers, transitions, channels and sizes.

Example: python make_graph.py
         python make_graph.py --depth 28 --part blocks.0 --direction right --out images/dense-block.png
         python make_graph.py --depth 10 --autograd --out autograd.pdf

torch.fx traces the network, so boxes and arrows are those of the model; dot (https://graphviz.org) lays them out.
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports is no traceback; main has its own way

import torch

from arguments import NETWORK, add_network_flags, architecture, channels, given_flags, pixels, possible
from cli import Mistake, Parser, command, written_whole
from densenet import DenseNet
from graph import INPUT, arrows, describe_box, example, group, heading, layer_title, layers_of, size, trace

FORMATS = ("svg", "png", "pdf", "dot")
FONT = "Helvetica,Arial,sans-serif"
RANKDIR = {"down": "TB", "right": "LR"}
SIDES = {"down": "we", "right": "sn"}  # compass points to the left and right of the way
GREY, LINE = "#EDEDED", "#555555"
FILLS = {"image": "#FFFFFF", "stem": "#FFF3CF", "transitions": "#FFF3CF", "classifier": "#FFF3CF"}
# Tints and full tones after Okabe and Ito's colours, which colour-blind readers can tell apart. A layer's box and the
# arrows that leave it have one colour.
LAYER_COLORS = (("#D6E8F5", "#0072B2"), ("#FBE0CF", "#D55E00"), ("#D3EFE4", "#009E73"), ("#F6E1EC", "#B04A87"))


def html(title, lines, align="center"):
    """A label of Graphviz: the title bold, the lines below smaller."""
    end = f'<br align="{align}"/>'
    return f"<<b>{title}</b>{end}" + "".join(f'<font point-size="11">{line}</font>{end}' for line in lines) + ">"


def paint(boxes):
    """Box → (fill, line). Each layer of a block has the next colour; layers that share a box are grey."""
    colors, turns = {}, {}
    for name, members in boxes.items():
        part, layer = members[0].part, members[0].layer
        if layer is None or len(layers_of(members, part)) > 1:
            colors[name] = FILLS.get(part.partition(".")[0], GREY), LINE
        else:
            turn = turns.setdefault((part, layer), sum(other == part for other, _ in turns))
            colors[name] = LAYER_COLORS[turn % len(LAYER_COLORS)]
    return colors


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


def model_graph(model, image_size, depth_limit, max_layers, part, direction):
    """The graph of the network, or of one part of it and what that reads, as a graphviz.Digraph."""
    ops = trace(model, image_size)
    _, *parts = dict.fromkeys(op.part for op in ops.values())  # the first is the image
    if part not in (None, *parts):
        raise Mistake(f"part {part!r}: choose one of {', '.join(parts)}")
    boxes = group(ops, depth_limit, max_layers)
    pairs = [(tail, head) for tail, head in arrows(boxes, ops) if part in (None, boxes[head][0].part)]
    shown = {name for pair in pairs for name in pair}
    boxes = {name: members for name, members in boxes.items() if name in shown}
    graph, colors = new_graph("model", direction), paint(boxes)
    for current in dict.fromkeys(members[0].part for members in boxes.values()):
        add_part(graph, current, boxes, ops, colors)
    # With more boxes, arrows that must keep to a side cross each other more often than those that need not.
    sides = SIDES[direction] if depth_limit == 2 and max_layers <= 4 else None
    add_arrows(graph, boxes, pairs, colors, sides)
    return graph


def add_part(graph, part, boxes, ops, colors):
    """Add a part's boxes, in a frame if it is opened; an opened layer has a frame of its own."""
    boxes = {name: members for name, members in boxes.items() if members[0].part == part}
    if list(boxes) == [part] or part == "image":
        add_boxes(graph, boxes, ops, colors)
        return
    with graph.subgraph(name=f"cluster_{part}") as frame:
        title, lines = heading(part, layers_of(ops.values(), part))
        frame.attr(label=html(title, lines, align="left"), labeljust="l", fontsize="13", margin="20")
        frame.attr(style="rounded,filled", fillcolor="#F7F7F7", color="#BBBBBB")
        for layer in dict.fromkeys(members[0].layer for members in boxes.values()):
            inside = {name: members for name, members in boxes.items() if members[0].layer == layer}
            if layer is None or len(inside) == 1:
                add_boxes(frame, inside, ops, colors)
                continue
            with frame.subgraph(name=f"cluster_{part}.layers.{layer}") as inner:
                inner.attr(label=html(layer_title([layer]), []), fillcolor="white", margin="10")
                add_boxes(inner, inside, ops, colors)


def add_boxes(graph, boxes, ops, colors):
    for name, members in boxes.items():
        fill, line = colors[name]
        # dot keeps a group in one straight row.
        graph.node(name, html(*describe_box(name, members, ops)), fillcolor=fill, color=line, group="row")


def add_arrows(graph, boxes, pairs, colors, sides):
    """Add the arrows: to the next box straight; others around the boxes between, on one side per box they leave.

    What follows an opened dense block stands beside its end: stairs are less long than one row.
    """
    order = {name: i for i, name in enumerate(boxes)}
    for tail, head in pairs:
        source, reader = boxes[tail][0], boxes[head][0]
        style = {"color": LINE if (source.part, source.layer) == (reader.part, reader.layer) else colors[tail][1]}
        if reader.part.startswith("transitions") and tail != source.part != reader.part:
            style["minlen"] = "0"
        elif order[head] - order[tail] == 1:
            style["weight"] = "20"
        elif sides:
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


def make_parser():
    parser = Parser(prog="make_graph.py", description=__doc__)
    add = parser.add_argument_group("model").add_argument
    add_network_flags(add, depth="100")
    add("--num-classes", type=channels, metavar="N",
        help="length of the logits (default: 10; of ImageNet's networks 1000)")
    add("--channels", type=channels, default=3, metavar="N", help="of the images (default: %(default)s)")
    add("--image-size", type=pixels, metavar="N", help="of N×N pixels (default: 32; of ImageNet's networks 224)")

    add = parser.add_argument_group("graph").add_argument
    add("--out", type=Path, default=Path("images/model.svg"), metavar="FILE",
        help=f"its suffix is the format: {', '.join(FORMATS)} (default: %(default)s)")
    add("--depth-limit", type=int, choices=(1, 2, 3), default=2, metavar="N",
        help="1: dense blocks and transitions, 2: layers of dense blocks, too, 3: operations (default: %(default)s)")
    add("--max-layers", type=int, default=4, metavar="N",
        help="of a dense block with more layers, draw some of them as one box (default: %(default)s)")
    add("--part", metavar="NAME", help="draw only stem, blocks.I, transitions.I or classifier (default: all)")
    add("--direction", choices=("down", "right"), default="down", help="of the arrows (default: %(default)s)")
    add("--autograd", action="store_true", help="draw the backward functions and parameters instead")
    return parser


def check_args(args, given):
    if args.out.suffix[1:] not in FORMATS:
        raise Mistake(f"--out {args.out}: needs one of the suffixes {', '.join('.' + name for name in FORMATS)}")
    if args.out.is_dir():
        raise Mistake(f"--out {args.out}: is a directory, needs the name of a file")
    if args.max_layers < 3:
        raise Mistake(f"--max-layers {args.max_layers}: needs at least 3, for the first, the last and those between")
    for name in ("depth_limit", "max_layers", "part"):
        if args.autograd and name in given:
            raise Mistake(f"--autograd draws every function: leave out --{name.replace('_', '-')}")


def build(given):
    """The network that the flags describe, without data, and the size of its images. Raises Mistake."""
    options = architecture(given)
    imagenet = options.get("stem") == "imagenet"
    options = {"num_classes": 1000 if imagenet else 10} | options
    options |= {name: given[name] for name in (*NETWORK, "num_classes") if name in given}
    options["in_channels"] = given.get("channels", 3)
    image_size = given.get("image_size", 224 if imagenet else 32)
    with possible(image_size):
        with torch.device("meta"):
            model = DenseNet(**options)
        model(example(model, image_size))
    return model, image_size


@command
def main(argv=None):
    parser = make_parser()
    args, given = parser.parse_args(argv), given_flags(parser, argv)
    check_args(args, given)
    model, image_size = build(given)
    if args.autograd:
        graph = autograd_graph(model, image_size, args.direction)
    else:
        graph = model_graph(model, image_size, args.depth_limit, args.max_layers, args.part, args.direction)
    written = save(graph, args.out)
    print(written)
    if written != args.out:
        draw = f"dot -T{args.out.suffix[1:]} {written} -o {args.out}"
        print(f"the program dot is missing: install it (apt install graphviz), then {draw}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
