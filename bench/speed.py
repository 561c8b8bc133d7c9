"""Speed and memory of DenseNet-BC (k = 12) side by side with other implementations, each checked before it is timed.

Example: python bench/speed.py --csv bench/cpu.csv --plot images/speed.png
         python bench/speed.py --candidates naive checkpoint fused --depths 40 70 100 130 --plot images/memory.png
         python bench/speed.py --whole-epochs 512      (data loading and evaluation included)
         python bench/speed.py --from bench/epyc.csv --plot images/speed.png      (draws what was measured before)
"""

import contextlib
import csv
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import candidates  # puts the repository's modules on the path
import torch
from torch.utils.flop_counter import FlopCounterMode

from common.console import Mistake, Parser, command, positive
from common.hardware import PRECISIONS, choose_device, choose_precision, synchronize
from densenet import BLOCKS, DenseNet, layers_per_block
from training import trial
from training.run import provenance

TURNS = 5  # timed, after one that is not


class CandidateError(Exception):
    """A candidate that cannot be measured. The message is one line."""


class Process:
    """A candidate in a process of its own, so that its peak of memory and its allocator are its own."""

    def __init__(self, job):
        self.job, self.seconds, self.peaks = job, {"train": [], "infer": []}, []
        command = [sys.executable, candidates.__file__, json.dumps(job)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self.read()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            raise CandidateError(f"{self.job['candidate']} ended early, for lack of memory if nothing is said above")
        return json.loads(line)

    def run(self, word):
        with contextlib.suppress(BrokenPipeError):  # read says that the process has ended
            print(word, file=self.process.stdin, flush=True)
        seconds, peak = self.read()
        self.seconds[word].append(seconds)
        self.peaks.append(peak)

    def quantiles(self, word):
        timed = sorted(self.seconds[word][1:])  # the first allocates, and compiles
        return [timed[round(q * (len(timed) - 1))] for q in (0.2, 0.5, 0.8)]

    def end(self):
        self.process.communicate()


# The table.


def answer(job, task):
    """What a candidate's process says that is started for one question."""
    process = Process(job | {"task": task})
    process.end()
    return process.ready


def assert_right(job, naive):
    """Errors of a candidate in its precision, as columns of its row.

    Raises CandidateError where it is another function in float64, or in its precision twice as far off as naive may be;
    and where naive is off by more than rounding.
    """
    ours = answer(job, "check")
    exact = all(error <= 1e-8 for error in ours["float64"].values())  # NaN fails, too
    if not trial.is_rounding(naive["draws"], job["precision"]):
        raise CandidateError(f"naive, the measure of rounding, is off by more than that: {naive['draws']}")
    if not exact or not trial.is_as_exact(ours["draws"], naive["draws"]):
        raise CandidateError(f"{job['candidate']} computes something else (relative errors {ours}): not timed")
    median = {kind: statistics.median(draw[kind] for draw in ours["draws"]) for kind in ("output", "gradients")}
    return {"output_error": f"{median['output']:.1e}", "gradient_error": f"{median['gradients']:.1e}"}


def jobs_of(args):
    """What to measure: candidates of one depth, precision and mode next to each other."""
    for depth in args.depths:
        for precision in args.precisions:
            for compiled in (False, True) if args.compile else (False,):
                for name in args.candidates:
                    if precision == "fp32" or name not in candidates.FP32_ONLY:
                        yield {"candidate": name, "depth": depth, "batch_size": args.batch_size, "precision": precision,
                               "compiled": compiled, "graph": args.cuda_graph, "device": args.device,
                               "task": "steps"}  # fmt: skip


def rows_of(args, device):
    """Yield the row of each job; says which one failed. All take turns with the reference: both feel what else runs."""
    naive_errors, floor = {}, make_floor(device, args.precisions)
    for job in jobs_of(args):
        kind, naive = (job["depth"], job["precision"]), job | {"candidate": "naive", "compiled": False}
        reference = job | {"candidate": args.reference, "compiled": False}
        if args.reference in candidates.FP32_ONLY:
            reference["precision"] = "fp32"
        try:
            naive_errors[kind] = naive_errors.get(kind) or answer(naive, "check")
            job |= assert_right(job, naive_errors[kind])
            row = row_of(*take_turns(job, reference))
        except CandidateError as error:
            print(f"speed.py: error: {error}", file=sys.stderr, flush=True)
            continue
        yield row | {"floor_share": round(floor(job) / row["ms"], 3)}


def take_turns(job, reference, times=1 + TURNS):
    """Processes of two jobs, after as many turns of each; both have ended."""
    processes = Process(job), Process(reference)
    for _ in range(times):
        for word in ("train", "infer"):
            for process in processes:
                process.run(word)
    for process in processes:
        process.end()
    return processes


def row_of(process, reference):
    row = process.job | {key: value for key, value in process.ready.items() if key == "saved_mib"}
    images = row.pop("num_images", row["batch_size"])
    low, median, high = process.quantiles("train")
    row |= {name: float(f"{1000 * value:.4g}") for name, value in (("ms", median), ("ms_20", low), ("ms_80", high))}
    _, inference, _ = process.quantiles("infer")
    row |= {"images_per_second": round(images / median, 1), "infer_images_per_second": round(images / inference, 1)}
    row["times_as_fast"] = round(reference.quantiles("train")[1] / median, 2)
    row["infer_times_as_fast"] = round(reference.quantiles("infer")[1] / inference, 2)
    row["peak_mib"] = round(max(process.peaks[2:]))  # without the first turn, in which cuDNN tries what is fastest
    return {name: value for name, value in row.items() if name not in ("device", "task")}


def print_row(row):
    name = f"{row['candidate']} {mode_of(row)}"
    speed = f"{row['ms']:8.2f} ms ({row['ms_20']:.2f} … {row['ms_80']:.2f})  {row['images_per_second']:8.1f} images/s"
    inference = f"inference {row['infer_images_per_second']:.1f} images/s × {row['infer_times_as_fast']:.2f}"
    times = f"× {row['times_as_fast']:.2f}"
    print(f"L={row['depth']:<4}{name:28}{speed} {times}  {inference}  {row['peak_mib']:,} MiB", flush=True)


def mode_of(row):
    """Precision, perhaps compiled or as a CUDA graph."""
    return " ".join([row["precision"], *["compiled"] * row["compiled"], *["graph"] * row.get("graph", False)])


def hardware(device, precision):
    """Bytes per second that a copy moves, reading and writing, and FLOP per second of a matrix product."""
    matrix = torch.randn(4096, 4096, device=device).to(PRECISIONS[precision])
    source, target = torch.ones(2, 64 * 2**20, device=device)
    copied = best_seconds(lambda: target.copy_(source), device)
    multiplied = best_seconds(lambda: matrix @ matrix, device)
    return 2 * source.nbytes / copied, 2 * 4096**3 / multiplied


def best_seconds(function, device, times=8):
    found = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found)


