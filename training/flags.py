"""The flags of train.py: groups, types, defaults, old spellings, and checks against each other and the machine."""

import argparse
import contextlib
import dataclasses
import importlib.util
import sys
from pathlib import Path

import torch

from common.console import Mistake, Parser, amount, between, natural, nonempty, one_line, positive, positive_number
from common.hardware import PRECISIONS, choose_device, choose_precision, compiler_problem
from densenet import ARCHITECTURES, BLOCKS, DenseNet
from inputs import datasets
from inputs.batches import FLIPS, PAD, POLICIES
from inputs.image import STREAM_FROM, Reader, add_reader_flags
from training import distributed
from training.recipe import RECIPES

# Defaults that depend on another argument; everything else is the parser's default.
BY_DATASET = {
    "digits": {"depth": 16, "epochs": 20, "augment": False},
    "svhn": {"epochs": 40, "augment": False, "valid_size": 6000},
}
BY_OPTIMIZER = {
    "sgd": {"lr": 0.1, "schedule": "step"},
    "adam": {"lr": 1e-3, "schedule": "constant"},
    "adamw": {"lr": 1e-3, "schedule": "constant", "weight_decay": 0.01},
    "rmsprop": {"lr": 1e-2, "schedule": "constant"},
}
# Flags of bamos/densenet.pytorch and gpleiss/efficient_densenet_pytorch, so that old command lines still run.
OLD_FLAGS = {
    "--batchSz": "--batch-size",
    "--batch_size": "--batch-size",
    "--nEpochs": "--epochs",
    "--n_epochs": "--epochs",
    "--growth_rate": "--growth-rate",
    "--valid_size": "--valid-size",
}
NETWORK = ("depth", "growth_rate", "reduction", "bottleneck", "drop_rate", "init_channels")  # arguments of DenseNet
switch = argparse.BooleanOptionalAction
rate = between(0, 1e30)  # beyond, float32 has infinity
channels = pixels = between(1, 100_000, int)


def fold(text):
    """The type of --fold: "I/K" with 1 ≤ I ≤ K and K ≥ 2."""
    i, k = map(int, text.split("/"))
    if not 1 <= i <= k or k < 2:
        raise argparse.ArgumentTypeError(f"{text} is none of 1/{k} … {k}/{k}")
    return f"{i}/{k}"


