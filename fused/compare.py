"""Compares dense blocks and transitions with naive, which shows edited methods that a look at the modules cannot."""

import copy

import torch

import fused


def differing(model, kinds, block):
    """The parts of a model, of these types, that compute something else as ``block`` than their code says: {name: why}.

    Copies of each part take a training step and an evaluation on a few random pixels, in float64 on the CPU. Modules
    and torch's random numbers stay as they are.
    """
    parts = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    loops, fused.loops = fused.loops, None  # passes in plain torch need no compiling
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            found = {name: difference(module, block) for name, module in parts.items()}
    finally:
        fused.loops = loops
    return {name: reason for name, reason in found.items() if reason}


def difference(original, block):
    """Why a dense block or transition must not run as ``block``, or None. Uses random numbers."""
    found = {}
    for name in ("naive", block):
        try:
            torch.default_generator.manual_seed(0)  # torch.manual_seed would seed GPUs, too
            x = torch.randn(2, original.in_channels, 4, 4, dtype=torch.float64)
            module = copy.deepcopy(original).to("cpu", torch.float64).train().requires_grad_()
            module.block = name
            if hasattr(module, "unknown") and (reason := module.unknown(x)):
                return reason
            found[name] = outcome(module, x.clone().requires_grad_())
        except Exception as error:  # whatever a changed layer raises when it is copied, or for so few pixels
            return f"{name} cannot be tried on a few pixels ({error})".replace("\n", " ")
    for kind, exact in found["naive"].items():
        if not (error := (found[block][kind] - exact).norm()) <= 1e-9 * exact.norm():  # nor NaN
            return f"other {kind} than naive's (relative error {error / exact.norm():.0e})"
    return None


def outcome(module, x):
    """Results of a module in a training step and an evaluation: {"outputs", "gradients", "statistics": vector}.

    Moves the parameters first: values of 1 and 0 would hide errors.
    """
    tensors = [x, *module.parameters()]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    out = module(x)
    out.backward(torch.randn(out.shape, dtype=out.dtype))
    gradients = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in tensors]
    statistics = [x.new_empty(0), *module.buffers()]
    kinds = {"outputs": [out, module.eval()(x)], "gradients": gradients, "statistics": statistics}
    return {kind: torch.cat([part.detach().double().flatten() for part in parts]) for kind, parts in kinds.items()}
