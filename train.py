"""Train a DenseNet. Example: python train.py --dataset digits

Without arguments: DenseNet-BC-100 (growth rate 12) on augmented CIFAR-10 by the recipe of the paper (arXiv 1608.06993).
"""

import argparse
import contextlib
import datetime
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import distributed
import fused
from cli import Parser, natural, positive
from densenet import ARCHITECTURES, BLOCKS, DenseNet
from evaluate import choose_device, choose_precision, evaluate, set_up_device
from workdir import Figures, Run, RunError, peak_memory_mib, provenance, read_checkpoint

# Defaults that depend on another argument; everything else is the parser's default.
BY_DATASET = {
    "digits": {"depth": 16, "epochs": 20, "augment": False},
    "svhn": {"epochs": 40, "augment": False, "valid_size": 6000},
}
BY_OPTIMIZER = {
    "sgd": {"lr": 0.1, "schedule": "step"},
    "adam": {"lr": 1e-3, "schedule": "constant"},
    "rmsprop": {"lr": 1e-2, "schedule": "constant"},
}
# What --resume may change: none of it changes what is computed, but for the schedule's length and rounding.
RESUMABLE = {
    *("data", "workers", "block", "epochs", "device", "precision", "compile", "deterministic"),
    *("save", "resume", "overwrite", "log_every", "plot", "progress"),
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


class NotFinite(Exception):
    """The loss became NaN or infinite in iteration ``step`` (from 1) of an epoch."""

    def __init__(self, step):
        super().__init__(step)
        self.step = step


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


def seed(text):
    if not 0 <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 … 2³² − 1")
    return int(text)


def make_parser():
    parser = Parser(
        prog="train.py",
        description=__doc__,
        epilog="Old spellings work too: --batchSz, --nEpochs, --no-cuda (bamos/densenet.pytorch); --batch_size, "
        "--n_epochs,\n--growth_rate, --valid_size, --efficient [True|False] (gpleiss/efficient_densenet_pytorch).",
        usage="%(prog)s [--dataset NAME] [--depth L] [--block NAME] … (flags below)",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=118),
        allow_abbrev=False,
    )
    switch = argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=data.DATASETS, default="cifar10",
        help="digits needs no download (default: %(default)s)")
    add("--data", metavar="DIR", default="data",
        help="where data sets live; folder: has train/<class>/* and test/<class>/* (default: %(default)s)")
    add("--image-size", type=positive, default=32, metavar="N",
        help="folder and digits: resize images to N×N pixels (default: %(default)s); "
        f"a folder is streamed from disk, not held in memory, from {data.STREAM_FROM} on")
    add("--augment", action=switch, help="random crops and mirror images (default: on; digits and svhn off)")
    add("--crop-fill", choices=("mean", "black"), default="mean",
        help="beyond the border of a shifted image: mean colour (paper) or raw zeros (default: %(default)s)")
    add("--valid-size", type=natural, metavar="N",
        help="training images to hold out for validation (default: 0; svhn 6000)")
    add("--limit-train", type=positive, metavar="N", help="train on the first N images (default: all)")
    add("--limit-test", type=positive, metavar="N",
        help="test and validate on the first N images (default: all)")
    add("--workers", type=natural, default=0, metavar="N",
        help="processes that decode streamed images (default: %(default)s)")

    add = parser.add_argument_group("model").add_argument
    add("--arch", choices=ARCHITECTURES, metavar="NAME",
        help=f"a network of the paper by name: {', '.join(ARCHITECTURES)}")
    add("--depth", type=int, metavar="L",
        help="layers with weights: 6n + 4, or 3n + 4 without bottlenecks (default: 100; digits 16)")
    add("--growth-rate", type=int, default=12, metavar="K",
        help="channels that each layer adds (default: %(default)s)")
    add("--reduction", type=float, default=0.5, metavar="R",
        help="share of the channels that a transition keeps (default: %(default)s)")
    add("--bottleneck", action=switch, default=True,
        help="1×1 convolutions before the 3×3 ones (default: on)")
    add("--drop-rate", type=float, default=0.0, metavar="P",
        help="dropout after every convolution but the first (default: %(default)s)")
    add("--init-channels", type=int, metavar="N",
        help="channels of the first convolution (default: 2K, or 16 without bottlenecks)")
    add("--block", choices=("auto", *BLOCKS), default="auto",
        help="how dense blocks run; auto is the fastest one verified on the device (default: %(default)s)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive, metavar="N",
        help="passes over the training set (default: 300; digits 20, svhn 40)")
    add("--batch-size", type=positive, default=64, metavar="N", help="images (default: %(default)s)")
    add("--opt", choices=BY_OPTIMIZER, default="sgd", help="optimiser (default: %(default)s)")
    add("--lr", type=float, metavar="X",
        help="initial learning rate (default: 0.1; adam 0.001, rmsprop 0.01)")
    add("--momentum", type=float, default=0.9, metavar="X", help="sgd only (default: %(default)s)")
    add("--nesterov", action=switch, default=True, help="sgd only (default: on)")
    add("--weight-decay", type=float, default=1e-4, metavar="X",
        help="on every parameter (default: %(default)s)")
    add("--schedule", choices=("step", "cosine", "constant"),
        help="step: ×0.1 in the epochs (from 1) at 50 %% and 75 %% (default: step; adam and rmsprop constant)")
    add("--seed", type=seed, default=1, metavar="N",
        help="of split, weights, order, augmentation, dropout (default: %(default)s)")

    add = parser.add_argument_group("run").add_argument
    add("--save", metavar="DIR", help="the run directory (default: work/<dataset>.base)")
    add("--resume", action="store_true",
        help="continue the run in the run directory, with its arguments (default: off)")
    add("--overwrite", action="store_true", help="replace the run in the run directory (default: off)")
    add("--device", default="auto", metavar="NAME",
        help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="auto is bf16 where the hardware has it, else fp32 (default: %(default)s)")
    add("--compile", action=switch, default=False, help="use torch.compile (default: off)")
    add("--deterministic", action=switch, default=False,
        help="repeat bit for bit on a GPU, too (default: off)")
    add("--log-every", type=natural, default=0, metavar="N",
        help="more train.csv rows, one per N iterations (default: %(default)s: one per epoch)")
    add("--plot", action=switch, default=True, help="redraw the figures after each epoch (default: on)")
    add("--progress", action=switch, default=sys.stderr.isatty(),
        help="progress bars (default: on in a terminal)")
    return parser


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


