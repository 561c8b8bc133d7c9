"""Train a DenseNet. Example: python train.py --dataset digits

Without arguments: DenseNet-BC-100 (growth rate 12) on augmented CIFAR-10 by the recipe of the paper (arXiv 1608.06993).
"""

import contextlib
import itertools
import math
import os
import sys
import time

import torch
from tqdm import tqdm

from common.checkpoints import FIRST_MANIFEST, load_weights
from common.config import stages
from common.console import Mistake, command, duration, one_line
from common.hardware import busy_note, choose_device, choose_precision, peak_memory_mib, set_up_device
from densenet import DenseNet
from inputs import datasets, splits
from inputs.batches import FLIPS, batch_positions, memory_format
from inputs.image import Reader
from training import distributed
from training.arguments import parse_args
from training.choice import choose_block
from training.ending import Interrupted, NotFinite, ending, interruptible
from training.finetune import freeze, parameter_groups, take, training_mode
from training.flags import as_flags, model_options, try_out
from training.recipe import RECIPES, learning_rate, make_optimizer, make_recipe
from training.run import Figures, Run, provenance
from training.step import GraphedStep, Step, compile_model, evaluate


def train_epoch(step, batches, schedule, bar):
    """Train on ``batches``, an iterator. Returns (steps, 3) float64: summed loss, wrong images, images of each step.

    ``schedule(i)`` is the learning rate of step i. Only the progress bar reads from the device, once a second. Raises
    NotFinite.
    """
    training_mode(step.model)
    log, total, refreshed = [], 0, time.monotonic()
    for i, (images, labels, count, *mixed) in enumerate(batches):
        step.set_learning_rate(schedule(i))
        log.append(step(images, labels, count, *mixed))
        if step.recipe.average:
            step.recipe.average.update()
        total = total + log[-1]
        bar.update(count)
        if time.monotonic() - refreshed > 1:
            mean_loss, error = averages(total[None])
            if not math.isfinite(mean_loss) and step.ranks == 1:  # several ranks must stop at the same step
                break
            bar.set_postfix(loss=f"{mean_loss:.3f}", error=f"{error:.1f} %")
            refreshed = time.monotonic()
    steps = distributed.all_reduce(torch.stack(log).cpu().double())
    broken = (~steps[:, 0].isfinite()).nonzero()
    if len(broken):
        raise NotFinite(int(broken[0]) + 1)
    return steps


def averages(steps):
    """Mean loss and error in percent over the images of ``steps`` (steps, 3)."""
    loss, wrong, count = steps.sum(0).tolist()
    return loss / count, 100 * wrong / count


def train_rows(steps, epoch, schedule, log_every, costs):
    """Rows of train.csv for an epoch: one per ``log_every`` steps, at fractional epochs, and one for all of it."""
    rows = []
    for end in range(log_every, len(steps), log_every) if log_every else ():
        loss, error = averages(steps[end - log_every : end])
        rows.append(log_row(epoch - 1 + end / len(steps), loss, error) | {"lr": schedule(end - 1)})
    return [*rows, log_row(epoch, *averages(steps)) | {"lr": schedule(len(steps) - 1)} | costs]


def log_row(epoch, loss, error):
    return {"epoch": round(epoch, 6), "loss": round(loss, 6), "error": round(error, 4)}


def prepare(args, checkpoint, device):
    """Set up the device and the random numbers, load the data set. Raises Mistake if it is not that of the run."""
    set_up_device(device)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # which only finds bugs
    reader = Reader.of_run(vars(args), progress=args.progress and distributed.rank() == 0)
    dataset = datasets.load_run(vars(args), args.data, reader, checkpoint["manifest"] if checkpoint else None)
    check_batches(args, len(dataset.train))
    if args.patience and dataset.valid is None:
        raise Mistake("--patience waits for a lower validation error: hold out images by --valid-size")
    if checkpoint:
        check_data(checkpoint, args, dataset)
    return dataset.to(device)


