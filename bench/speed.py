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
from densenet import BLOCKS, layers_per_block
from training import trial
from training.run import provenance

TURNS = 5  # timed, after one that is not


class CandidateError(Mistake):
    """A candidate that cannot be measured."""


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
            raise CandidateError(f"{self.job['candidate']} ended early, for lack of memory if nothing is said above")
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
    """What a candidate's process says that is started for one question."""
    process = Process(job | {"task": task})
    process.communicate()
    return process.ready


def assert_right(job, ours, naive):
    """Errors of a candidate in its precision, as columns of its row, from its answer and naive's to "check".

    Raises CandidateError if it is another function in float64, or in its precision twice as far off as naive may be;
    and if naive is off by more than rounding.
    """
    exact = all(error <= 1e-8 for error in ours["float64"].values())  # NaN fails, too
    if not trial.is_rounding(naive["draws"], job["precision"]):
        raise CandidateError(f"naive, the measure of rounding, is off by more than that: {naive['draws']}")
    if not exact or not trial.is_as_exact(ours["draws"], naive["draws"]):
        raise CandidateError(f"{job['candidate']} computes something else (relative errors {ours}): not timed")
    median = {kind: statistics.median(draw[kind] for draw in ours["draws"]) for kind in ("output", "gradients")}
    return {"output_error": f"{median['output']:.1e}", "gradient_error": f"{median['gradients']:.1e}"}


def jobs_of(args):
    """What to measure: candidates of one depth and precision next to each other."""
    how = {"graph": args.cuda_graph, "kernels": args.kernels, "device": args.device, "task": "steps"}
    for depth, precision, name in itertools.product(args.depths, args.precisions, args.candidates):
        if precision == "fp32" or name not in candidates.FP32_ONLY:
            kind = {"candidate": name, "depth": depth, "batch_size": args.batch_size, "precision": precision}
            yield kind | how


def rows_of(args):
    """Yield the row of each job; says which one failed. All take turns with the reference: both feel what else runs."""
    naive_errors = {}
    for job in jobs_of(args):
        kind, reference = (job["depth"], job["precision"]), job | {"candidate": args.reference}
        if args.reference in candidates.FP32_ONLY:
            reference["precision"] = "fp32"
        try:
            if kind not in naive_errors:
                naive_errors[kind] = answer(job | {"candidate": "naive"}, "check")
            job |= assert_right(job, answer(job, "check"), naive_errors[kind])
            yield row_of(*take_turns(job, reference))
        except CandidateError as error:
            print(f"speed.py: error: {error}", file=sys.stderr, flush=True)


def take_turns(job, reference, times=1 + TURNS):
    """Processes of two jobs, after as many turns of each; both have ended."""
    processes = Process(job), Process(reference)
    for _ in range(times):
        for word in ("train", "infer"):
            for process in processes:
                process.run(word)
    for process in processes:
        process.communicate()
    return processes


def row_of(process, reference):
    row = process.job | {key: value for key, value in process.ready.items() if key == "saved_mib"}
    images = row["batch_size"]
    low, median, high = process.quantiles("train")
    row |= {name: float(f"{1000 * value:.4g}") for name, value in (("ms", median), ("ms_20", low), ("ms_80", high))}
    _, inference, _ = process.quantiles("infer")
    row |= {"images_per_second": round(images / median, 1), "infer_images_per_second": round(images / inference, 1)}
    row["times_as_fast"] = round(reference.quantiles("train")[1] / median, 2)
    row["infer_times_as_fast"] = round(reference.quantiles("infer")[1] / inference, 2)
    row["peak_mib"] = round(max(process.peaks[2:]))  # without the first turn, in which cuDNN tries what is fastest
    return {name: value for name, value in row.items() if name not in ("device", "task")}


def finish(rows, path, origin):
    """Print rows and write them to a CSV file, each as it comes: an hour may lie between them. Returns all."""
    done = []
    for row in rows:
        done.append(row | origin)
        name = f"L={row['depth']:<4}{row['candidate']} {row['precision']}{' graph' if row['graph'] else ''}"
        speed = f"{row['images_per_second']:8.1f} images/s × {row['times_as_fast']:.2f}"
        inference = f"inference {row['infer_images_per_second']:.1f} images/s × {row['infer_times_as_fast']:.2f}"
        print(f"{name:38}{row['ms']:8.2f} ms ({row['ms_20']:.2f} … {row['ms_80']:.2f})", end="  ")
        print(speed, inference, f"{row['peak_mib']:,} MiB", sep="  ", flush=True)
        if path:
            pd.DataFrame(done).to_csv(path, index=False)
    return done


def plot(rows, path):
    """Memory against depth if it was measured at several depths, else images per second and peak memory of each row."""
    depths = rows.depth.nunique() > 1 and "saved_mib" in rows
    figure = Figure(figsize=(9, 3.8 if depths else 1.6 + 0.28 * len(rows)), layout="constrained")
    (plot_memory if depths else plot_speed)(rows, figure)
    figure.savefig(path, dpi=150)