def parse_args(argv=None):
    """Arguments, resolved in this order: given on the command line, saved by the run that is resumed, defaults.

    Returns the namespace and, with --resume, the checkpoint to go on from. Ends the program with status 2 where
    arguments are wrong or contradict each other.
    """
    parser, argv = make_parser(), sys.argv[1:] if argv is None else argv
    defaults = vars(parser.parse_args([]))
    unset = object()
    given = vars(parser.parse_args(modernize(argv), argparse.Namespace(**dict.fromkeys(defaults, unset))))
    given = {name: value for name, value in given.items() if value is not unset}
    if started_by_this_launch(run_directory(given)):
        given |= {"resume": True, "overwrite": False}
    checkpoint = None
    try:
        if given.get("resume") and given.get("overwrite"):
            raise ValueError("--resume and --overwrite exclude each other: choose one")
        if given.get("resume"):
            checkpoint, saved = read_saved(given)
            args = argparse.Namespace(**saved | given)
        else:
            args = argparse.Namespace(**resolve_defaults(defaults, given))
            Run(args.save).check(resume=False, overwrite=args.overwrite)
        check_args(args)
    except (RunError, ValueError) as error:
        parser.error(str(error))
    return args, checkpoint


def resolve_defaults(defaults, given):
    dataset, opt = given.get("dataset", defaults["dataset"]), given.get("opt", defaults["opt"])
    general = {"depth": 100, "epochs": 300, "augment": True, "valid_size": 0, "save": f"work/{dataset}.base"}
    args = defaults | general | BY_DATASET.get(dataset, {}) | BY_OPTIMIZER[opt] | given
    if "arch" in given:
        preset = ARCHITECTURES[args["arch"]]
        clash = [name for name in ("depth", *preset) if name in given]
        if clash:
            raise ValueError(f"--arch {args['arch']} sets the {clash[0].replace('_', ' ')}: leave out one of the two")
        args |= {"depth": None} | {name: value for name, value in preset.items() if name in args}
    return args


def started_by_this_launch(path):
    """Whether torchrun, after the death of a process, starts us anew to go on with the run in ``path``."""
    launched, latest = distributed.launched(), path / "latest.pth"
    return launched is not None and latest.exists() and latest.stat().st_mtime > launched


