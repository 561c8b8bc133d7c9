"""Count what a training step launches on a GPU, without one: operations of torch, and our Triton kernels.

Example: python bench/launches.py

The step runs on tensors without data, in bf16, with the multi-tensor optimiser that torch takes on a GPU; every kernel
is replaced by one that only notes its launch. Views and allocations launch nothing and are not counted; an operation on
a list of tensors counts once, although a long list takes several launches.
"""

import collections
import contextlib
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts of this folder run from anywhere

import fused
from common.console import Parser, command
from densenet import ARCHITECTURES, DenseNet

FREE = {  # what only describes or allocates memory
    *("alias", "as_strided", "as_strided_", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty"),
    *("new_empty_strided", "permute", "promote_types", "select", "slice", "squeeze", "t", "unbind", "view"),
}

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", int: "i32", float: "fp32"}  # in Triton's signatures


class Counter(TorchDispatchMode):
    """Counts the operations of torch that launch something."""

    def __init__(self):
        super().__init__()
        self.operations = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function.name().split("::")
        name = name.split(".")[0]
        if namespace == "aten" and name not in FREE:
            self.operations[name] += 1
        return function(*args, **kwargs or {})


class Recorder:
    """Stands in for a Triton kernel: notes for what it would be compiled instead of launching it.

    That are the types of the arguments, which of them are divisible by 16, which are 1, and constants. The arguments
    themselves are not kept: autograd would have to copy gradients that somebody else holds.
    """

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **constants):
            types = tuple(TYPES[a.dtype if isinstance(a, torch.Tensor) else type(a)] for a in args)
            # Allocators align the beginning of memory to more than 16 bytes.
            numbers = [a.storage_offset() * a.element_size() if isinstance(a, torch.Tensor) else a for a in args]
            even = tuple(type(number) is int and number % 16 == 0 for number in numbers)
            ones = tuple(type(a) is int and a == 1 for a in args)
            self.launches.append((self.kernel, types, even, ones, tuple(sorted(constants.items()))))

        return launch


@contextlib.contextmanager
def as_on_a_gpu(capability=(9, 0)):
    """A context in which the fused block takes the path of CUDA, and tensors have no data. Yields the list of launches.

    Whatever reads a tensor's value raises an exception.
    """
    from fused import kernels

    launches = []
    recorders = {name: Recorder(item, launches) for name, item in vars(kernels).items() if name.endswith("_kernel")}
    recorders["capability"] = lambda device: capability
    here = {"steps_for": lambda x: kernels, "passes_for": lambda x: fused}
    with mock.patch.multiple(kernels, **recorders), mock.patch.multiple(fused, **here), FakeTensorMode():
        yield launches


def training_step(architecture, block, batch_size=64, training=True):
    """A function that takes one step of a network of the paper on 32×32 images; call it as_on_a_gpu."""
    model = DenseNet(**ARCHITECTURES[architecture], block=block).train(training)
    for parameter in model.parameters():
        if parameter.dim() == 4:  # model.to cannot do it to tensors without data
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


def count(architecture, block, training=True):
    """(operations of torch, kernels of ours) of one step, or of an evaluation's forward pass."""
    with as_on_a_gpu() as launches:
        step = training_step(architecture, block, training=training)
        step()  # the first also allocates the optimiser's state
        launches.clear()
        with Counter() as counter:
            step()
        return sum(counter.operations.values()), len(launches)


@command
def main(argv=None):
    Parser(prog="launches.py", description=__doc__).parse_args(argv)
    print("| DenseNet-BC-100-12, bf16 | operations of torch | kernels | launches |\n|---|---|---|---|")
    for name, training in (("training step", True), ("evaluation of a batch", False)):
        for block in ("naive", "fused"):
            operations, kernels = count("densenet_bc_100_12", block, training)
            print(f"| {name}, {block} | {operations:,} | {kernels:,} | {operations + kernels:,} |")


if __name__ == "__main__":
    sys.exit(main())