def check_batches(args, count):
    """Raises Mistake if ``count`` images are too few for the ranks, or make a batch of one that batch norm refuses."""
    if count < distributed.world_size():
        raise Mistake(f"{count} training images for {distributed.world_size()} processes: use fewer processes")
    share = distributed.rank(), distributed.world_size()
    positions = batch_positions(count, args.batch_size * args.accumulate, share)
    size = -(-args.batch_size // distributed.world_size())
    smallest = min(len(part) // max(1, -(-len(part) // size)) for part, _ in positions)  # of a forward pass
    if smallest < 2:
        try:
            try_out(args, batch_size=1)
        except ValueError as error:
            raise Mistake(f"--batch-size {args.batch_size} makes a batch of one image ({error})") from error


def make_batches(args, dataset, device):
    """Batches by split: "train", "valid" if images are held out, "test"."""
    common = {"normalize": dataset.normalize, "share": (distributed.rank(), distributed.world_size())}
    training = {"batch_size": args.batch_size * args.accumulate, "crop_fill": args.crop_fill if args.augment else None}
    training |= {name: getattr(args, name) for name in ("cutout", "mixup", "flip", "shift", "policy")}
    # Evaluation needs less memory than training, and larger batches keep a GPU busy. They only change rounding.
    size = args.batch_size * (4 if device.type == "cuda" else 1)
    return {
        name: split.batches(**common | (training if name == "train" else {"batch_size": size}))
        for name, split in dataset.splits.items()
    }


def restore(optimizer, saved):
    """Load an optimiser's state; its settings are those of the arguments. Raises Mistake if it is of another optimiser.

    All parameters that a loss has reached have the same entries: tensors of their shape, and a count of steps.
    """
    try:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["state"]})
        values = [(p, value) for p, state in optimizer.state.items() for value in state.values()]
        fits = len({frozenset(state) for state in optimizer.state.values()}) <= 1
        fits = fits and all(x.shape == p.shape or (x.shape == () and x >= 0) for p, x in values)
    except Exception:  # nearly anything
        fits = False
    if not fits:
        raise Mistake("the optimiser's state in the checkpoint is damaged, or of another program")


def go_on(args, checkpoint, dataset, process, parts):
    """Load a checkpoint into model, optimiser, scaler and average, and add this process to its config."""
    checkpoint["manifest"], checkpoint["config"]["arguments"] = dataset.manifest, vars(args)
    checkpoint["config"]["resumed"].append(process | {"epoch": checkpoint["epoch"]})
    load_weights(parts["model"], checkpoint["model"])
    restore(parts["optimizer"], checkpoint["optimizer"])
    if checkpoint.get("scaler"):  # empty if the run had another precision
        parts["scaler"].load_state_dict(checkpoint["scaler"])
    if "ema" in parts:
        parts["ema"].load_state_dict(checkpoint["ema"])


def first_checkpoint(args, dataset, model, process):
    """A checkpoint before the first epoch: a run can be resumed from the moment it exists."""
    parameters, options = sum(p.numel() for p in model.parameters()), model_options(args, len(dataset.classes))
    return {
        "epoch": 0,
        "seconds": 0.0,  # of the finished epochs, evaluations included
        "rng": {"seed": args.seed},  # with the epoch, the seed decides every random number
        "config": process | {"arguments": vars(args), "model": options, "parameters": parameters}
        | {"images": {name: len(split) for name, split in dataset.splits.items()}, "resumed": []},
        "normalize": dataset.normalize,
        "classes": list(dataset.classes),
        "metrics": {name: [] for name in logs_of(args, dataset)},
        "manifest": dataset.manifest,
        "measured": dataset.measured or dataset.normalize,
    }


def logs_of(args, dataset):
    """Names of a run's logs: those of the splits, and of the averaged weights on all but the training images."""
    splits = list(dataset.splits)
    return splits + [f"{name}-ema" for name in splits[1:] if args.ema]


def check_data(checkpoint, args, dataset):
    """Raises Mistake if the images or classes are not those that the run has been trained on."""
    options, logs, run = model_options(args, len(dataset.classes)), logs_of(args, dataset), f"the run in {args.save}"
    before = options | checkpoint["config"]["model"], checkpoint["classes"], checkpoint["measured"]
    if before != (options, list(dataset.classes), dataset.normalize):
        raise Mistake(f"{run} was trained on other images or classes than {args.data} holds now")
    if changed := splits.changed(checkpoint["manifest"], dataset):
        raise Mistake(f"images in {args.data} ({', '.join(changed)}) have changed since {run} began")
    if checkpoint["metrics"].keys() != set(logs):
        raise Mistake(f"{run} was trained with the splits {', '.join(checkpoint['metrics'])}, not {', '.join(logs)}")