def run_directory(given):
    return Path(given.get("save") or f"work/{given.get('dataset', 'cifar10')}.base")


def read_saved(given):
    """The checkpoint to resume, and its run's arguments. Raises where ``given`` would make it another run."""
    path = run_directory(given)
    Run(path).check(resume=True, overwrite=False)
    checkpoint = read_checkpoint(path / "latest.pth")
    saved = checkpoint["config"]["arguments"] | {"save": str(path), "resume": True, "overwrite": False}
    for name, value in given.items():
        if name not in RESUMABLE and value != saved[name]:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"the run in {path} was started with {flag} {saved[name]}, not {value}: "
                f"leave out {flag}, or start another run with --save"
            )
    if given.get("epochs", saved["epochs"]) < checkpoint["epoch"]:
        raise ValueError(f"--epochs {given['epochs']}: the run in {path} has finished {checkpoint['epoch']} already")
    if not {"optimizer", "metrics", "seconds"} <= checkpoint.keys():
        raise RunError(f"training cannot go on from {path / 'latest.pth'}: it holds weights only, or is too old")
    saved["progress"] = sys.stderr.isatty()
    return checkpoint, saved


def check_args(args):
    for name in ("lr", "momentum", "weight_decay"):
        value = getattr(args, name)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"--{name.replace('_', '-')} {value}: needs a number of 0 or more")
    if args.nesterov and args.opt == "sgd" and args.momentum == 0:
        raise ValueError("--momentum 0 excludes Nesterov momentum: add --no-nesterov")
    if args.block == "fused" and args.drop_rate > 0:
        raise ValueError("--block fused has no dropout: choose naive or checkpoint, or leave out --drop-rate")
    if args.batch_size < distributed.size():
        raise ValueError(f"--batch-size {args.batch_size}: each of {distributed.size()} processes needs an image of it")
    if choose_device(args.device).type == "mps" and args.block == "fused":
        raise ValueError("--block fused runs on CPUs and CUDA GPUs: choose naive or checkpoint")
    size = args.image_size
    if size != 32 and args.dataset not in ("digits", "folder"):
        raise ValueError(f"--image-size {size}: the images of {args.dataset} have 32×32 pixels")
    streamed = args.dataset == "folder" and size >= data.STREAM_FROM
    if args.crop_fill == "black" and (streamed or not args.augment):
        raise ValueError("--crop-fill black: no image is shifted in this run, so that nothing shows beyond its border")
    try:
        try_out(args, images=2)
    except RuntimeError as error:
        raise ValueError(f"images of {size}×{size} pixels are too small for this network: see --image-size") from error


def try_out(args, images):
    """Let the network compute on so many images, without data or weights; raises what it would raise in training."""
    with torch.device("meta"):
        DenseNet(**model_options(args, num_classes=2))(torch.empty(images, 3, args.image_size, args.image_size))


def model_options(args, num_classes):
    """Arguments of DenseNet; kept in the checkpoint, so that the network can be built again from it."""
    names = ("depth", "growth_rate", "reduction", "bottleneck", "drop_rate", "init_channels")
    options = {name: getattr(args, name) for name in names} | {"num_classes": num_classes}
    return options | ARCHITECTURES.get(args.arch, {})


def make_optimizer(args, parameters):
    if args.opt == "sgd":
        momentum = {"momentum": args.momentum, "nesterov": args.nesterov}
        return torch.optim.SGD(parameters, args.lr, weight_decay=args.weight_decay, **momentum)
    kind = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}[args.opt]
    return kind(parameters, args.lr, weight_decay=args.weight_decay)


def learning_rate(args, epoch, progress):
    """The learning rate of an epoch (from 1), at ``progress`` in [0, 1) through it."""
    if args.schedule == "step":  # with 300 epochs: epoch 150 is the first at a tenth, as in the paper's Lua code
        return args.lr / 10 ** ((epoch >= 0.5 * args.epochs) + (epoch >= 0.75 * args.epochs))
    if args.schedule == "cosine":
        return args.lr * 0.5 * (1 + math.cos(math.pi * (epoch - 1 + progress) / args.epochs))
    return args.lr


