"""Speed and memory of DenseNet-BC (k = 12) side by side with other implementations, each checked before it is timed.

Example: python bench.py --csv work/bench/cpu.csv --plot images/speed.png
         python bench.py --candidates naive checkpoint fused --depths 40 70 100 130 --plot images/memory.png
         python bench.py --whole-epochs 512      (data loading and evaluation included)
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import peers
from densenet import BLOCKS, DenseNet, layers_per_block
from evaluate import choose_device, choose_precision, set_up_device
from workdir import peak_memory_mib, provenance

STEPS = 5  # timed, after one that is not
REFERENCE = "bamos"  # the way both seeds train: contiguous fp32, eager, concatenation
CHECKED_IMAGES = 8


def make_model(name, depth):
    """A candidate's network, in training mode, with the weights that all candidates share."""
    torch.manual_seed(0)
    ours = DenseNet(depth=depth, block=name if name in BLOCKS else "naive")
    return ours if name in BLOCKS else peers.MODELS[name](ours)


def place(model, name, device):
    """On the device, in the memory format that the candidate's users have."""
    layout = torch.channels_last if name in BLOCKS else torch.contiguous_format
    return model.to(device, memory_format=layout), layout


def make_images(count, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64)
    return images.to(device, dtype), torch.randint(10, (count,), generator=generator).to(device)


# What the processes of the candidates do. ``job`` is a row of the table that says what to measure.


def gradients(model, images, labels, amp):
    """Output and all gradients, flattened in our order of parameters, in float64 on the CPU."""
    with amp():
        out = model(images)
    F.cross_entropy(out.to(torch.promote_types(out.dtype, torch.float32)), labels).backward()
    named = {peers.our_name(name): p.grad for name, p in model.named_parameters()}
    flat = torch.cat([named[name].double().cpu().flatten() for name in sorted(named)])
    return out.detach().double().cpu(), flat


def check(job, device):
    """Relative errors of output and gradients against float64."""
    amp, _ = choose_precision(job["precision"], device)
    images, labels = make_images(CHECKED_IMAGES, "cpu", torch.float64)
    exact = gradients(make_model("naive", job["depth"]).double(), images, labels, choose_precision("fp32", device)[0])
    model, layout = place(make_model(job["candidate"], job["depth"]), job["candidate"], device)
    if job["compiled"]:
        model.compile()
    found = gradients(model, images.to(device, torch.float32, memory_format=layout), labels.to(device), amp)
    return [((ours - true).norm() / true.norm()).item() for ours, true in zip(found, exact, strict=True)]


def step_functions(job, device):
    """Two functions, a training step and an inference, each on one batch that is on the device already."""
    amp, _ = choose_precision(job["precision"], device)
    model, layout = place(make_model(job["candidate"], job["depth"]), job["candidate"], device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    images, labels = make_images(job["batch_size"], device)
    images = images.to(memory_format=layout)
    job["saved_mib"] = round(saved_bytes(lambda: model(images), model, amp) / 2**20, 1)
    if job["compiled"]:
        model.compile()

    def train():
        model.train()
        optimizer.zero_grad()
        with amp():
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    @torch.no_grad()
    def infer():
        model.eval()
        with amp():
            model(images)

    return train, infer


def saved_bytes(forward, model, amp):
    """Bytes that autograd keeps between forward and backward pass, each storage once, parameters not counted."""
    kept, parameters = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor lives on, so no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), amp():
        out = forward()
    del out
    return sum(size for size, _ in kept.values())


def serve(job):
    """A candidate's process: answers each word on its standard input, "train" or "infer", with seconds."""
    device = choose_device(job["device"])
    if job["candidate"] in BLOCKS:
        set_up_device(device)
    if job["task"] in ("check", "profile"):
        print(json.dumps({"check": check, "profile": profile}[job["task"]](job, device)))
        return
    if job["task"] == "epochs":
        train, infer = peers.epoch_functions(job["candidate"], job["depth"], job["batch_size"], job["images"], device)
    else:
        train, infer = step_functions(job, device)
    print(json.dumps(job), flush=True)
    for word in sys.stdin:
        start = time.perf_counter()
        {"train": train, "infer": infer}[word.strip()]()
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(json.dumps([time.perf_counter() - start, peak_memory_mib(device)]), flush=True)