class Joined(argparse.Action):
    """Joins several values by commas; one value may have commas already."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, ",".join(part for value in values for part in value.split(",") if part))


def make_parser(description=None):
    parser = Parser(
        prog="train.py",
        description=description,
        epilog="Old spellings work too: --batchSz, --nEpochs, --no-cuda (bamos/densenet.pytorch); --batch_size, "
        "--n_epochs,\n--growth_rate, --valid_size, --efficient [True|False] (gpleiss/efficient_densenet_pytorch).",
        usage="%(prog)s [--dataset NAME] [--depth L] [--block NAME] … (flags below)",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=118),
        allow_abbrev=False,
    )
    add_data_flags(parser.add_argument_group("data").add_argument)
    model = parser.add_argument_group("network").add_argument
    add_network_flags(model, depth="100; digits 16")
    model("--block", choices=("auto", *BLOCKS), default="auto",
        help="how dense blocks are computed, all with the same result; auto measures which is fastest on this machine, "
        "if the run is long (default: %(default)s)")
    add_optimisation_flags(parser.add_argument_group("training").add_argument)
    add_finetuning_flags(parser.add_argument_group("fine-tuning").add_argument)
    add_newer_flags(parser.add_argument_group("newer than the paper").add_argument)
    add_run_flags(parser.add_argument_group("run").add_argument)
    for action in parser._actions[1:]:
        if "(default: " not in action.help:
            action.help += f" (default: {action.default or 'off'})"
    return parser


def add_data_flags(add):
    add("--dataset", choices=datasets.DATASETS, default="cifar10", help="data set; digits and folder need no download")
    add("--data", type=nonempty, metavar="DIR", default="data",
        help="directory of the data sets; with --dataset folder: holds train/<class>/ and test/<class>/")
    add("--image-size", type=pixels, metavar="N",
        help="folder and digits: resize images to N×N pixels (default: 32; folder with ImageNet's networks 224); "
        f"a folder is streamed from disk, not held in memory, from {STREAM_FROM} on")
    add_reader_flags(add)
    add("--augment", action=switch,
        help="shift and mirror training images at random (default: on; digits and svhn off)")
    add("--flip", choices=FLIPS, default="horizontal", help="how --augment mirrors an image, with probability 1/2")
    add("--shift", type=natural, default=PAD, metavar="N", help="--augment shifts an image by at most N pixels")
    add("--crop-fill", choices=("mean", "black"), default="mean",
        help="what fills the border of a shifted image: the mean colour, as in the paper, or black")
    add("--valid-size", type=amount, metavar="N",
        help="hold out N training images for validation, or a fraction such as 0.1 (default: 0; svhn 6000)")
    add("--test-size", type=amount, default=0, metavar="N",
        help="folder without test images: hold out N images for testing, or a fraction, the same for every seed "
        "(default: 0.2 if there are only class folders)")
    add("--labels", type=nonempty, metavar="FILE",
        help="folder: a CSV file in --data with columns path, label and optionally split (train, valid, test), "
        "instead of class folders")
    add("--fold", type=fold, metavar="I/K",
        help="folder without test images: test on the Ith of K equal parts, the same parts for every seed")
    add("--groups", type=nonempty, metavar="REGEX",
        help="folder: keep images of one patient, scene or writer in one split; the first group of a regular "
        "expression, in the path below --data, names it")
    add("--limit-train", type=positive, metavar="N", help="train on the first N images only (default: all)")
    add("--limit-test", type=positive, metavar="N", help="test and validate on the first N images only (default: all)")


def add_network_flags(add, depth):
    """The flags that say which network: arguments of DenseNet; ``depth`` is what the help says of the default depth."""
    add("--arch", choices=ARCHITECTURES, metavar="NAME",
        help=f"a network of the paper or its authors: {', '.join(ARCHITECTURES)} (default: see --depth)")
    add("--depth", type=between(1, 2000, int), metavar="L",
        help=f"number of layers with weights: 6n + 4, or 3n + 4 without bottlenecks (default: {depth})")
    add("--growth-rate", type=channels, default=12, metavar="K",
        help="channels that each layer adds (default: %(default)s)")
    add("--reduction", type=float, default=0.5, metavar="R",
        help="fraction of the channels that a transition keeps (default: %(default)s)")
    add("--bottleneck", action=switch, default=True,
        help="put a 1×1 convolution before each 3×3 convolution (default: on)")
    add("--drop-rate", type=float, default=0.0, metavar="P",
        help="probability of dropout, after every convolution but the first (default: %(default)s)")
    add("--init-channels", type=channels, metavar="N",
        help="output channels of the first convolution (default: 2K, or 16 without bottlenecks)")


def add_optimisation_flags(add):
    add("--epochs", type=between(1, 10**6, int), metavar="N",
        help="passes over the training images (default: 300; digits 20, svhn 40)")
    add("--batch-size", type=positive, default=64, metavar="N", help="images per batch, of all processes together")
    add("--opt", choices=BY_OPTIMIZER, default="sgd", help="optimiser")
    add("--lr", type=rate, metavar="X", help="initial learning rate (default: 0.1; adam and adamw 0.001, rmsprop 0.01)")
    add("--momentum", type=rate, default=0.9, metavar="X", help="momentum of sgd")
    add("--nesterov", action=switch, default=True, help="make the momentum of sgd Nesterov's (default: on)")
    add("--weight-decay", type=rate, default=1e-4, metavar="X",
        help="weight decay; adamw applies it apart from the gradient (default: %(default)s; adamw 0.01)")
    add("--schedule", choices=("step", "cosine", "constant"),
        help="how the learning rate falls; step: ×0.1 at 50 %% and at 75 %% of the epochs, never in the first "
        "(default: step; constant unless --opt is sgd)")
    add("--milestones", type=positive, nargs="+", metavar="EPOCHS",
        help="with --schedule step: multiply the learning rate by --gamma after these epochs (default: see --schedule)")
    add("--gamma", type=between(0, 1), default=0.1, metavar="X", help="factor at each of --milestones")
    add("--seed", type=between(0, 2**32 - 1, int), default=1, metavar="N", help="seed of all random numbers")


def add_finetuning_flags(add):
    add("--init-from", metavar="WHAT",
        help="start from trained weights: a checkpoint, a .safetensors file, a state dict of torchvision's, or "
        "imagenet to download the weights that torchvision publishes (default: none)")
    add("--freeze", action=Joined, nargs="+", metavar="PART",
        help="parts not to train: features, stem, blocks.0, … (default: none)")
    add("--head-lr", type=positive_number, metavar="X",
        help="initial learning rate of the classifier (default: as --lr)")


def as_flags(values):
    """{name: value} as on a command line."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())