def train_epoch(model, batches, optimizer, schedule, amp, bar):
    """One pass over ``batches``, an iterator. Returns (steps, 3) float64: summed loss, wrong images, images.

    ``schedule`` gives the learning rate of a step. Nothing is read from the device but for the bar, once a second.
    Raises NotFinite.
    """
    model.train()
    log, total, refreshed = [], 0, time.monotonic()
    for step, (images, labels, count) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        optimizer.zero_grad()
        with amp():
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        (loss * (distributed.size() / count)).backward()  # the gradient of the mean loss, once averaged over the ranks
        optimizer.step()
        counted = labels != data.NO_LABEL
        wrong = counted & (logits.detach().argmax(1) != labels)
        log.append(torch.stack((loss.detach(), wrong.sum(), counted.sum())))
        total = total + log[-1]
        bar.update(count)
        if time.monotonic() - refreshed > 1:
            mean_loss, error = averages(total[None])
            if not math.isfinite(mean_loss) and distributed.size() == 1:  # several ranks must stop at the same step
                break
            bar.set_postfix(loss=f"{mean_loss:.3f}", error=f"{error:.1f} %")
            refreshed = time.monotonic()
    return read_log(log)


def read_log(log):
    """The per-step sums of an epoch over all ranks, on the CPU. Raises NotFinite for the first loss that is not."""
    steps = distributed.total(torch.stack(log).cpu().double())
    broken = (~steps[:, 0].isfinite()).nonzero()
    if len(broken):
        raise NotFinite(int(broken[0]) + 1)
    return steps


def averages(steps):
    """Loss and error in percent of the steps of a log, weighing images."""
    loss, wrong, images = steps.sum(0).tolist()
    return loss / images, 100 * wrong / images


def train_rows(steps, epoch, schedule, log_every, costs):
    """Rows of train.csv for an epoch: one per ``log_every`` iterations, at fractional epochs, and the whole epoch's."""
    rows = []
    for end in range(log_every, len(steps), log_every) if log_every else ():
        loss, error = averages(steps[end - log_every : end])
        rows.append(log_row(epoch - 1 + end / len(steps), loss, error) | {"lr": schedule(end - 1)})
    return [*rows, log_row(epoch, *averages(steps)) | {"lr": schedule(len(steps) - 1)} | costs]


def log_row(epoch, loss, error):
    return {"epoch": round(epoch, 6), "loss": round(loss, 6), "error": round(error, 4)}


def pick_device(args):
    try:
        return distributed.own_device(choose_device(args.device))
    except ValueError as error:
        raise RunError(str(error)) from error


def load_data(args, device):
    progress = args.progress and distributed.rank() == 0
    dataset = data.load(args.dataset, args.data, args.image_size, args.workers, progress)
    if args.valid_size:
        dataset = dataset.hold_out(args.valid_size, args.seed)
    dataset = dataset.limit(args.limit_train, args.limit_test)
    if len(dataset.train) < distributed.size():
        raise data.DataError(f"{len(dataset.train)} training images for {distributed.size()} processes: use fewer")
    share = distributed.rank(), distributed.size()
    if any(len(part) < 2 for part, _ in data.shares(len(dataset.train), args.batch_size, share)):
        try:
            try_out(args, images=1)
        except ValueError as error:
            raise data.DataError(f"--batch-size {args.batch_size} makes a batch of one image ({error})") from error
    return dataset.to(device)


def make_batches(args, dataset):
    """Batches by split: "train", "valid" where images are held out, "test"."""
    fill, share = {"train": args.crop_fill} if args.augment else {}, (distributed.rank(), distributed.size())
    return {
        name: split.batches(args.batch_size, dataset.normalize, fill.get(name), share)
        for name, split in dataset.splits.items()
    }


def choose_block(args, device, precision):
    """The block to use: "auto" is the fastest one that has been verified for this device and precision."""
    if args.block != "auto":
        return args.block
    measured = device.type == "cpu" and precision == "fp32" and fused.loops is not None
    return "fused" if measured and args.drop_rate == 0 else "naive"


def make_model(args, dataset, device, block):
    options = model_options(args, len(dataset.classes))
    model = DenseNet(**options, block=block)
    return model.to(device, memory_format=torch.channels_last), options


