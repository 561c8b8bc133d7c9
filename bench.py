"""What dense blocks cost: memory and time of a training step by block and depth; resources of the Triton kernels.

Example: python bench.py --csv work/bench/cpu.csv --plot images/memory.png
         python bench.py --kernels            (needs no GPU: compiles for sm_80 and sm_90)
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from densenet import ARCHITECTURES, BLOCKS, DenseNet, layers_per_block
from evaluate import choose_device, set_up_device
from workdir import peak_memory_mib, provenance

STEPS = 5


def make_step(block, depth, batch_size, device):
    """A function that makes one training step of DenseNet-BC (k = 12) on random images, and its forward pass alone."""
    torch.manual_seed(0)
    model = DenseNet(depth=depth, block=block).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    images = torch.randn(batch_size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,), device=device)

    def forward():
        return F.cross_entropy(model(images), labels)

    def step():
        loss = forward()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, forward, model


def saved_bytes(forward, model):
    """Bytes that autograd keeps between forward and backward pass, each storage once, parameters not counted."""
    kept, parameters = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor lives on, so no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(size for size, _ in kept.values())


def serve(block, depth, batch_size, device):
    """The measuring process of one candidate: prints the bytes it keeps, then a line per step that it is asked for."""
    device = choose_device(device)
    set_up_device(device)
    step, forward, model = make_step(block, depth, batch_size, device)
    print(saved_bytes(forward, model), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(json.dumps({"seconds": time.perf_counter() - start, "peak_mib": peak_memory_mib(device)}), flush=True)


class Candidate:
    """A block at a depth, in a process of its own, so that peak memory is its own."""

    def __init__(self, block, depth, args):
        self.block, self.depth, self.seconds = block, depth, []
        command = [sys.executable, __file__, "--serve", block, "--depths", str(depth)]
        command += ["--batch-size", str(args.batch_size), "--device", args.device]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.saved = self.read()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"bench.py: error: block {self.block} at depth {self.depth} ended early, for lack of memory?")
        return json.loads(line)

    def step(self):
        print(file=self.process.stdin, flush=True)
        answer = self.read()
        self.seconds.append(answer["seconds"])
        self.peak = answer["peak_mib"]

    def row(self, batch_size):
        timed = sorted(self.seconds[1:])  # the first step allocates
        low, median, high = (timed[round(q * (len(timed) - 1))] for q in (0.2, 0.5, 0.8))
        return {
            "block": self.block,
            "depth": self.depth,
            "batch_size": batch_size,
            "saved_mib": round(self.saved / 2**20, 1),
            "peak_mib": round(self.peak),
            "ms": round(1000 * median),
            "ms_20": round(1000 * low),
            "ms_80": round(1000 * high),
            "images_per_second": round(batch_size / median, 1),
        }


def measure(args):
    """Rows for every depth and block; the blocks of one depth take turns, step by step."""
    rows = []
    for depth in args.depths:
        candidates = [Candidate(block, depth, args) for block in BLOCKS]
        for _ in range(1 + STEPS):
            for candidate in candidates:
                candidate.step()
        for candidate in candidates:
            candidate.process.communicate()
            rows.append(candidate.row(args.batch_size))
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def plot(rows, path):
    """Bytes kept and peak memory against depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    styles = {"naive": ("#D55E00", "-", "o"), "checkpoint": ("#0072B2", "--", "s"), "fused": ("#009E73", "-.", "^")}
    titles = {"saved_mib": "kept by autograd (MiB)", "peak_mib": "peak of the process (MiB)"}
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        for block, (color, line, marker) in styles.items():
            points = [(row["depth"], row[column]) for row in rows if row["block"] == block]
            axes.plot(*zip(*points, strict=True), color=color, linestyle=line, marker=marker, label=block)
        axes.set(xlabel="depth", ylabel=title, ylim=(0, None), xticks=sorted({row["depth"] for row in rows}))
        axes.grid(color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


class Recorder:
    """Stands in for a Triton kernel: notes what it is launched with instead of launching it."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.launches.setdefault(self.variant(args, constants), self.kernel)

        return launch

    def variant(self, args, constants):
        """What Triton compiles a kernel anew for: types of the arguments, which are divisible by 16, constants."""
        kinds = {"torch.float32": "*fp32", "torch.bfloat16": "*bf16"}
        types = tuple(kinds[str(a.dtype)] if isinstance(a, torch.Tensor) else "i32" for a in args)
        aligned = tuple((a.data_ptr() if isinstance(a, torch.Tensor) else a) % 16 == 0 for a in args)
        return self.kernel.__name__, types, aligned, tuple(sorted(constants.items()))


def record_launches(architecture):
    """{variant: kernel} of all launches of a training step in bf16, every layer of every block. Runs no kernel."""
    import fused
    import kernels

    launches, real = {}, {name: item for name, item in vars(kernels).items() if name.endswith("_kernel")}
    for name, kernel in real.items():
        setattr(kernels, name, Recorder(kernel, launches))
    steps_for, fused.steps_for = fused.steps_for, lambda x: kernels
    try:
        model = DenseNet(**ARCHITECTURES[architecture], block="fused")
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(1, 3, 32, 32)).float().sum().backward()
    finally:
        fused.steps_for = steps_for
        for name, kernel in real.items():
            setattr(kernels, name, kernel)
    return launches


def compile_kernel(kernel, variant, capability):
    """(registers, stack bytes, shared bytes) of a variant compiled for an NVIDIA GPU, without one."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _, types, aligned, constants = variant
    constants = dict(constants)
    options = {"num_warps": constants.pop("num_warps", 4)}
    names = kernel.arg_names
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    attributes = {(i,): [["tt.divisibility", 16]] for i, even in enumerate(aligned) if even}
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    return registers, stack, compiled.metadata.shared


def print_kernels():
    """Compile every variant that the paper's three BC networks launch; a row is the most that a kernel takes."""
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's kernels cannot be compiled
    import triton

    print(f"Triton {triton.__version__}; bf16; registers per thread, bytes of stack (spills) and of shared memory")
    print("| network | target | kernel | variants | registers | stack | shared |\n|---|---|---|---|---|---|---|")
    for name in ("densenet_bc_100_12", "densenet_bc_250_24", "densenet_bc_190_40"):
        launches = record_launches(name)
        for capability in (80, 90):
            worst = {}
            for variant, kernel in launches.items():
                usage = compile_kernel(kernel, variant, capability)
                worst.setdefault(variant[0], []).append(usage)
            for kernel, usages in worst.items():
                most = " | ".join(str(max(values)) for values in zip(*usages, strict=True))
                print(f"| {name} | sm_{capability} | {kernel} | {len(usages)} | {most} |", flush=True)


def check_args(args):
    choose_device(args.device)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: needs at least one image")
    for depth in args.depths:
        layers_per_block(depth, bottleneck=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images (default: %(default)s)")
    parser.add_argument("--depths", type=int, nargs="+", default=[40, 70, 100, 130], help="(default: %(default)s)")
    parser.add_argument("--csv", metavar="FILE", help="write the rows there, too")
    parser.add_argument("--plot", metavar="FILE", help="draw memory against depth there")
    parser.add_argument("--kernels", action="store_true", help="compile the Triton kernels, print their resources")
    parser.add_argument("--serve", choices=BLOCKS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        return serve(args.serve, args.depths[0], args.batch_size, args.device)
    if args.kernels:
        return print_kernels()
    try:
        check_args(args)
    except ValueError as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        return 2
    here = provenance(choose_device(args.device))
    print(f"torch {here['versions']['torch']}, {here['device']}, fp32, DenseNet-BC, k = 12")
    origin = {"device": here["device"], "torch": here["versions"]["torch"], "commit": here["commit"]}
    rows = [row | origin for row in measure(args)]
    if args.csv:
        Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    if args.plot:
        plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
