"""The arguments of a run, new or resumed: from the command line, the run's checkpoint and the defaults."""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import torch

from common.config import stages
from common.console import Mistake
from densenet import BLOCKS, DenseNet
from training import distributed
from training.finetune import freeze, read_source, unfit
from training.flags import NETWORK, check_args, given_flags, make_parser, model_options, modernize, resolve_defaults
from training.run import Run

# What --resume may change. Only the schedule and rounding depend on it.
RESUMABLE = {
    "lr",  # at the same rate, a loss that was not finite would be so again
    *("data", "workers", "block", "epochs", "device", "precision", "compile", "cuda_graph", "deterministic"),
    *("save", "resume", "overwrite", "log_every", "plot", "progress"),
    *("patience", "keep_every", "tensorboard"),
}
OWN = {"save", "resume", "overwrite", "progress"}  # of this process, not of the run that it resumes


def parse_args(argv=None, description=None):
    """Arguments: from the command line, else from the run that is resumed, else the defaults.

    If no flag says which network, it is that of the weights to start from, if they are of a run.

    Returns the namespace; the checkpoint, with --resume, else None; and the weights to start from, as ``read_source``
    returns them, or None. Raises Mistake if arguments are wrong or contradict each other, SystemExit with --help.
    """
    parser = make_parser(description)
    defaults = vars(parser.parse_args([]))
    given = given_flags(parser, modernize(sys.argv[1:] if argv is None else argv))
    if started_by_this_launch(run_directory(given)):
        given |= {"resume": True, "overwrite": False}
    if given.get("resume") and given.get("overwrite"):
        raise Mistake("--resume and --overwrite exclude each other: choose one")
    if given.get("resume") == "if-any":
        given["resume"] = Run(run_directory(given)).can_go_on()
    checkpoint, source = None, None
    if given.get("resume"):
        checkpoint, saved = read_saved(given)
        args = argparse.Namespace(**saved | given)
    else:
        if "init_from" in given:
            source = read_source(given["init_from"], given.get("arch"), given.get("channels", defaults["channels"]))
        args = argparse.Namespace(**resolve_defaults(defaults, network_of(source, given) | given))
        Run(args.save).check(resume=False, overwrite=args.overwrite)
    check_args(args)
    check_finetuning(args, source)
    return args, checkpoint, source


def network_of(source, given):
    """The flags of the network of ``source``, as its run saved them; {} if ``given`` has any of them."""
    names = [name for name in ("arch", *NETWORK) if name != "drop_rate"]  # which has no weights
    saved = source["config"]["arguments"] if source and "config" in source else {}
    if given.keys() & set(names):
        return {}
    if saved.get("arch"):
        return {"arch": saved["arch"]}
    return {name: saved[name] for name in names[1:] if name in saved}


def check_finetuning(args, source):
    """Raises Mistake if the network lacks the parts to freeze, or most weights of ``source`` do not fit it."""
    if args.head_lr and not args.lr:
        raise Mistake("--head-lr is kept in proportion to --lr, which is 0: to train the classifier, --freeze features")
    with torch.device("meta"):
        model = DenseNet(**model_options(args, num_classes=2))
    if source:
        unfit(model, source, args.init_from)
    if args.freeze is not None:
        freeze(model, args.freeze)
    if args.head_lr and not model.classifier.weight.requires_grad:
        raise Mistake("--head-lr: the classifier is frozen: leave out one of the two")


def started_by_this_launch(path):
    """True if the run in ``path`` is of this launch by torchrun, which restarts it after the death of a process."""
    launch = distributed.launch_id()
    with contextlib.suppress(Mistake):  # reported later, if it matters
        return launch is not None and stages(Run(path).latest()[0]["config"])[-1].get("launch") == launch
    return False


def run_directory(given):
    return Path(given.get("save") or f"work/{given.get('dataset', 'cifar10')}.base")


def read_saved(given):
    """The checkpoint to resume, and the arguments of its run. Raises Mistake if ``given`` contradicts them."""
    path = run_directory(given)
    Run(path).check(resume=True, overwrite=False)
    checkpoint, source = Run(path).latest()
    if source.name != "latest.pth":
        reason = f"{path / 'latest.pth'} is missing or damaged"
        print(f"{reason}: going on from {source}, after epoch {checkpoint['epoch']}", file=sys.stderr)
    saved = parse_again(checkpoint, source)
    if not {"optimizer", "metrics", "seconds", *(["ema"] if saved["ema"] else [])} <= checkpoint.keys():
        raise Mistake(f"training cannot go on from {source}: it holds weights only, or is too old")
    for name, value in given.items():
        if name not in RESUMABLE and value != saved[name]:
            flag = "--" + name.replace("_", "-")
            instead = f"leave out {flag}, or start another run with --save"
            raise Mistake(f"the run in {path} was started with {flag} {saved[name]}, not {value}: {instead}")
    epochs = given.get("epochs", saved["epochs"])
    if epochs < checkpoint["epoch"]:
        raise Mistake(f"--epochs {epochs}: the run in {path} has finished {checkpoint['epoch']} already")
    if epochs == checkpoint["epoch"] and given.get("lr", saved["lr"]) != saved["lr"]:
        raise Mistake(f"--lr {given['lr']:g}: no epoch of the run in {path} is left to train: add a larger --epochs")
    if saved["head_lr"] and given.get("lr"):  # in the same proportion; check_finetuning refuses 0
        saved["head_lr"] *= given["lr"] / saved["lr"]
    return checkpoint, saved | {"save": str(path), "resume": True, "overwrite": False, "progress": sys.stderr.isatty()}


def parse_again(checkpoint, path):
    """The arguments of a checkpoint's run, checked by the parser: they are written as flags and parsed.

    Flags that the run did not know take their defaults, which reproduce what it did. Raises Mistake if no command line
    gives these arguments, or if they are of another network; the message calls the checkpoint ``path``.
    """
    saved, model = checkpoint["config"]["arguments"], checkpoint["config"]["model"]
    parser, flags = make_parser(), []
    defaults = vars(parser.parse_args([]))
    saved = {name: value for name, value in saved.items() if name in defaults and name not in OWN}
    for name, value in saved.items():
        flag = name.replace("_", "-")
        if isinstance(value, list):
            flags += [f"--{flag}", *map(str, value)]
        elif value != defaults[name]:
            flags.append(f"--{'' if value else 'no-'}{flag}" if type(value) is bool else f"--{flag}={value}")
    try:
        parsed = vars(parser.parse_args(flags))
        complete = resolve_defaults(parsed, {"arch": parsed["arch"]} if parsed["arch"] else {})
        for name in defaults.keys() - OWN:
            if parsed[name] != saved.get(name, parsed[name]) or (parsed[name] is None) != (complete[name] is None):
                raise Mistake(f"its argument {name} is {saved.get(name, 'missing')}")
        options = model_options(argparse.Namespace(**parsed), len(checkpoint["classes"]))
        if json.dumps(options | model) != json.dumps(options):  # in an exported file, tuples are lists
            raise Mistake("its network is not that of its arguments")
        if not all(process.get("block", "naive") in [*BLOCKS] for process in stages(checkpoint["config"])):
            raise Mistake(f"its block is none of {', '.join(BLOCKS)}")
    except Mistake as error:
        raise Mistake(f"{path} was edited, or is of another program: {error}") from error
    return parsed