def first_checkpoint(args, dataset, model, options, here):
    """The state before the first epoch: a run can be resumed from the moment it exists."""
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "epoch": 0,
        "seconds": 0.0,  # that the finished epochs took, evaluations included
        "rng": {"seed": args.seed},  # with the epoch, the seed decides every random number
        "config": here | {"arguments": vars(args), "model": options, "parameters": parameters, "resumed": []},
        "normalize": dataset.normalize,
        "classes": list(dataset.classes),
        "metrics": {name: [] for name in dataset.splits},
    }


def go_on_from(checkpoint, args, dataset, options, here):
    """Note in the checkpoint's config that the run goes on here. Raises RunError where the data are not the same."""
    before = checkpoint["config"]["model"], checkpoint["classes"], checkpoint["normalize"]
    if before != (options, list(dataset.classes), dataset.normalize):
        raise RunError(f"the run in {args.save} was trained on other images or classes than {args.data} holds now")
    checkpoint["config"]["arguments"] = vars(args)
    checkpoint["config"]["resumed"].append(here | {"epoch": checkpoint["epoch"]})


def train_and_test(args, epoch, model, parallel, optimizer, batches, amp):
    """One epoch and its evaluations. Returns the new rows of each log.

    ``parallel`` is ``model``, wrapped where several ranks train it.
    """
    device = next(model.parameters()).device
    epoch_seed = args.seed * 1_000_003 + epoch
    torch.manual_seed(epoch_seed + (distributed.rank() << 32))  # dropout's masks

    def schedule(step):
        return learning_rate(args, epoch, step / len(batches["train"]))

    if device.type == "cuda":  # cuDNN's trials in the first epoch need more memory than any step after them
        torch.cuda.reset_peak_memory_stats(device)
    start = time.monotonic()
    with progress_bar(args, epoch, batches["train"]) as bar:
        steps = train_epoch(parallel, batches["train"].shuffled(epoch_seed), optimizer, schedule, amp, bar)
    distributed.average_statistics(model)
    costs = {
        "images_per_second": round(int(steps[:, 2].sum()) / (time.monotonic() - start), 1),
        "peak_memory_mib": round(peak_memory_mib(device), 1),
    }
    rows = {"train": train_rows(steps, epoch, schedule, args.log_every, costs)}
    for name in list(batches)[1:]:
        loss, error = evaluate(model, batches[name], amp)
        if not math.isfinite(loss):  # the last update of the epoch was the one too many
            raise NotFinite(len(steps))
        rows[name] = [log_row(epoch, loss, error)]
    return rows


def progress_bar(args, epoch, batches):
    label = f"epoch {epoch}/{args.epochs}"
    hidden = not args.progress or distributed.rank() > 0
    return tqdm(total=len(batches.images), desc=label, unit="img", leave=False, disable=hidden)


def print_start(args, config, here, dataset):
    name = args.arch or f"DenseNet{'-BC' if args.bottleneck else ''}-{args.depth} (k = {args.growth_rate})"
    kinds = {"train": "training", "valid": "validation", "test": "test"}
    images = ", ".join(f"{len(split):,} {kinds[name]}" for name, split in dataset.splits.items())
    print(f"{name}, {config['parameters']:,} parameters, block {here['block']}, {here['precision']}")
    print(f"{args.dataset}: {images} images in {len(dataset.classes)} classes")
    print(f"{here['device']}; writing {args.save}", flush=True)


def print_epoch(args, rows, seconds):
    """A line per epoch; ``seconds`` is what the epoch took, its evaluations included."""
    train = rows["train"][-1]
    parts = [f"epoch {train['epoch']:3}/{args.epochs}", f"loss {train['loss']:.4f}", f"error {train['error']:5.2f} %"]
    parts += [f"{name} {rows[name][0]['error']:5.2f} %" for name in ("valid", "test") if name in rows]
    left = datetime.timedelta(seconds=round(seconds * (args.epochs - train["epoch"])))
    parts += [f"lr {train['lr']:.3g}", f"{train['images_per_second']:.0f} images/s", f"{left} left"]
    print("  ".join(parts), flush=True)


def print_end(args, first, run, seconds):
    if first > args.epochs:
        print(f"all {args.epochs} epochs are done; a larger --epochs goes further")
    final, best = run.rows["test"][-1], run.best("test")
    took = datetime.timedelta(seconds=round(seconds))
    print(f"test error {final['error']:.2f} % after epoch {final['epoch']}, the last; all epochs took {took}")
    if "valid" in run.rows:
        chosen = run.rows["test"][run.best("valid")["epoch"] - 1]
        print(
            f"test error {chosen['error']:.2f} % at epoch {chosen['epoch']}, "
            "which has the lowest validation error (best.pth)"
        )
    print(f"best on test {best['error']:.2f} %, epoch {best['epoch']}: chosen by looking at the test set, not a result")