def train_and_test(args, epoch, step, batches):
    """Train for one epoch and evaluate. Returns the new rows of each log."""
    model, device = step.model, step.skipped.device
    epoch_seed = args.seed * 1_000_003 + epoch
    # For dropout. Generators of CPUs only take the lower 32 bits of a seed: in those, ranks have to differ.
    torch.manual_seed(epoch_seed + 2_654_435_761 * distributed.rank())

    def schedule(i):
        return learning_rate(args, epoch, i / len(batches["train"]))

    # In the first epoch, cuDNN tries algorithms, which takes more memory than later steps. A CUDA graph keeps its own.
    if device.type == "cuda" and step.graphs is None:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.monotonic()
    step.skipped.zero_()
    hidden, label = not args.progress or distributed.rank() > 0, f"epoch {epoch}/{args.epochs}"
    with tqdm(total=batches["train"].num_images, desc=label, unit="img", leave=False, disable=hidden) as bar:
        steps = train_epoch(step, batches["train"].shuffled(epoch_seed), schedule, bar)
    distributed.average_statistics(model)
    costs = {
        "images_per_second": round(int(steps[:, 2].sum()) / (time.monotonic() - start), 1),
        "peak_memory_mib": round(peak_memory_mib(device), 1),
    }
    factor = step.optimizer.param_groups[0].get("lr_factor", 1)  # of the classifier, if only that is trained
    rows = {"train": train_rows(steps, epoch, lambda i: factor * schedule(i), args.log_every, costs)}
    networks = {"": model}
    if step.recipe.average:
        networks["-ema"] = step.recipe.average.model
        distributed.average_statistics(networks["-ema"])
    for (suffix, network), name in itertools.product(networks.items(), list(batches)[1:]):
        loss, error = evaluate(network, batches[name], step.amp)
        if not math.isfinite(loss):  # after the last update
            raise NotFinite(len(steps))
        rows[name + suffix] = [log_row(epoch, loss, error)]
    return rows


def advice(args, dataset):
    """Lines about a data set that the flags may not suit."""
    lines, names = [], {name.lower() for name in dataset.classes}
    if args.dataset == "folder" and not (args.init_from or args.resume) and len(dataset.train) < 5000:
        lines.append("few training images: weights trained on others may help, see --init-from")
    opposites = names & {name.replace("left", "right") for name in names if "left" in name}
    if opposites and args.augment and 1 in FLIPS[args.flip]:
        lines.append(f"class {min(opposites)} has an opposite, and images are mirrored: see --flip")
    return lines


def print_start(args, checkpoint, process, dataset, messages):
    name = args.arch or f"DenseNet{'-BC' if args.bottleneck else ''}-{args.depth} (k = {args.growth_rate})"
    counts = ", ".join(f"{len(split):,} {splits.KINDS[name]}" for name, split in dataset.splits.items())
    size, graph = checkpoint["config"]["parameters"], ", CUDA graph" if process["cuda_graph"] else ""
    print(f"{name}, {size:,} parameters, block {process['block']}{graph}, {process['precision']}")
    print(f"{args.dataset}: {counts} images in {len(dataset.classes)} classes")
    if args.recipe:
        print(f"recipe {args.recipe}: {as_flags({name: getattr(args, name) for name in RECIPES.get(args.recipe, {})})}")
    for message in messages:
        print(one_line(message))
    doing = f"resuming {args.save} after epoch {checkpoint['epoch']}" if args.resume else f"writing to {args.save}"
    print(f"{process['device']}; {doing}", flush=True)


def print_epoch(args, rows, skipped, seconds):
    """Print the line of an epoch, which took so many seconds, evaluations included."""
    train = rows["train"][-1]
    parts = [f"epoch {train['epoch']:3}/{args.epochs}", f"loss {train['loss']:.4f}", f"error {train['error']:5.2f} %"]
    parts += [f"{name} {rows[name][0]['error']:5.2f} %" for name in rows if name != "train"]
    left = duration(seconds * (args.epochs - train["epoch"]))
    parts += [f"lr {train['lr']:.3g}", f"{train['images_per_second']:.0f} images/s", f"{left} left"]
    parts += [f"{skipped} updates skipped, their gradients too large for fp16"] if skipped else []
    print("  ".join(parts), flush=True)


def print_end(args, first_epoch, run, seconds):
    if run.stopped_early:
        print(f"stopped early: no lower validation error since epoch {run.best('valid')['epoch']}")
    elif first_epoch > args.epochs:
        print(f"all epochs are done already: a larger --epochs than {args.epochs} goes on")
    final, best = run.rows["test"][-1], run.best("test")
    print(f"test error {final['error']:.2f} % after epoch {final['epoch']}; all epochs took {duration(seconds)}")
    if "test-ema" in run.rows:
        print(f"test error {run.rows['test-ema'][-1]['error']:.2f} % of the averaged weights, after the same epoch")
    if "valid" in run.rows:
        chosen = run.rows["test"][run.best("valid")["epoch"] - 1]
        why = "which has the lowest validation error (best.pth)"
        print(f"test error {chosen['error']:.2f} % at epoch {chosen['epoch']}, {why}")
    print(f"best on test {best['error']:.2f} %, epoch {best['epoch']}: chosen by looking at the test set, not a result")


