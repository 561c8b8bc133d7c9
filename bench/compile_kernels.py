"""Compile the Triton kernels for GPUs, without one, and print the resources they take.

Example: python bench/compile_kernels.py
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts of this folder run from anywhere

from cli import Parser, command
from densenet import ARCHITECTURES, DenseNet


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
    from fused import kernels

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


@command
def main(argv=None):
    """Compile every variant that the paper's three BC networks launch; a row is the most that a kernel takes."""
    Parser(prog="compile_kernels.py", description=__doc__).parse_args(argv)
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


if __name__ == "__main__":
    sys.exit(main())