def make_floor(device, precisions):
    """A function job → the milliseconds that a training step takes at least on this hardware."""
    rates = {precision: hardware(device, precision) for precision in precisions}
    for precision, (copy, matrix) in rates.items():
        print(f"{precision}: copies {copy / 1e9:.1f} GB/s, multiplies matrices at {matrix / 1e9:.0f} GFLOP/s")

    def floor(job):
        copy, matrix = rates[job["precision"]]
        size = PRECISIONS[job["precision"]].itemsize
        seconds = max(moved_elements(job["depth"]) * size / copy, flops(job["depth"]) / matrix)
        return 1000 * seconds * job["batch_size"]

    return floor


def moved_elements(depth, k=12):
    """Elements of memory that the fused block reads and writes in a training step, per image.

    Forward, a layer reads its input and writes and reads its bottleneck; backward, it reads its input, reads and writes
    the gradient of that, and reads the bottleneck and its gradient twice; its output goes through memory twice.
    """
    layers, channels, total = layers_per_block(depth, bottleneck=True), 2 * k, 0
    for pixels in (32 * 32, 16 * 16, 8 * 8):
        for i in range(layers):
            total += pixels * (4 * (channels + i * k) + 6 * 4 * k + 2 * k)
        channels = (channels + layers * k) // 2
    return total