def claim(args, checkpoint, run):
    """Lock the run directory. Raises Mistake if another process has written there since it was checked."""
    run.lock()
    run.check(args.resume, args.overwrite)
    if args.resume and run.latest()[0]["epoch"] != checkpoint["epoch"]:
        raise Mistake(f"another process went on with {run.path} meanwhile: run again")


def train(args, checkpoint, source, run):
    """Train to the last epoch, from a checkpoint, from the weights of a source, or afresh. Writes into ``run``."""
    device = distributed.on_every_rank(lambda: distributed.device_of_rank(choose_device(args.device)))
    dataset = distributed.local_rank_0_first(prepare, args, checkpoint, device)
    amp, precision = choose_precision(args.precision, device)
    distributed.on_rank_0(claim, args, checkpoint, run)
    dataset = dataset.normalized_as((checkpoint or source or {}).get("normalize"))
    batches = make_batches(args, dataset, device)

    messages, main_process = [*dataset.notes, *advice(args, dataset)], distributed.rank() == 0
    if checkpoint and checkpoint["manifest"] == FIRST_MANIFEST:
        messages.append("an earlier release began this run: it read turned, transparent, large images differently")
    messages += busy_note(device) if distributed.world_size() == 1 else []  # several ranks keep each other busy
    model = DenseNet(**model_options(args, len(dataset.classes)))
    model.to(device, memory_format=memory_format(device))
    if source:
        messages.append(take(model, source, args.init_from, list(dataset.classes)))
    if args.freeze is not None:
        messages.append(freeze(model, args.freeze))
    distributed.share_weights(model)
    how, reasons = distributed.on_rank_0(choose_block, args, checkpoint, dataset, model, device, precision)
    model.set_block(how["block"])

    optimizer = make_optimizer(args, parameter_groups(model, args.head_lr and args.head_lr / args.lr))
    recipe = make_recipe(args, model, dataset, distributed.world_size())
    options = distributed.world_size(), precision == "fp16", recipe
    step = (GraphedStep if how["cuda_graph"] else Step)(model, optimizer, amp, *options)
    parts = {"model": model, "optimizer": optimizer, "scaler": step.scaler}
    parts |= {"ema": recipe.average} if recipe.average else {}
    process = provenance(device, distributed.launcher()) | {"precision": precision} | how
    process |= {"lr": args.lr, "launch": distributed.launch_id()}
    if checkpoint:
        go_on(args, checkpoint, dataset, process, parts)
    else:
        checkpoint = first_checkpoint(args, dataset, model, process)
    if args.compile:
        compile_model(model)

    def state(epoch):
        return checkpoint | {"epoch": epoch} | {name: part.state_dict() for name, part in parts.items()}

    def start():
        run.start(state(checkpoint["epoch"]))
        print_start(args, checkpoint, process, dataset, [*messages, *reasons])

    distributed.on_rank_0(start)
    run.epoch, first_epoch = checkpoint["epoch"], checkpoint["epoch"] + 1
    with Figures(run.path, args.plot and main_process) as figures:
        for epoch in range(first_epoch, args.epochs + 1):
            if distributed.all_reduce(torch.tensor(float(run.stopped_early))):  # which rank 0 alone knows
                break
            begin, refused = time.monotonic(), step.refused
            rows = train_and_test(args, epoch, step, batches)
            if step.refused and not refused:
                print(f"no CUDA graph ({step.refused}): this run goes on with eager steps", flush=True)
                stages(checkpoint["config"])[-1]["no_cuda_graph"] = step.refused
            if main_process:
                seconds = time.monotonic() - begin
                checkpoint["seconds"] += seconds
                run.finish_epoch(state(epoch), rows)
                print_epoch(args, rows, int(step.skipped), seconds)
                figures.redraw()
    if main_process:
        print_end(args, first_epoch, run, checkpoint["seconds"])


@command
def main(argv=None):
    run = None
    with interruptible() as ignore_signals:
        try:
            with distributed.process_group():
                args, checkpoint, source = distributed.on_rank_0(parse_args, argv, __doc__)
                with Run(args.save) as run:
                    train(args, checkpoint, source, run)
        except (Exception, Interrupted) as error:
            ignore_signals()  # when a rank has died, torchrun sends SIGTERM to the others, which are reporting it
            status, message = ending(error, run)
            if message:
                with contextlib.suppress(OSError):  # the terminal may be closed
                    print(f"train.py: {one_line(message)}", file=sys.stderr)
            return status


if __name__ == "__main__":
    distributed.exit_from(main)
