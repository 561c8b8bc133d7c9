"""One step of training, and the same replayed: on the CPU, with a stand-in for the CUDA graph."""

import copy
import functools
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from helpers import Replayed, finished, no_amp, sgd, torchrun
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


def train(kind, batches, optimizer=sgd, **options):
    """A step that was taken on each batch, and all that came of it."""
    torch.manual_seed(0)
    model = DenseNet(depth=10, growth_rate=4, drop_rate=0.2).double()
    step = kind(model, optimizer(parameter_groups(model, 4)), no_amp, **options)
    log = []
    for i, batch in enumerate(batches):
        step.set_learning_rate(0.5 ** (15 + i))  # exact in float32, which a graph has it in; weights hardly move
        log.append(step(*batch))
    return step, [*log, *model.state_dict().values()]


close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("optimizer", [sgd, torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("recipe", [Recipe(), NEWER], ids=["paper", "newer"])
def test_replayed_and_scaled_steps_are_plain_steps(recipe, scaled, optimizer):
    """With learning rates that change, warm-up steps that count, and an odd batch between replays; scaled as in fp16."""
    sizes = [6] * (WARM_UP + 2) + [4] + [6] * 2
    batches = [random_batch(n, mixup=recipe is NEWER) for n in sizes]
    _, plain = train(Step, batches, optimizer, recipe=recipe)
    (step, replayed), (other, eager) = (train(kind, batches, optimizer, recipe=recipe, scaled=scaled) for kind in (Replayed, Step))
    assert step.graphs and step.refused is None and step.scaler.state_dict() == other.scaler.state_dict()
    close(replayed, plain)
    close(eager, plain)


def frozen(step, replay, tensors):
    """A replay that reads what there was at the capture, and whose writing is lost."""
    values = [tensor.clone() for tensor in tensors]

    def stale():
        kept = [tensor.clone() for tensor in tensors]
        torch._foreach_copy_(tensors, values)
        result = replay()
        torch._foreach_copy_(tensors, kept)
        return result

    return stale


def unable(step, replay):
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED\nand more")


@pytest.mark.parametrize(("half", "fault", "reason"), [
    (0, lambda step, replay: frozen(step, replay, [p.detach() for p in step.model.parameters()]), "gradients"),  # in casts
    (0, lambda step, replay: frozen(step, replay, list(step.model.buffers())), "statistics or momentum"),
    (0, lambda step, replay: frozen(step, replay, [step.scaler._scale]), "gradients"),
    (1, lambda step, replay: frozen(step, replay, [group["lr"] for group in step.optimizer.param_groups]), "weights"),
    (0, lambda step, replay: lambda: replay() * torch.tensor([1.06, 1, 1]), "losses"),
    (0, lambda step, replay: lambda: replay() * torch.tensor([1.04, 1, 1]), None),  # as rounding might, unless all is to repeat
    (0, unable, "out of memory"),
    (1, unable, "out of memory"),
])  # fmt: skip
def test_a_graph_with_a_fault_is_refused_and_training_goes_on(half, fault, reason):
    class Faulty(Replayed):
        captures = 0

        def capture(self, function):
            self.captures += 1
            replay = super().capture(function)
            return fault(self, replay) if self.captures == 1 + half else replay

    batches = [random_batch(6) for _ in range(WARM_UP + 3)]
    if reason is None:
        assert train(Faulty, batches)[0].refused is None
        torch.use_deterministic_algorithms(True)
    step, results = train(Faulty, batches, scaled=True)
    assert (reason or "losses") in step.refused
    close(results, train(Step, batches)[1])


RANKS = """
import torch
from helpers import Replayed, no_amp, sgd
from densenet import DenseNet
from training import distributed
from training.recipe import Recipe
from training.step import Step

class Unable(Replayed):
    def capture(self, function):
        if distributed.rank() == 1:
            raise RuntimeError("out of memory")
        return super().capture(function)

ends = []
with distributed.process_group():
    for kind in (Step, Replayed, Unable):
        torch.manual_seed(0)
        model = DenseNet(depth=10, growth_rate=4).double().to(memory_format=torch.channels_last)
        step = kind(model, sgd(model.parameters()), no_amp, 2, recipe=Recipe(part=2, clip=0.5))
        for i, count in enumerate((8, 8, 8, 8, 8, 7, 8, 6, 8)):  # of 7, the first rank has as many as of 8
            torch.manual_seed(i)
            images, labels = torch.randn(count, 3, 8, 8, dtype=torch.float64), torch.randint(10, (count,))
            step.set_learning_rate(0.5 ** (5 + i))
            step(images[distributed.rank() :: 2], labels[distributed.rank() :: 2], count)
        assert bool(step.refused) == (kind is Unable and distributed.rank() == 1), step.refused
        ends.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
torch.testing.assert_close(ends[1:], ends[:1] * 2, rtol=1e-10, atol=1e-12)
"""


def test_ranks_that_replay_train_like_eager_ones():
    """Each by itself: one that cannot replay takes eager steps beside the others."""
    Path("ranks.py").write_text(RANKS)
    finished(torchrun(2, "ranks.py"), 0)


@pytest.mark.parametrize("kind", [Step, Replayed])
def test_an_update_whose_gradients_overflow_is_left_out(kind):
    torch.manual_seed(0)
    model = DenseNet(depth=10, growth_rate=4)
    other = copy.deepcopy(model)
    step = kind(model, sgd(model.parameters()), no_amp, scaled=True)
    step.optimizer.load_state_dict(step.optimizer.state_dict() | {"state": {}})  # as of a run that is resumed
    step.scaler.load_state_dict(step.scaler.state_dict() | {"scale": 2.0**127, "backoff_factor": 2.0**-100})
    images, labels = torch.randn(6, 3, 8, 8), torch.randint(10, (6,))
    assert step(images, labels, 1e-6).isfinite().all() and step.skipped == 1
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()), rtol=0, atol=0)
    step(images, labels, 6)
    Step(other, sgd(other.parameters()), no_amp)(images, labels, 6)
    assert step.skipped == 1
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_an_optimiser_goes_from_graph_to_eager(kind):
    """As when a run is resumed without --cuda-graph."""
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer, resumed = (kind([parameter], lr=0.125) for _ in range(2))
    before = dict(optimizer.param_groups[0])
    optimizer.step()
    set_capturable(optimizer, True)
    assert torch.is_tensor(optimizer.param_groups[0]["lr"])
    torch.save(optimizer.state_dict(), "state.pth")
    resumed.load_state_dict(torch.load("state.pth", weights_only=True))
    set_capturable(resumed, False)
    assert resumed.param_groups[0] == before
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
        assert Replayed(model, sgd(model.parameters()), no_amp, scaled=True)(images, labels, 4).shape == (3,)
        newer = Recipe(make_loss(0.1), part=2, clip=0.5)
        assert Step(model, sgd(model.parameters()), no_amp, recipe=newer)(images, labels, 4, labels, labels / 2).shape == (3,)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            torch.ones(1).item()