def profile(job, device):
    """The ten operations that take most of a training step, as a table; our loops stand under SharedBuffer."""
    from torch.profiler import ProfilerActivity, profile

    train, _ = step_functions(job, device)
    train()
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
    with profile(activities=activities) as profiler:
        train()
    kind = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    operations = sorted(profiler.key_averages(), key=lambda operation: -getattr(operation, kind))
    total = sum(getattr(operation, kind) for operation in operations)
    lines = [f"| {job['candidate']}, {job['precision']}: operation | calls | ms | share |", "|---|---|---|---|"]
    for operation in operations[:10]:
        spent = getattr(operation, kind)
        name = operation.key.removeprefix("aten::")
        lines.append(f"| {name} | {operation.count} | {spent / 1000:.0f} | {100 * spent / total:.0f} % |")
    return "\n".join([*lines, f"| all | | {total / 1000:.0f} | |\n"])


class Process:
    """A candidate in a process of its own, so that its peak of memory and its allocator are its own."""

    def __init__(self, job):
        self.job, self.seconds = job, {"train": [], "infer": []}
        command = [sys.executable, __file__, "--serve", json.dumps(job)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self.read()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"bench.py: error: {self.job['candidate']} ended early, for lack of memory? Try --candidates")
        return json.loads(line)

    def run(self, word):
        print(word, file=self.process.stdin, flush=True)
        seconds, peak = self.read()
        self.seconds[word].append(seconds)
        self.job["peak_mib"] = max(round(peak), self.job.get("peak_mib", 0))

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


def assert_right(job, naive_errors):
    """Exit where a candidate's error against float64 is more than twice naive's in the same precision."""
    errors = answer(job, "check")
    if not all(error <= 2 * allowed + 1e-6 for error, allowed in zip(errors, naive_errors, strict=True)):
        wrong = ", ".join(f"{value:.1e}" for value in errors)
        sys.exit(f"bench.py: error: {job['candidate']} computes something else (relative errors {wrong}): not timed")
    return {"output_error": f"{errors[0]:.1e}", "gradient_error": f"{errors[1]:.1e}"}


def jobs_of(args):
    """What to measure: candidates of one depth, precision and mode next to each other."""
    for depth in args.depths:
        for precision in args.precisions:
            for compiled in (False, True) if args.compile else (False,):
                for name in args.candidates:
                    if precision == "fp32" or name in BLOCKS:
                        yield {"candidate": name, "depth": depth, "batch_size": args.batch_size, "precision": precision,
                               "compiled": compiled, "device": args.device, "task": "steps"}  # fmt: skip


def measure(args, floor):
    """Rows of all jobs. Each takes turns with the reference, so that both feel what else the machine does."""
    rows, naive_errors, reference = [], {}, None
    for job in jobs_of(args):
        kind = job["depth"], job["precision"]
        if kind not in naive_errors:
            naive_errors[kind] = answer(job | {"candidate": "naive", "compiled": False}, "check")
        job |= assert_right(job, naive_errors[kind])
        if reference is None or reference.job["depth"] != job["depth"]:
            reference = reference and reference.end()
            reference = Process(job | {"candidate": REFERENCE, "precision": "fp32", "compiled": False})
        rows.append(row_of(*take_turns(job, reference)) | floor(job))
        rows[-1]["floor_share"] = round(rows[-1].pop("floor_ms") / rows[-1]["ms"], 3)
        print_row(rows[-1])
    reference.end()
    return rows


def take_turns(job, reference, times=1 + STEPS):
    """Processes of a candidate and of the reference, after as many steps of each; the candidate's has ended."""
    reference.seconds = {"train": [], "infer": []}
    process = Process(job)
    for _ in range(times):
        for word in ("train", "infer"):
            process.run(word)
            reference.run(word)
    process.end()
    return process, reference


def row_of(process, reference):
    row = process.job | {key: value for key, value in process.ready.items() if key == "saved_mib"}
    images = row.pop("images", row["batch_size"])
    low, median, high = process.quantiles("train")
    row |= {"ms": round(1000 * median, 1), "ms_20": round(1000 * low, 1), "ms_80": round(1000 * high, 1)}
    _, inference, _ = process.quantiles("infer")
    row |= {"images_per_second": round(images / median, 1), "infer_images_per_second": round(images / inference, 1)}
    row["times_as_fast"] = round(reference.quantiles("train")[1] / median, 2)
    row["infer_times_as_fast"] = round(reference.quantiles("infer")[1] / inference, 2)
    return {name: value for name, value in row.items() if name not in ("device", "task")}


def print_row(row):
    name = " ".join([row["candidate"], row["precision"], *["compiled"] * row["compiled"]])
    speed = f"{row['ms']:8.1f} ms ({row['ms_20']:.1f} … {row['ms_80']:.1f})  {row['images_per_second']:8.1f} images/s"
    inference = f"inference {row['infer_images_per_second']:.1f} images/s × {row['infer_times_as_fast']:.2f}"
    times = f"× {row['times_as_fast']:.2f}"
    print(f"L={row['depth']:<4}{name:28}{speed} {times}  {inference}  {row['peak_mib']:,} MiB", flush=True)


