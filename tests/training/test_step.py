"""One step of training, and the same replayed: on the CPU, with a stand-in for the CUDA graph."""

import copy
import functools

import pytest
import torch
import torch.nn as nn
from helpers import Replayed, no_amp, sgd
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from densenet import DenseNet
from training.finetune import parameter_groups
from training.recipe import Recipe, make_loss
from training.step import WARM_UP, Step, compile_model, set_capturable

NEWER = Recipe(make_loss(0.1, torch.linspace(0.5, 1.5, 10)), part=4, clip=0.5)


def random_batch(n, mixup=False):
    mixed = (torch.randint(10, (n,)), torch.rand(n)) if mixup else ()
    return torch.randn(n, 3, 8, 8, dtype=torch.float64), torch.randint(10, (n,)), n, *mixed


def train(kind, batches, **options):
    torch.manual_seed(0)
    model = DenseNet(depth=10, growth_rate=4).double()
    step = kind(model, sgd(parameter_groups(model, 4)), no_amp, **options)
    log = []
    for i, batch in enumerate(batches):
        step.set_learning_rate(0.5 ** (5 + i))  # exact in float32, which a graph has it in
        log.append(step(*batch))
    return model.state_dict(), torch.stack(log)


@pytest.mark.parametrize("recipe", [Recipe(), NEWER], ids=["paper", "newer"])
def test_replayed_steps_are_eager_steps(recipe):
    """SGD, which alone lets itself be captured on a CPU, with learning rates that change, warm-up steps that count, and an odd batch between replays."""
    sizes = [6] * (WARM_UP + 2) + [4] + [6] * 2
    batches = [random_batch(n, mixup=recipe is NEWER) for n in sizes]
    (eager, log), (replayed, replayed_log) = (train(kind, batches, recipe=recipe) for kind in (Step, Replayed))
    torch.testing.assert_close(replayed_log, log, rtol=1e-12, atol=1e-12)
    for name, value in eager.items():
        torch.testing.assert_close(replayed[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("recipe", [Recipe(), NEWER], ids=["paper", "newer"])
def test_a_scaled_step_is_the_same_step(recipe):
    batches = [random_batch(6, mixup=recipe is NEWER) for _ in range(3)]
    (plain, log), (scaled, scaled_log) = (train(Step, batches, recipe=recipe, scaled=scaled) for scaled in (False, True))
    assert torch.equal(log, scaled_log)
    assert all(torch.equal(scaled[name], value) for name, value in plain.items())


def test_an_update_whose_gradients_overflow_is_left_out():
    model = DenseNet(depth=10, growth_rate=4)
    step = Step(model, sgd(model.parameters()), no_amp, scaled=True)
    step.scaler.load_state_dict(step.scaler.state_dict() | {"scale": 2.0**127, "backoff_factor": 2.0**-100})
    before = copy.deepcopy(list(model.parameters()))
    images, labels = torch.randn(6, 3, 8, 8), torch.randint(10, (6,))
    assert step(images, labels, 1e-6).isfinite().all() and step.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    step(images, labels, 6)
    assert step.skipped == 1 and not torch.equal(before[0], next(model.parameters()))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_an_optimiser_goes_from_graph_to_eager_and_back(kind):
    """As when a run is resumed with or without --cuda-graph."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = kind([parameter], lr=0.1)
    before = copy.deepcopy(optimizer.param_groups[0])
    parameter.grad = torch.ones(3)
    optimizer.step()
    set_capturable(optimizer, True)
    assert torch.is_tensor(optimizer.param_groups[0]["lr"])
    torch.save(optimizer.state_dict(), "state.pth")
    resumed = kind([parameter], lr=0.2)
    resumed.load_state_dict(torch.load("state.pth", weights_only=True))
    set_capturable(resumed, False)
    assert {k: v for k, v in resumed.param_groups[0].items() if k != "params"} == {
        k: pytest.approx(v) if k == "lr" else v for k, v in before.items() if k != "params"
    }
    parameter.grad = torch.ones(3)
    resumed.step()
    assert parameter.isfinite().all() and (parameter < 1).all()


def test_the_compiler_makes_one_program_for_all_batch_sizes(monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    model = DenseNet(depth=10, growth_rate=4)
    plain = copy.deepcopy(model)
    compile_model(model)
    for n in (6, 6, 4, 3):
        images = torch.randn(n, 3, 8, 8).to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(images), plain(images))
    assert counter.frame_count == 1
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_a_step_reads_nothing_back():
    """A CUDA graph could not hold that, and the processor would wait for the GPU. Tensors without data refuse it."""
    with FakeTensorMode():
        model = DenseNet(depth=10, growth_rate=4)
        images, labels = torch.empty(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
        assert Step(model, sgd(model.parameters()), no_amp)(images, labels, 4).shape == (3,)
        newer = Recipe(make_loss(0.1), part=2, clip=0.5)
        assert Step(model, sgd(model.parameters()), no_amp, recipe=newer)(images, labels, 4, labels, labels / 2).shape == (3,)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            torch.ones(1).item()