def plot_memory(rows, figure):
    figure.suptitle(f"DenseNet-BC (k = 12), batch {rows.batch_size[0]}, {rows.device[0]}", fontsize=10)
    titles = {"saved_mib": "kept by autograd (MiB)", "peak_mib": "peak (MiB)"}
    panels = figure.subplots(1, 2)
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        columns = rows.pivot(index="depth", columns="candidate", values=column)[rows.candidate.unique()]
        columns.plot(ax=axes, ylim=(0, None), xticks=columns.index, ylabel=title, marker="o", legend=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)


def plot_speed(rows, figure):
    """A bar for each row; the title says what they share, the labels in what they differ."""
    kinds = [name for name in ("depth", "batch_size", "precision", "graph") if name in rows]
    different = [name for name in kinds if rows[name].nunique() > 1]
    shared = [f"{name.replace('_', ' ')} {rows[name][0]}" for name in kinds if name not in different]
    title = ", ".join(["DenseNet-BC (k = 12)", *shared, rows.device[0]])
    figure.suptitle(f"{title}; in green the blocks of this repository", fontsize=10)
    rows = rows.sort_values([*different, "images_per_second"], ignore_index=True)
    labels = rows[["candidate", *different]].astype(str).agg(", ".join, axis=1)
    colors = ["#009E73" if name in BLOCKS else "0.6" for name in rows.candidate]
    titles = {"images_per_second": "training (images/s)", "peak_mib": "peak of memory (MiB)"}
    for axes, (column, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        axes.bar_label(axes.barh(rows.index, rows[column], color=colors), fmt="{:,.0f}", padding=3)
        axes.set(xlabel=title, ymargin=0.02, xmargin=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_yticks(rows.index, labels)


def make_parser():
    parser = Parser(prog="speed.py", description=__doc__)
    names = candidates.NAMES
    eager = [name for name in names if not name.endswith(candidates.COMPILED)]
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="images (default: %(default)s)")
    parser.add_argument("--depths", type=int, nargs="+", default=[100], metavar="L", help="(default: 100)")
    parser.add_argument("--candidates", nargs="+", choices=names, default=eager, metavar="NAME",
        help=f"of {', '.join(names)} (default: all that need no minutes to compile)")  # fmt: skip
    parser.add_argument("--reference", choices=names, default="bamos", metavar="NAME",
        help="the others take turns with it; bamos and gpleiss always in fp32 (default: %(default)s)")  # fmt: skip
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, metavar="NAME",
        help=f"of {', '.join(PRECISIONS)} (default: fp32, and what auto is for train.py)")  # fmt: skip
    parser.add_argument("--cuda-graph", action="store_true", help="replay training steps as CUDA graphs")
    parser.add_argument("--kernels", nargs=2, type=positive, metavar=("PROGRAMS", "IMAGES"),
        help="other constants of fused/kernels.py (default: 2 64)")  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="print where a training step's time goes instead")
    parser.add_argument("--csv", metavar="FILE", help="write the rows there, too")
    parser.add_argument("--plot", metavar="FILE", help="draw speed there or, with several depths, memory")
    parser.add_argument("--from", dest="source", metavar="FILE", help="draw the rows of a CSV file; measure nothing")
    return parser


def parse_args(argv=None):
    args = make_parser().parse_args(argv)
    device = choose_device(args.device)
    for depth in args.depths:
        try:
            layers_per_block(depth, bottleneck=True)
        except ValueError as error:
            raise Mistake(f"--depths: {error}") from error
    args.precisions = args.precisions or list(dict.fromkeys(("fp32", choose_precision("auto", device)[1])))
    if args.cuda_graph and device.type != "cuda":
        raise Mistake("--cuda-graph is for a CUDA GPU: leave it out")
    if not list(jobs_of(args)):
        raise Mistake(f"{', '.join(candidates.FP32_ONLY)} run in fp32: choose other --candidates, or --precisions fp32")
    return args, device


@command
def main(argv=None):
    """Measure what the arguments say. Returns the exit status: 1 if a candidate's row is missing."""
    args, device = parse_args(argv)
    if args.source:
        plot(pd.read_csv(args.source), args.plot or Path(args.source).with_suffix(".png"))
        return 0
    found = provenance(device)
    origin = {"device": found["device"], "torch": found["versions"]["torch"], "commit": found["commit"]}
    print(f"torch {origin['torch']}, {origin['device']}, DenseNet-BC (k = 12), batch {args.batch_size}")
    if args.profile:
        for job in jobs_of(args):
            print(answer(job, "profile"), flush=True)
        return 0
    if args.csv:
        Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
    rows = finish(rows_of(args), args.csv, origin)
    if args.plot and rows:
        plot(pd.DataFrame(rows), args.plot)
    return 0 if len(rows) == len(list(jobs_of(args))) else 1


if __name__ == "__main__":
    sys.exit(main())