def hardware(device, precision):
    """Bytes per second that a copy moves, reading and writing, and FLOP per second of a matrix product."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    matrix = torch.randn(4096, 4096, device=device).to(dtype)
    source, target = torch.ones(2, 64 * 2**20, device=device)
    copied = best_seconds(lambda: target.copy_(source), device)
    multiplied = best_seconds(lambda: matrix @ matrix, device)
    return 2 * source.nbytes / copied, 2 * 4096**3 / multiplied


def best_seconds(function, device, times=8):
    found = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found)


def make_floor(device, precisions):
    """A function job → the milliseconds that a training step takes at least on this hardware."""
    rates = {precision: hardware(device, precision) for precision in precisions}
    for precision, (copy, matrix) in rates.items():
        print(f"{precision}: copies {copy / 1e9:.1f} GB/s, multiplies matrices at {matrix / 1e9:.0f} GFLOP/s")

    def floor(job):
        copy, matrix = rates[job["precision"]]
        size = 2 if job["precision"] == "bf16" else 4
        seconds = max(moved_elements(job["depth"]) * size / copy, flops(job["depth"]) / matrix)
        return {"floor_ms": 1000 * seconds * job["batch_size"]}

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
    """train.py's way of training against that of the seeds, data loading and augmentation included."""
    job = {"depth": args.depths[0], "batch_size": args.batch_size, "precision": "fp32", "compiled": False,
           "device": args.device, "task": "epochs", "images": args.whole_epochs}  # fmt: skip
    reference = Process(job | {"candidate": REFERENCE})
    process, reference = take_turns(job | {"candidate": "train.py"}, reference, times=4)
    rows = [row_of(process, reference), row_of(reference, reference)]
    reference.end()
    for row in rows:
        print_row(row)
    return rows


def plot(rows, path):
    """Memory against depth where there are several depths, else images per second of each row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    if len({row["depth"] for row in rows}) > 1:
        plot_memory(rows, figure)
    else:
        plot_speed(rows, figure)
    figure.savefig(path, dpi=150)


def plot_memory(rows, figure):
    panels = figure.subplots(1, 2)
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
    names = [" ".join([r["candidate"], r["precision"], *["compiled"] * r["compiled"]]) for r in rows]
    colors = ["#009E73" if row["candidate"] in BLOCKS else "0.6" for row in rows]
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"images_per_second": "training (images/s)", "peak_mib": "peak of memory (MiB)"}
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        bars = axes.barh(names, [row[column] for row in rows], color=colors)
        axes.bar_label(bars, fmt="{:,.0f}", padding=3)
        axes.set_xlabel(title)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*BLOCKS, *peers.available()]
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images (default: %(default)s)")
    parser.add_argument("--depths", type=int, nargs="+", default=[100], metavar="L", help="(default: 100)")
    parser.add_argument("--candidates", nargs="+", choices=names, default=names, metavar="NAME",
        help=f"of {', '.join(names)} (default: all)")  # fmt: skip
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), metavar="NAME",
        help="fp32, bf16 (default: fp32, and bf16 where the hardware has it)")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="measure with torch.compile, too (minutes)")
    parser.add_argument("--whole-epochs", type=int, metavar="N", help="time epochs of N images instead of steps")
    parser.add_argument("--profile", action="store_true", help="print where a training step's time goes instead")
    parser.add_argument("--csv", metavar="FILE", help="write the rows there, too")
    parser.add_argument("--plot", metavar="FILE", help="draw speed there or, with several depths, memory")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        if args.batch_size < 1:
            raise ValueError(f"--batch-size {args.batch_size}: needs at least one image")
        for depth in args.depths:
            layers_per_block(depth, bottleneck=True)
        device = choose_device(args.device)
    except ValueError as error:
        parser.exit(2, f"bench.py: error: {error}\n")
    args.precisions = args.precisions or list(dict.fromkeys(("fp32", choose_precision("auto", device)[1])))
    return args, device


def main(argv=None):
    args, device = parse_args(argv)
    if args.serve:
        return serve(json.loads(args.serve))
    here = provenance(device)
    print(f"torch {here['versions']['torch']}, {here['device']}, DenseNet-BC (k = 12), batch {args.batch_size}")
    if args.profile:
        for job in jobs_of(args):
            print(answer(job, "profile"), flush=True)
        return 0
    rows = measure_epochs(args) if args.whole_epochs else measure(args, make_floor(device, args.precisions))
    origin = {"device": here["device"], "torch": here["versions"]["torch"], "commit": here["commit"]}
    if args.csv:
        Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0] | origin, lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | origin for row in rows)
    if args.plot:
        plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