def add_newer_flags(add):
    sets = "; ".join(f"{name}: {as_flags(values)}" for name, values in RECIPES.items())
    add("--recipe", choices=RECIPES, metavar="NAME",
        help=f"several flags at once, which other flags override; {sets} (default: the paper's)")
    add("--label-smoothing", type=between(0, 0.999), default=0.0, metavar="E",
        help="spread the fraction E of each label over all classes")
    add("--cutout", type=natural, default=0, metavar="N",
        help="hide a random square of N×N pixels in each training image")
    add("--mixup", type=between(0, 1000), default=0.0, metavar="ALPHA",
        help="mix each training image with another, with weights from Beta(ALPHA, ALPHA)")
    add("--policy", choices=POLICIES,
        help="streamed folder: change images by torchvision's TrivialAugmentWide, RandAugment or AutoAugment, "
        "after --augment")
    add("--warmup", type=rate, default=0.0, metavar="EPOCHS",
        help="let the learning rate rise from 1 %% to all in the first EPOCHS epochs")
    add("--ema", type=between(0, 0.999999), default=0.0, metavar="DECAY",
        help="also keep and test an average of the weights; DECAY is the fraction it keeps per update, such as 0.999")
    add("--decay", choices=("all", "weights"), default="all",
        help="decay all parameters, or only weights, not batch norms and biases")
    add("--accumulate", type=positive, default=1, metavar="N",
        help="batches per update; batch norm sees each of them by itself")
    add("--clip-grad", type=rate, default=0.0, metavar="X", help="shorten gradients whose norm is above X")
    add("--class-weights", choices=("balanced",),
        help="weigh the loss so that every class counts the same, however many images it has")


def add_run_flags(add):
    add("--save", type=nonempty, metavar="DIR",
        help="run directory, for logs, checkpoints and figures (default: work/<dataset>.base)")
    add("--resume", nargs="?", const=True, default=False, choices=("if-any",), metavar="if-any",
        help="continue the run in the run directory, with its arguments; if-any: or start one if there is none")
    add("--overwrite", action="store_true", help="replace the run in the run directory (default: off)")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:N or mps; auto is a GPU if there is one")
    add("--precision", choices=("auto", *PRECISIONS), default="auto",
        help="number format; auto is bf16 if the hardware has it, fp16 on older GPUs with tensor cores, else fp32")
    add("--compile", action=switch, default=False, help="compile the network by torch.compile (default: off)")
    add("--cuda-graph", action=switch, default=None,
        help="replay training steps as CUDA graphs, if their results match eager steps; not with --compile "
        "(default: on, on CUDA GPUs)")
    add("--deterministic", action=switch, default=False,
        help="make runs on a GPU repeat bit for bit, as on a CPU (default: off)")
    add("--log-every", type=natural, default=0, metavar="N", help="add a row to train.csv every N iterations, too")
    add("--keep-every", type=natural, default=0, metavar="N",
        help="keep the checkpoint of every Nth epoch: epoch-0100.pth, …")
    add("--patience", type=natural, default=0, metavar="N",
        help="stop after N epochs without a lower validation error")
    add("--tensorboard", action=switch, default=False, help="write the logs for TensorBoard, too (default: off)")
    add("--plot", action=switch, default=True,
        help="draw the figures of the run while it trains, at most once a minute (default: on)")
    add("--progress", action=switch, default=sys.stderr.isatty(),
        help="show progress bars (default: on in a terminal)")


def modernize(argv):
    """The command line with the old spellings replaced."""
    result, argv = [], list(argv)
    while argv:
        flag, equals, value = argv.pop(0).partition("=")
        if flag == "--no-cuda":
            result += ["--device", "cpu"]
        elif flag == "--efficient":
            if not equals and argv and argv[0].lower() in ("true", "false"):
                value = argv.pop(0)
            result += ["--block", "naive" if value.lower() == "false" else "checkpoint"]
        else:
            result.append(OLD_FLAGS.get(flag, flag) + equals + value)
    return result


def given_flags(parser, argv):
    """The flags on a command line, without defaults: {name: value}."""
    unset = object()
    blank = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), unset))
    return {name: value for name, value in vars(parser.parse_args(argv, blank)).items() if value is not unset}


def resolve_defaults(defaults, given):
    preset = RECIPES.get(given.get("recipe"), {})
    dataset, opt = given.get("dataset", defaults["dataset"]), (defaults | preset | given)["opt"]
    general = {"depth": 100, "epochs": 300, "augment": True, "valid_size": 0, "save": f"work/{dataset}.base"}
    photos = dataset == "folder" and ARCHITECTURES.get(given.get("arch"), {}).get("stem") == "imagenet"
    general["image_size"] = 224 if photos else 32
    args = defaults | general | BY_DATASET.get(dataset, {}) | BY_OPTIMIZER[opt] | preset | given
    if preset := architecture(given):
        args |= {"depth": None} | {name: value for name, value in preset.items() if name in args}
    return args


def architecture(given):
    """The arguments of DenseNet that --arch sets. Raises Mistake if another flag sets one of them, too."""
    preset = ARCHITECTURES.get(given.get("arch"), {})
    for name in ("depth", *preset):
        if preset and name in given:
            raise Mistake(f"--arch {given['arch']} sets the {name.replace('_', ' ')}: leave out one of the two")
    return preset


