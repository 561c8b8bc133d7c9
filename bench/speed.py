"""Speed and memory of DenseNet-BC (k = 12) side by side with other implementations, each checked before it is timed.

Example: python bench/speed.py --csv bench/cpu.csv --plot images/speed.png
         python bench/speed.py --candidates naive checkpoint fused --depths 40 70 100 130 --plot images/memory.png
         python bench/speed.py --from bench/epyc.csv --plot images/speed.png      (draws what was measured before)
"""

import contextlib
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path

import candidates  # puts the repository's modules on the path
import pandas as pd
from matplotlib.figure import Figure

from common.console import Mistake, Parser, command, positive
from common.hardware import PRECISIONS, choose_device, choose_precision
from densenet import BLOCKS
from training import trial
from training.run import provenance

ROUNDS = 5  # timed, after one that is not
LINE = (
    "L={depth} {candidate} {precision}: {ms} ms ({ms_20} … {ms_80}), {images_per_second} images/s × {times_as_fast}, "
    "inference {infer_images_per_second} images/s × {infer_times_as_fast}, {peak_mib:,} MiB"
)


class Process(subprocess.Popen):
    """A candidate in a process of its own, so that its peak of memory and its allocator are its own."""

    def __init__(self, job):
        self.job, self.seconds, self.peaks = job, {"train": [], "infer": []}, []
        command = [sys.executable, candidates.__file__, json.dumps(job)]
        super().__init__(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self.read()

    def read(self):
        line = self.stdout.readline()
        if not line:
            raise Mistake(f"{self.job['candidate']} ended early, for lack of memory if nothing is said above")
        return json.loads(line)

    def run(self, word):
        with contextlib.suppress(BrokenPipeError):  # read says that the process has ended
            print(word, file=self.stdin, flush=True)
        seconds, peak = self.read()
        self.seconds[word].append(seconds)
        self.peaks.append(peak)

    def quantiles(self, word):
        timed = sorted(self.seconds[word][1:])  # the first allocates
        return [timed[round(q * (len(timed) - 1))] for q in (0.2, 0.5, 0.8)]


def answer(job, task):
    """A candidate's answer to one question, from a process started for it."""
    process = Process(job | {"task": task})
    process.communicate()
    return process.ready


def assert_right(job, ours, naive):
    """Errors of a candidate in its precision, as columns of its row, from its answer and naive's to "check".

    Raises Mistake if it is another function in float64, or in its precision twice as far off as naive may be;
    and if naive is off by more than rounding.
    """
    exact = all(error <= 1e-8 for error in ours["float64"].values())  # NaN fails, too
    if not trial.is_rounding(naive["trials"], job["precision"]):
        raise Mistake(f"naive, the measure of rounding, is off by more than that: {naive['trials']}")
    if not exact or not trial.is_as_exact(ours["trials"], naive["trials"]):
        raise Mistake(f"{job['candidate']} computes something else (relative errors {ours}): not timed")
    median = {name: statistics.median(errors[name] for errors in ours["trials"]) for name in ("output", "gradients")}
    return {"output_error": f"{median['output']:.1e}", "gradient_error": f"{median['gradients']:.1e}"}


def jobs_of(args):
    """What to measure: candidates of one depth and precision next to each other. Raises Mistake if it is nothing."""
    how = {"graph": args.cuda_graph, "kernels": args.kernels, "device": args.device, "task": "steps"}
    jobs = [
        {"candidate": name, "depth": depth, "batch_size": args.batch_size, "precision": precision} | how
        for depth, precision, name in itertools.product(args.depths, args.precisions, args.candidates)
        if precision == "fp32" or name != "bamos"  # it has no mixed precision
    ]
    if not jobs:
        raise Mistake("bamos runs in fp32: choose other --candidates, or --precisions fp32")
    return jobs


def rows_of(jobs, name):
    """Yield the row of each job; print the error of one that fails. Each runs in turns with the reference ``name``."""
    naive_errors = {}
    for job in jobs:
        key, reference = (job["depth"], job["precision"]), job | {"candidate": name}
        if name == "bamos":
            reference["precision"] = "fp32"
        try:
            if key not in naive_errors:
                naive_errors[key] = answer(job | {"candidate": "naive"}, "check")
            errors = assert_right(job, answer(job, "check"), naive_errors[key])
            yield row_of(*measure(job | errors, reference))
        except Mistake as error:
            print(f"speed.py: error: {error}", file=sys.stderr, flush=True)


def measure(*jobs):
    """The processes of two jobs, which ran step by step in turns, so that other work slows down both."""
    processes = [Process(job) for job in jobs]
    for _, word, process in itertools.product(range(1 + ROUNDS), ("train", "infer"), processes):
        process.run(word)
    for process in processes:
        process.communicate()
    return processes


def row_of(process, reference):
    (low, median, high), (_, inference, _) = process.quantiles("train"), process.quantiles("infer")
    images = process.job["batch_size"]
    row = {name: value for name, value in process.ready.items() if name not in ("device", "task")}
    row |= {name: float(f"{1000 * value:.4g}") for name, value in (("ms", median), ("ms_20", low), ("ms_80", high))}
    return row | {
        "images_per_second": round(images / median, 1),
        "infer_images_per_second": round(images / inference, 1),
        "times_as_fast": round(reference.quantiles("train")[1] / median, 2),
        "infer_times_as_fast": round(reference.quantiles("infer")[1] / inference, 2),
        "peak_mib": round(max(process.peaks[2:])),  # without the first round, in which cuDNN tries what is fastest
    }


def plot(rows, path):
    """Memory against depth if it was measured at several depths, else images per second and peak memory of each row."""
    depths = rows.depth.nunique() > 1 and "saved_mib" in rows
    figure = Figure(figsize=(9, 3.8 if depths else 1.6 + 0.28 * len(rows)), layout="constrained")
    (plot_memory if depths else plot_speed)(rows, figure)
    figure.savefig(path, dpi=150)


def plot_memory(rows, figure):
    figure.suptitle(f"DenseNet-BC (k = 12), batch {rows.batch_size[0]}, {rows.device[0]}", fontsize=10)
    titles = {"saved_mib": "kept by autograd (MiB)", "peak_mib": "peak (MiB)"}
    for axes, (column, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        columns = rows.pivot(index="depth", columns="candidate", values=column)[rows.candidate.unique()]
        columns.plot(ax=axes, ylim=(0, None), xticks=columns.index, ylabel=title, marker="o")


def plot_speed(rows, figure):
    """Draw a bar for each row; the title says what they share, the labels in what they differ."""
    settings = [name for name in ("depth", "batch_size", "precision", "graph") if name in rows]
    different = [name for name in settings if rows[name].nunique() > 1]
    shared = [f"{name.replace('_', ' ')} {rows[name][0]}" for name in settings if name not in different]
    title = ", ".join(["DenseNet-BC (k = 12)", *shared, rows.device[0]])
    figure.suptitle(f"{title}; in green the blocks of this repository", fontsize=10)
    rows = rows.sort_values([*different, "images_per_second"], ignore_index=True)
    labels = rows[["candidate", *different]].astype(str).agg(", ".join, axis=1)
    colors = ["#009E73" if name in BLOCKS else "0.6" for name in rows.candidate]
    titles = {"images_per_second": "training (images/s)", "peak_mib": "peak memory (MiB)"}
    for axes, (column, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        axes.bar_label(axes.barh(rows.index, rows[column], color=colors), fmt="{:,.0f}", padding=3)
        axes.set(xlabel=title, xmargin=0.15)
    axes.set_yticks(rows.index, labels)


def make_parser():
    parser = Parser(prog="speed.py", description=__doc__)
    add, names = parser.add_argument, candidates.NAMES
    eager = [name for name in names if not name.endswith(candidates.COMPILED)]
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    add("--batch-size", type=positive, default=64, metavar="N", help="images (default: %(default)s)")
    add("--depths", type=int, choices=range(10, 251, 6), nargs="+", default=[100], metavar="L", help="(default: 100)")
    add("--candidates", nargs="+", choices=names, default=eager, help="(default: all but the compiled ones)")
    add("--reference", choices=names, default="bamos", metavar="NAME", help="(default: %(default)s, always in fp32)")
    add("--precisions", nargs="+", choices=PRECISIONS, help="(default: fp32, and what auto is for train.py)")
    add("--cuda-graph", action="store_true", help="replay training steps as CUDA graphs")
    add("--kernels", nargs=2, type=positive, metavar=("PROGRAMS", "IMAGES"), help="constants of fused/kernels.py")
    add("--profile", action="store_true", help="print where a training step's time goes instead")
    add("--csv", metavar="FILE", help="write the rows to this file, too")
    add("--plot", metavar="FILE", help="draw speed or, with several depths, memory")
    add("--from", dest="source", metavar="FILE", help="draw the rows of a CSV file; measure nothing")
    return parser


def parse_args(argv=None):
    args = make_parser().parse_args(argv)
    device = choose_device(args.device)
    args.precisions = args.precisions or list(dict.fromkeys(("fp32", choose_precision("auto", device)[1])))
    if args.cuda_graph and device.type != "cuda":
        raise Mistake("--cuda-graph is for a CUDA GPU: leave it out")
    return args, device


@command
def main(argv=None):
    """Measure what the arguments say. Returns the exit status: 1 if a candidate's row is missing."""
    args, device = parse_args(argv)
    if args.source:
        plot(pd.read_csv(args.source), args.plot or Path(args.source).with_suffix(".png"))
        return 0
    jobs, rows, run = jobs_of(args), [], provenance(device)
    origin = {"device": run["device"], "torch": run["versions"]["torch"], "commit": run["commit"]}
    print(f"torch {origin['torch']}, {origin['device']}, DenseNet-BC (k = 12), batch {args.batch_size}")
    if args.profile:
        for job in jobs:
            print(answer(job, "profile"), flush=True)
        return 0
    if args.csv:
        Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
    for row in rows_of(jobs, args.reference):
        rows.append(row | origin)
        print(LINE.format(**row), flush=True)
        if args.csv:  # after each row: an hour may lie between two
            pd.DataFrame(rows).to_csv(args.csv, index=False)
    if args.plot and rows:
        plot(pd.DataFrame(rows), args.plot)
    return 0 if len(rows) == len(jobs) else 1


if __name__ == "__main__":
    sys.exit(main())
