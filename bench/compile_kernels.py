"""Compile the Triton kernels for GPUs, without one, and print the resources they take.

Example: python bench/compile_kernels.py

Ends with status 1 if a kernel needs more shared memory than a block of that GPU may have, multiplies a row's number in
32 bits, or spills with all 255 registers in use. With fewer in use, the assembler has chosen to spill some bytes, so
that more blocks run at once.
"""

import contextlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts of this folder run from anywhere

import fused
from common.console import Parser, command
from densenet import ARCHITECTURES, DenseNet

# By compute capability, bytes of shared memory that a block may have (CUDA C++ Programming Guide, technical
# specifications), and multiprocessors of A100, RTX 3090, RTX 4090, H100, B200, RTX 5090. None is below 8.0.
TARGETS = {80: (166_912, 108), 86: (101_376, 82), 89: (101_376, 128)}
TARGETS |= {90: (232_448, 132), 100: (232_448, 148), 120: (101_376, 170)}
MOST_REGISTERS = 255  # of a thread
NETWORKS = ("densenet_bc_100_12", "densenet_bc_250_24", "densenet_bc_190_40", "densenet_40_12")
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", int: "i32", float: "fp32"}  # in Triton's signatures


class Recorder:
    """Stands in for a Triton kernel: records the variant that a launch would compile, and launches nothing.

    It keeps no tensor: autograd would have to copy gradients that somebody else holds.
    """

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **constants):
            types = tuple(compiled_for(*argument) for argument in zip(self.kernel.arg_names, args, strict=False))
            self.launches.append((self.kernel, types, tuple(sorted(constants.items()))))

        return launch


def compiled_for(name, value):
    """What the compiler knows of an argument: (type, True if 16 divides it, True if it is 1)."""
    from fused.kernels import BY_BATCH

    if isinstance(value, torch.Tensor):  # allocators align storage to more than 16 bytes
        return TYPES[value.dtype], value.storage_offset() * value.element_size() % 16 == 0, False
    specialized = type(value) is int and name not in BY_BATCH
    return TYPES[type(value)], specialized and value % 16 == 0, specialized and value == 1


@contextlib.contextmanager
def as_on_a_gpu(capability=(9, 0)):
    """A context in which the fused block runs as on CUDA, on tensors without data. Yields the list of launches.

    Reading a tensor's value raises an exception.
    """
    from fused import kernels, passes

    launches = []
    recorders = {name: Recorder(item, launches) for name, item in vars(kernels).items() if name.endswith("_kernel")}
    recorders["hardware"] = lambda device: (capability, TARGETS[10 * capability[0] + capability[1]][1])
    here = {"steps_for": lambda x: kernels, "passes_for": lambda x: passes}
    with mock.patch.multiple(kernels, **recorders), mock.patch.multiple(fused, **here), FakeTensorMode():
        yield launches


def training_step(architecture, block, batch_size=64, training=True):
    """A function that runs a training or evaluation step in bf16 of a network of the paper on 32×32 images."""
    model = DenseNet(**ARCHITECTURES[architecture], block=block).train(training)
    for parameter in model.parameters():
        if parameter.dim() == 4:  # model.to cannot convert tensors without data
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4, nesterov=True, foreach=True)
    images = torch.empty(batch_size, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.zeros(batch_size, dtype=torch.int64)

    def step():
        optimizer.zero_grad()
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        if training:
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()

    return step


def compile_kernel(kernel, arguments, constants, capability):
    """A variant compiled for an NVIDIA GPU, without one."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = dict(constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    names, (types, even, ones) = kernel.arg_names, zip(*arguments, strict=True)
    constants |= {name: 1 for name, one in zip(names, ones, strict=False) if one}
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    attributes = {(i,): [["tt.divisibility", 16]] for i, is_even in enumerate(even) if is_even}
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage(compiled):
    """(registers, stack bytes, shared bytes) of a compiled kernel."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    return registers, stack, compiled.metadata.shared


def narrow_products(compiled):
    """Lines of a kernel that multiply a row's number, which follows from program_id(0), in 32 bits.

    A row's offset passes 2³¹ in a large batch. The interpreter computes with 64 bits, so it cannot tell.
    """
    from_rows, narrow = set(), []
    for line in compiled.asm["ttir"].splitlines():
        results, _, operation = line.partition(" = ")
        if "get_program_id x" in line or from_rows.intersection(re.findall(r"%\w+", operation)):
            from_rows.update(re.findall(r"%\w+", results), re.findall(r"scf\.for (%\w+)", line))
            narrow += [line.strip()] if re.match(r"arith\.muli.* : (tensor<.*x)?i32", operation) else []
    return narrow


@command
def main(argv=None):
    """Compile what networks of the paper launch in training; a row holds the maxima over a kernel's variants."""
    parser = Parser(prog="compile_kernels.py", description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="(default: all)")
    parser.add_argument("--targets", nargs="+", type=int, choices=TARGETS, default=TARGETS, help="(default: all)")
    args = parser.parse_args(argv)
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's kernels cannot be compiled
    import triton

    print(f"Triton {triton.__version__}; bf16; registers per thread, bytes of stack (spills) and of shared memory")
    print("| network | target | kernel | variants | registers | stack | shared | of |\n" + "|---" * 8 + "|")
    fits = True
    for name, capability in itertools.product(args.networks, args.targets):
        usages, limit = {}, TARGETS[capability][0]
        with as_on_a_gpu(divmod(capability, 10)) as launches:
            training_step(name, "fused")()
        for kernel, *variant in sorted(set(launches), key=lambda launch: (launch[0].__name__, launch[1:])):
            compiled = compile_kernel(kernel, *variant, capability)
            usages.setdefault(kernel.__name__, []).append(usage(compiled))
            if not kernel.__name__.startswith("finish") and (narrow := narrow_products(compiled)):
                fits = False
                print(f"{kernel.__name__} multiplies rows in 32 bits: {narrow[0]}", file=sys.stderr)
        for kernel, variants in usages.items():
            fits &= all(shared <= limit and not (used == MOST_REGISTERS and stack) for used, stack, shared in variants)
            used, stack, shared = map(max, zip(*variants, strict=True))
            row = f"{used} | {stack} | {shared:,} | {limit:,}"
            print(f"| {name} | sm_{capability} | {kernel} | {len(variants)} | {row} |", flush=True)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