def check_args(args):
    """Raises Mistake if arguments contradict each other, or need something that this machine lacks."""
    if args.cutout > args.image_size:
        raise Mistake(f"--cutout {args.cutout} is larger than the images, of {args.image_size} pixels: choose less")
    if args.warmup and args.warmup >= args.epochs:
        raise Mistake(f"--warmup {args.warmup:g} takes all of {args.epochs} epochs: choose less, 0, or more --epochs")
    if args.milestones and args.schedule != "step":
        raise Mistake("--milestones are for --schedule step: add that, or leave them out")
    if args.gamma != 0.1 and not args.milestones:
        raise Mistake(f"--gamma {args.gamma} is the factor at --milestones: add those, or leave it out")
    if args.nesterov and args.opt == "sgd" and args.momentum == 0:
        raise Mistake("--momentum 0 does not work with Nesterov momentum: add --no-nesterov")
    if args.block == "fused" and args.compile:
        raise Mistake("--block fused leaves --compile nothing to fuse: leave out --compile, or use another block")
    ranks, size, device = distributed.world_size(), args.image_size, choose_device(args.device)
    if args.batch_size < ranks:
        raise Mistake(f"--batch-size {args.batch_size}: each of {ranks} processes needs an image of every batch")
    if device.type == "mps" and args.block == "fused":
        raise Mistake("--block fused runs on CPUs and CUDA GPUs only: choose naive or checkpoint")
    if args.cuda_graph and not can_replay(args, device, choose_precision(args.precision, device)[1]):
        raise Mistake("--cuda-graph is for CUDA GPUs, without --compile and rmsprop in fp16: add --no-cuda-graph")
    if args.compile and (problem := compiler_problem(device)):
        raise Mistake(f"--compile does not work here ({problem}): leave it out")
    if args.dataset not in ("digits", "folder"):
        if (size, args.channels) != (32, 3):
            raise Mistake(f"images of {args.dataset} have 32×32 pixels, 3 channels: leave out --image-size, --channels")
        if Path(args.data, "train").is_dir():
            raise Mistake(f"{args.data}/train is not of {args.dataset}: for image folders, add --dataset folder")
    usual = {field.name: field.default for field in dataclasses.fields(Reader)} | {"test_size": 0}
    for name in ("white", "black", "alpha", "test_size", "skip_unreadable", "fold", "groups", "labels"):
        if getattr(args, name) != usual.get(name) and args.dataset != "folder":
            raise Mistake(f"--{name.replace('_', '-')} is for --dataset folder: leave it out")
    if args.fold and args.test_size:
        raise Mistake(f"--fold {args.fold} is the test split: leave out --test-size")
    Reader.of_run(vars(args))  # raises Mistake
    streamed = args.dataset == "folder" and size >= STREAM_FROM
    shifted, changed = args.augment and not streamed, args.augment and streamed
    for name, usual, is_done, done in (
        ("flip", "horizontal", args.augment, "augmented"), ("policy", None, changed, "streamed and augmented"),
        ("shift", PAD, shifted, "shifted"), ("crop_fill", "mean", shifted, "shifted"),
    ):  # fmt: skip
        if getattr(args, name) != usual and not is_done:
            raise Mistake(f"--{name.replace('_', '-')}: no image is {done} in this run: leave it out")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise Mistake("--tensorboard needs a package that is not installed: pip install tensorboard")
    with possible(size):
        try_out(args, batch_size=2)


def can_replay(args, device, precision):
    """True if steps can be captured as CUDA graphs: in fp16, an optimiser has to skip updates by itself."""
    return device.type == "cuda" and not args.compile and not (precision == "fp16" and args.opt == "rmsprop")


@contextlib.contextmanager
def possible(image_size):
    """Turns errors of a network's construction, or of its first batch, into Mistakes."""
    try:
        yield
    except ValueError as error:
        raise Mistake(str(error)) from error
    except RuntimeError as error:
        images = f"images of {image_size}×{image_size} pixels"
        if "too small" in str(error):
            raise Mistake(f"{images} are too small for this network: see --image-size") from error
        raise Mistake(f"this network cannot compute on {images} ({one_line(error)})") from error


def try_out(args, batch_size):
    """Run the network on a batch, both without data; raises what training would raise."""
    with torch.device("meta"):
        images = torch.empty(batch_size, args.channels, args.image_size, args.image_size)
        DenseNet(**model_options(args, num_classes=2))(images)


def model_options(args, num_classes):
    """Arguments of DenseNet, which checkpoints keep."""
    options = {name: getattr(args, name) for name in NETWORK}
    options |= {"num_classes": num_classes, "in_channels": args.channels}
    return options | ARCHITECTURES.get(args.arch, {})