def train(args, checkpoint, run):
    """Train to the last epoch, writing into ``run``; ``checkpoint`` is the state to go on from, or None."""
    device = distributed.together(pick_device, args)
    amp, precision = choose_precision(args.precision, device)
    set_up_device(device)
    set_up_torch(args)
    dataset = distributed.in_turn(load_data, args, device)
    model, options = make_model(args, dataset, device, choose_block(args, device, precision))
    optimizer = make_optimizer(args, model.parameters())
    here = provenance(device, distributed.launcher()) | {"precision": precision, "block": model.blocks[0].block}
    if checkpoint is None:
        checkpoint = first_checkpoint(args, dataset, model, options, here)
    else:
        distributed.together(go_on_from, checkpoint, args, dataset, options, here)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    if args.compile:
        model.compile()
    parallel = distributed.parallel(model)

    def state(epoch):
        return checkpoint | {"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def start():
        run.lock()
        run.check(args.resume, args.overwrite)
        if args.resume and read_checkpoint(run.path / "latest.pth")["epoch"] != checkpoint["epoch"]:
            raise RunError(f"another process went on with {run.path} meanwhile: run again")
        run.start(state(checkpoint["epoch"]), clear=args.overwrite)
        print_start(args, checkpoint["config"], here, dataset)

    first, batches, writes = checkpoint["epoch"] + 1, make_batches(args, dataset), distributed.rank() == 0
    distributed.by_first(start)
    with Figures(run.path, args.plot and writes) as figures:
        for epoch in range(first, args.epochs + 1):
            begin = time.monotonic()
            rows = train_and_test(args, epoch, model, parallel, optimizer, batches, amp)
            if writes:
                seconds = time.monotonic() - begin
                checkpoint["seconds"] += seconds
                run.finish_epoch(state(epoch), rows)
                print_epoch(args, rows, seconds)
                figures.redraw()
    if writes:
        print_end(args, first, run, checkpoint["seconds"])


def set_up_torch(args):
    torch.manual_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not args.deterministic


@contextlib.contextmanager
def interruptible():
    """Raise Interrupted on SIGINT and SIGTERM."""

    def interrupt(number, frame):
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv=None):
    run = None
    try:
        with interruptible(), distributed.joined():
            args, checkpoint = distributed.by_first(parse_args, argv)
            run = Run(args.save)
            with run:
                train(args, checkpoint, run)
        return 0
    except distributed.Elsewhere as error:
        return error.status
    except (data.DataError, RunError) as error:
        status, message = 2, f"error: {error}" + (f"; {saved(run)}" if run.epoch is not None else "")
    except NotFinite as error:
        if distributed.rank() > 0:
            return 3
        where = f"epoch {run.epoch + 1}, iteration {error.step}"
        status, message = 3, f"error: the loss is not finite in {where}; {saved(run)}"
    except OSError as error:
        status, message = 1, f"error: {error.filename or args.save}: {error.strerror or error}; {saved(run)}"
    except Interrupted as error:
        status, message = 128 + error.number, f"stopped; {saved(run)}"
        if not distributed.speaks() or (error.number == signal.SIGINT and distributed.rank() > 0):
            return status
    except RuntimeError as error:
        if not distributed.lost_rank(error):
            raise
        status, message = 1, f"error: another process of this run has ended; {saved(run)}"
        if not distributed.speaks():
            return status
    print(f"train.py: {message}", file=sys.stderr)
    return status


def saved(run):
    """What of a run that ended early is safe, and how to go on."""
    first = distributed.rank() == 0  # the others do not know how far it got
    if run is None or (run.epoch is None if first else not (run.path / "latest.pth").exists()):
        return "nothing was saved"
    whole = f"epoch {run.epoch}" if first else "the last whole epoch"
    script = shlex.quote(sys.argv[0])
    resume = f"{distributed.launcher()} {script} --save {shlex.quote(str(run.path))} --resume"
    return f"{whole} is saved in {run.path / 'latest.pth'}; to go on: {resume}"


if __name__ == "__main__":
    distributed.exit_from(main)
