"""Draw the network as a graph: dense blocks, layers, transitions, channels and sizes.

Example: python make_graph.py
         python make_graph.py --depth 28 --part blocks.0 --direction right --out images/dense-block.png

torch.fx traces the network, so boxes and arrows are those of the model. dot (https://graphviz.org) places them.
"""

import sys
from pathlib import Path

import torch

from common.console import Mistake, Parser, command
from densenet import DenseNet
from reports.drawing import FORMATS, example, model_graph, save
from training.flags import NETWORK, add_network_flags, architecture, channels, given_flags, pixels, possible


def make_parser():
    parser = Parser(prog="make_graph.py", description=__doc__)
    add = parser.add_argument_group("model").add_argument
    add_network_flags(add, depth="100")
    add("--num-classes", type=channels, metavar="N",
        help="length of the logits (default: 10; ImageNet's networks 1000)")
    add("--channels", type=channels, default=3, metavar="N", help="channels of the images (default: %(default)s)")
    add("--image-size", type=pixels, metavar="N", help="images of N×N pixels (default: 32; ImageNet's networks 224)")

    add = parser.add_argument_group("graph").add_argument
    add("--out", type=Path, default=Path("images/model.svg"), metavar="FILE",
        help=f"file to write; its suffix is the format: {', '.join(FORMATS)} (default: %(default)s)")
    add("--part", metavar="NAME", help="draw only stem, blocks.I, transitions.I or classifier (default: all)")
    add("--direction", choices=("down", "right"), default="down", help="where arrows point (default: %(default)s)")
    return parser


def build(given):
    """The network that the ``given`` flags describe, without data, and its image size. Raises Mistake."""
    options = architecture(given) | {name: given[name] for name in NETWORK if name in given}
    imagenet = options.get("stem") == "imagenet"
    options["num_classes"] = given.get("num_classes", 1000 if imagenet else 10)
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
    if args.out.suffix[1:] not in FORMATS:
        raise Mistake(f"--out {args.out}: needs one of the suffixes {', '.join('.' + name for name in FORMATS)}")
    model, image_size = build(given)
    save(model_graph(model, image_size, args.part, args.direction), args.out)
    print(args.out)


if __name__ == "__main__":
    sys.exit(main())