def flops(depth):
    """Of a training step, per image: the backward pass multiplies twice as much as the forward pass."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        DenseNet(depth=depth)(torch.empty(1, 3, 32, 32))
    return 3 * counter.get_total_flops()


def measure_epochs(args):
    """train.py's way of training against bamos/densenet.pytorch's, data loading and augmentation included."""
    job = {"depth": args.depths[0], "batch_size": args.batch_size, "compiled": False,
           "device": args.device, "task": "epochs", "num_images": args.whole_epochs}  # fmt: skip
    ours = job | {"candidate": "train.py", "precision": args.precisions[-1]}
    process, reference = take_turns(ours, job | {"candidate": "bamos", "precision": "fp32"}, times=4)
    return [row_of(process, reference), row_of(reference, reference)]


def finish(rows, path, origin):
    """Print rows and write them to a CSV file, each as it comes: an hour may lie between them. Returns all."""
    done = []
    with open(path, "w", newline="") if path else contextlib.nullcontext() as file:
        for row in rows:
            print_row(row)
            done.append(row)
            if file:
                writer = csv.DictWriter(file, row | origin, lineterminator="\n")
                if len(done) == 1:
                    writer.writeheader()
                writer.writerow(row | origin)
                file.flush()
    return done


def read_rows(path):
    """What ``finish`` has written, with numbers as numbers."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {name: int(row[name]) for name in ("depth", "batch_size")}
        row |= {name: row.get(name) == "True" for name in ("compiled", "graph")}
        row |= {name: float(row[name]) for name in ("saved_mib", "peak_mib", "images_per_second")}
    return rows


def plot(rows, path):
    """Memory against depth where there are several depths, else images per second of each row."""
    from matplotlib.figure import Figure

    if len({row["depth"] for row in rows}) > 1:
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        plot_memory(rows, figure)
    else:
        figure = Figure(figsize=(9, 1.6 + 0.28 * len(rows)), layout="constrained")
        plot_speed(rows, figure)
    figure.savefig(path, dpi=150)


def plot_memory(rows, figure):
    panels = figure.subplots(1, 2)
    figure.suptitle(f"DenseNet-BC (k = 12), batch {rows[0]['batch_size']}, {rows[0]['device']}", fontsize=10)
    styles = {"naive": ("#D55E00", "-", "o"), "checkpoint": ("#0072B2", "--", "s"), "fused": ("#009E73", "-.", "^")}
    titles = {"saved_mib": "kept by autograd (MiB)", "peak_mib": "peak (MiB)"}
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        for name, (color, line, marker) in styles.items():
            points = [(row["depth"], row[column]) for row in rows if row["candidate"] == name]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, linestyle=line, marker=marker, label=name)
        axes.set(xlabel="depth", ylabel=title, ylim=(0, None), xticks=sorted({row["depth"] for row in rows}))
        axes.grid(color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)


def plot_speed(rows, figure):
    modes = {}  # → its rows, the fastest first
    for row in sorted(rows, key=lambda row: -row["images_per_second"]):
        modes.setdefault(mode_of(row), []).append(row)
    network = f"DenseNet-BC-{rows[0]['depth']} (k = 12), batch {rows[0]['batch_size']}"
    figure.suptitle(f"{network}, {rows[0]['device']}; in green the blocks of this repository", fontsize=10)
    panels = figure.subplots(len(modes), 2, squeeze=False, sharex="col", height_ratios=[*map(len, modes.values())])
    titles = {"images_per_second": "training (images/s)", "peak_mib": "peak of memory (MiB)"}
    for line, (mode, shown) in zip(panels, modes.items(), strict=True):
        for axes, column in zip(line, titles, strict=True):
            colors = ["#009E73" if row["candidate"] in BLOCKS else "0.6" for row in shown]
            bars = axes.barh([row["candidate"] for row in shown], [row[column] for row in shown], color=colors)
            axes.bar_label(bars, fmt="{:,.0f}", padding=3)
            axes.margins(x=0.15)
            axes.invert_yaxis()
            axes.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel(mode)
        line[1].set_yticks([])
    for axes, title in zip(panels[-1], titles.values(), strict=True):
        axes.set_xlabel(title)


