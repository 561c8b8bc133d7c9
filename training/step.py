"""One training step: forward pass, loss, backward pass and update, eager or replayed as CUDA graphs."""

import functools

import torch
import torch.nn.functional as F

from common.console import memory_problem
from inference.network import predict
from inputs.batches import IGNORE_INDEX
from training import distributed
from training.recipe import PAPER, cross_entropy


def evaluate(model, batches, amp):
    """Mean cross-entropy and error in percent over the images of all ranks."""
    loss = wrong = count = 0
    for logits, labels in predict(model, batches, amp):
        loss = loss + F.cross_entropy(logits, labels, reduction="sum")  # summed on the device, read once below
        wrong = wrong + (logits.argmax(1) != labels).sum()
        count += len(labels)
    sums = torch.tensor([float(loss), float(wrong), count], dtype=torch.float64)
    loss, wrong, count = distributed.all_reduce(sums).tolist()
    return loss / count, 100 * wrong / count


WARM_UP = 3  # eager steps before one is captured: libraries set themselves up, the optimiser makes its state
DIFFERENCE = 0.05  # relative; a replayed and an eager step may differ by this: they round and sum in other orders


class Step:
    """Trains ``model`` on a batch when called; ``ranks`` processes divide each batch.

    ``amp`` makes the autocast context. If ``scaled``, for fp16, in which small gradients would be 0, ``scaler``
    multiplies the loss, and skips an update if that made gradients infinite, which it reads from the device.
    ``skipped``, on the device, counts those. ``recipe`` is a Recipe.
    """

    refused = graphs = None  # why steps cannot be replayed; what is replayed

    def __init__(self, model, optimizer, amp, ranks=1, scaled=False, recipe=PAPER):
        self.model, self.optimizer, self.amp, self.ranks, self.recipe = model, optimizer, amp, ranks, recipe
        device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)  # does nothing if it is not enabled
        self.skipped = torch.zeros((), device=device)
        set_capturable(optimizer, False)

    def set_learning_rate(self, value):
        """Set the learning rate of all parameters; of a group with an ``lr_factor``, to so many times the value."""
        for group in self.optimizer.param_groups:
            rate = value * group.get("lr_factor", 1)
            group["lr"] = group["lr"].fill_(rate) if torch.is_tensor(group["lr"]) else rate

    def __call__(self, images, labels, count, *mixed):
        """Takes images (B, C, H, W), labels (B,), how many images all ranks have, and what mixup adds.

        Returns (3,): summed cross-entropy, number of wrong images, number of images.
        """
        return self.in_turn(functools.partial(self.add_gradients, images, labels, count, *mixed), self.update)

    def in_turn(self, add_gradients, update, gradients=None):
        """Both halves of a step. In between, all ranks get the mean of their gradients, in one vector."""
        result = add_gradients()
        if self.ranks > 1:
            parts = [x.as_strided((x.numel(),), (1,)) for x in gradients or self.gradients()]  # in the order of memory
            mean = distributed.all_reduce(torch.cat(parts).div_(self.ranks))
            torch._foreach_copy_(parts, mean.split([len(part) for part in parts]))
        update()
        return result

    def add_gradients(self, images, labels, count, *mixed):
        """Forward and backward passes over the parts of a batch. Returns what ``__call__`` does."""
        self.optimizer.zero_grad()
        parts = -(-len(images) // (self.recipe.part or len(images)))
        batches = zip(*(tensor.tensor_split(parts) for tensor in (images, labels, *mixed)), strict=True)
        return functools.reduce(torch.add, [self.add_gradient(count, *batch) for batch in batches])

    def add_gradient(self, count, images, labels, *mixed):
        """One forward and backward pass. Returns what ``__call__`` does."""
        with self.amp():
            logits = self.model(images)
        loss = self.recipe.loss(logits.float(), labels, *mixed)
        # Once averaged over the ranks, this is the gradient of the mean loss.
        self.scaler.scale(loss * (self.ranks / count)).backward()
        logits, counted = logits.detach(), labels != IGNORE_INDEX
        if self.recipe.loss is not cross_entropy:
            loss = cross_entropy(logits.float(), labels)
        wrong = counted & (logits.argmax(1) != labels)
        return torch.stack((loss.detach(), wrong.sum(), counted.sum()))

    def gradients(self):
        return [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]

    def update(self):
        one = torch.ones_like(self.skipped)
        before = self.scaler.scale(one)
        if self.recipe.clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled():
            self.skipped += self.scaler.scale(one) < before


class GraphedStep(Step):
    """Replays CUDA graphs for batches of the first one's shape, which takes few launches; other steps are eager.

    One graph computes the gradients, one the update; in between, ranks exchange gradients. Graphs read and write at
    fixed addresses: the batch and the learning rate are copied there; weights, momentum and statistics stay in place.
    The WARM_UP steps before the capture train, too. If a replay does not compute what an eager step does, ``refused``
    says why, and all steps are eager.
    """

    def __init__(self, model, optimizer, amp, ranks=1, scaled=False, recipe=PAPER):
        # Without cached casts, which a replay would not renew.
        super().__init__(model, optimizer, lambda: amp(cache_enabled=False), ranks, scaled, recipe)
        set_capturable(optimizer, True)
        self.stream = torch.cuda.Stream() if self.skipped.is_cuda else None
        self.seen, self.static, self.graphs = 0, None, None

    def __call__(self, *batch):
        images, _, count, *_ = batch
        if self.static is None:
            set_capturable(self.optimizer, True)  # again: a state may have been loaded meanwhile
            self.static = [value.clone() if torch.is_tensor(value) else value for value in batch]
        if self.refused or (images.shape, count) != (self.static[0].shape, self.static[2]):
            return super().__call__(*batch)
        if self.seen < WARM_UP:
            self.seen += 1
            return self.beside(super().__call__, *batch)
        for place, value in zip(self.static, batch, strict=True):
            if torch.is_tensor(place):
                place.copy_(value)
        if self.graphs is None and (reason := self.prepare()):
            self.refused, self.graphs = reason, None
            return super().__call__(*batch)
        return self.in_turn(*self.graphs).clone()

    def prepare(self):
        """Capture a step. Returns None, or why it cannot be replayed. The state is restored.

        A replay has to compute what an eager step does, from the same weights, momentum, random numbers and batch, and
        again from half the weights at a tenth of the learning rate. A second eager step shows how far rounding goes;
        with --deterministic, none is allowed. Eager steps need memory beside the graphs, as an odd last batch will.
        """
        state = start = [tensor.clone() for tensor in self.state()]
        scaler, eager = self.scaler.state_dict(), (functools.partial(self.add_gradients, *self.static), self.update)
        bound = 0 if torch.are_deterministic_algorithms_enabled() else DIFFERENCE
        try:
            replays = [self.beside(self.capture, half) for half in eager]
            self.graphs = *replays, self.gradients()
            self.scaler.update(1.0)  # so small that no update is skipped
            for _ in range(2):
                replayed, again, right = (self.outcome(state, *halves) for halves in (self.graphs, eager, eager))
                for name, value in right.items():
                    rounding = max(bound * value.norm(), 2 * (again[name] - value).norm())
                    if not (replayed[name] - value).norm() <= rounding:  # NaN fails
                        return f"a replayed step computes other {name} than an eager one"
                torch._foreach_div_([parameter.detach() for parameter in self.model.parameters()], 2)
                torch._foreach_div_([group["lr"] for group in self.optimizer.param_groups], 10)
                state = [tensor.clone() for tensor in self.state()]
        except (RuntimeError, MemoryError) as error:  # a capture may raise either if memory runs out
            return in_words(error)
        finally:
            torch._foreach_copy_(self.state(), start)
            self.scaler.load_state_dict(scaler)
            self.scaler.update(scaler.get("scale"))  # forgets a step that an error has cut short

    def outcome(self, start, add_gradients, update, gradients=None):
        """What a step changes in the state ``start``, a vector by name; ranks exchange nothing."""
        torch._foreach_copy_(self.state(), start)
        with torch.random.fork_rng([self.skipped.device] if self.skipped.is_cuda else []):
            result = self.beside(add_gradients)
            self.beside(update)
        changes, weights = torch._foreach_sub(self.state(), start), len(list(self.model.parameters()))
        parts = {"losses": [result], "gradients": gradients or self.gradients(), "weights": changes[:weights]}
        parts["statistics or momentum"] = [x for x in changes[weights:] if x.dim()] or [result.new_empty(0)]
        parts["counts or rates"] = [x for x in changes[weights:] if not x.dim()]  # which would outweigh the others
        return {name: torch.cat([x.flatten() for x in xs]).nan_to_num(0, 0, 0) for name, xs in parts.items()}

    def state(self):
        """All tensors that a step changes in place: the weights, then the rest."""
        kept = [value for state in self.optimizer.state.values() for value in state.values()]
        rates = [group["lr"] for group in self.optimizer.param_groups]
        tensors = [*self.model.parameters(), *self.model.buffers(), *kept, *rates, self.skipped]
        return [tensor.detach() for tensor in tensors]

    def beside(self, function, *args):
        """Call a function on the stream of captures."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = function(*args)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def capture(self, function):
        """Capture a function. Returns one that repeats it, on the same tensors, and returns the same tensor."""
        graph = torch.cuda.CUDAGraph()
        # Meanwhile, the thread that pins a DataLoader's memory may go on.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            result = function()

        def replay():
            graph.replay()
            return result

        return replay


def in_words(error):
    """An error's first line, or that memory ran out."""
    return "out of memory" if memory_problem(error) else str(error).partition("\n")[0] or type(error).__name__


def compile_model(model):
    """Compile a model's forward pass, once for all batch sizes."""
    compiled = torch.compile(model.forward)

    def forward(images):
        torch._dynamo.maybe_mark_dynamic(images, 0)
        return compiled(images)

    model.forward = forward


def set_capturable(optimizer, capturable):
    """Let an optimiser keep on the device what a CUDA graph needs there, or not, whatever state it has loaded.

    That is the learning rate, as a tensor, and Adam's counts of steps. Fused kernels skip an update by themselves; that
    of SGD needs a momentum to start with, or would take what is in memory.
    """
    for group in optimizer.param_groups:
        device, rate = group["params"][0].device if capturable else "cpu", float(group["lr"])
        group["lr"] = torch.tensor(rate, device=device) if capturable else rate
        switches = {"capturable": capturable, "fused": capturable or None}
        group.update({name: value for name, value in switches.items() if name in group})
        optimizer._step_supports_amp_scaling = capturable and "fused" in group  # asked by a GradScaler
        for p in group["params"]:
            if capturable and isinstance(optimizer, torch.optim.SGD) and group["momentum"]:
                optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            if "step" in optimizer.state.get(p, ()):
                optimizer.state[p]["step"] = optimizer.state[p]["step"].to(device)