def parse_args(argv=None):
    parser = Parser(prog="speed.py", description=__doc__)
    names = [*BLOCKS, *candidates.available()]
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="images (default: %(default)s)")
    parser.add_argument("--depths", type=int, nargs="+", default=[100], metavar="L", help="(default: 100)")
    parser.add_argument("--candidates", nargs="+", choices=names, default=names, metavar="NAME",
        help=f"of {', '.join(names)} (default: all)")  # fmt: skip
    parser.add_argument("--reference", choices=names, default="bamos", metavar="NAME",
        help="the others take turns with it; bamos and gpleiss always in fp32 (default: %(default)s)")  # fmt: skip
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, metavar="NAME",
        help=f"of {', '.join(PRECISIONS)} (default: fp32, and what auto is for train.py)")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="measure with torch.compile, too (minutes)")
    parser.add_argument("--cuda-graph", action="store_true", help="replay training steps as CUDA graphs")
    parser.add_argument("--whole-epochs", type=positive, metavar="N", help="time epochs of N images instead of steps")
    parser.add_argument("--profile", action="store_true", help="print where a training step's time goes instead")
    parser.add_argument("--csv", metavar="FILE", help="write the rows there, too")
    parser.add_argument("--plot", metavar="FILE", help="draw speed there or, with several depths, memory")
    parser.add_argument("--from", dest="source", metavar="FILE", help="draw the rows of a CSV file; measure nothing")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    for depth in args.depths:
        try:
            layers_per_block(depth, bottleneck=True)
        except ValueError as error:
            raise Mistake(f"--depths: {error}") from error
    args.precisions = args.precisions or list(dict.fromkeys(("fp32", choose_precision("auto", device)[1])))
    if args.cuda_graph and (device.type != "cuda" or "fp16" in args.precisions):
        raise Mistake("--cuda-graph is for a CUDA GPU, in bf16 or fp32: leave it out")
    if args.cuda_graph and (args.compile or args.profile or args.whole_epochs):
        raise Mistake("--cuda-graph is for plain training steps: leave it out, or --compile, --profile, --whole-epochs")
    if not list(jobs_of(args)):
        raise Mistake(f"{', '.join(candidates.FP32_ONLY)} run in fp32: choose other --candidates, or --precisions fp32")
    return args, device


@command
def main(argv=None):
    """Measure what the arguments say. Returns the exit status: 1 where a candidate's row is missing."""
    args, device = parse_args(argv)
    if args.source:
        plot(read_rows(args.source), args.plot or str(Path(args.source).with_suffix(".png")))
        return 0
    try:
        return run(args, device)
    except CandidateError as error:
        print(f"speed.py: error: {error}", file=sys.stderr)
        return 1


def run(args, device):
    measured_on = provenance(device)
    torch_version, hardware_name = measured_on["versions"]["torch"], measured_on["device"]
    print(f"torch {torch_version}, {hardware_name}, DenseNet-BC (k = 12), batch {args.batch_size}")
    if args.profile:
        for job in jobs_of(args):
            print(answer(job, "profile"), flush=True)
        return 0
    expected = 2 if args.whole_epochs else len(list(jobs_of(args)))
    origin = {"device": hardware_name, "torch": torch_version, "commit": measured_on["commit"]}
    if args.csv:
        Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
    rows = finish(measure_epochs(args) if args.whole_epochs else rows_of(args, device), args.csv, origin)
    if args.plot and rows:
        plot([row | origin for row in rows], args.plot)
    return 0 if len(rows) == expected else 1


if __name__ == "__main__":
    sys.exit(main())
