"""One training step: forward pass, loss, backward pass and update, eager or replayed as a CUDA graph."""

import contextlib
import functools

import torch
import torch.nn.functional as F

from inference.network import predict
from inputs.batches import IGNORE_INDEX
from training import distributed
from training.recipe import PAPER, cross_entropy


def evaluate(model, batches, amp):
    """Mean cross-entropy loss and error in percent, averaged over the images of all ranks."""
    loss = wrong = count = 0
    for logits, labels in predict(model, batches, amp):
        loss = loss + F.cross_entropy(logits, labels, reduction="sum")  # summed on the device, read once below
        wrong = wrong + (logits.argmax(1) != labels).sum()
        count += len(labels)
    sums = torch.tensor([float(loss), float(wrong), count], dtype=torch.float64)
    loss, wrong, count = distributed.all_reduce(sums).tolist()
    return loss / count, 100 * wrong / count


WARM_UP = 3  # eager steps before one is captured: libraries set themselves up, the optimiser makes its state


class Step:
    """Calling it trains ``model`` on a batch; ``ranks`` processes share each batch.

    ``amp`` makes the autocast context. Nothing is read back from the device, but with ``scaled``: for fp16, in which
    small gradients would be 0, ``scaler`` multiplies the loss, and leaves out an update where that was too much.
    ``skipped`` counts those. ``recipe`` says what is done beyond the paper's.
    """

    def __init__(self, model, optimizer, amp, ranks=1, scaled=False, recipe=PAPER):
        self.model, self.optimizer, self.amp, self.ranks, self.recipe = model, optimizer, amp, ranks, recipe
        # Where it is not enabled, its methods do nothing.
        self.scaler, self.skipped = torch.amp.GradScaler(next(model.parameters()).device.type, enabled=scaled), 0
        set_capturable(optimizer, False)

    def set_learning_rate(self, value):
        """Of all parameters, but for a group that has an ``lr_factor``: that times as much."""
        for group in self.optimizer.param_groups:
            group["lr"] = value * group.get("lr_factor", 1)

    def __call__(self, images, labels, count, *mixed):
        """Images (B, C, H, W), labels (B,), how many images all ranks have, and what mixup adds: (3,), summed
        cross-entropy of the labels, wrong, images."""
        return self.eager(images, labels, count, *mixed)

    def eager(self, images, labels, count, *mixed):
        self.optimizer.zero_grad()
        parts = -(-len(images) // (self.recipe.part or len(images)))
        *first, last = zip(*(tensor.tensor_split(parts) for tensor in (images, labels, *mixed)), strict=True)
        with getattr(self.model, "no_sync", contextlib.nullcontext)():  # several ranks: the last pass sums gradients up
            sums = [self.add_gradient(count, *part) for part in first]
        sums.append(self.add_gradient(count, *last))
        self.update()
        return functools.reduce(torch.add, sums)

    def add_gradient(self, count, images, labels, *mixed):
        """One forward and backward pass. Returns what ``__call__`` does."""
        with self.amp():
            logits = self.model(images)
        loss = self.recipe.loss(logits.float(), labels, *mixed)
        # The gradient of the mean loss, once averaged over the ranks.
        self.scaler.scale(loss * (self.ranks / count)).backward()
        logits, counted = logits.detach(), labels != IGNORE_INDEX
        if self.recipe.loss is not cross_entropy:
            loss = cross_entropy(logits.float(), labels)
        wrong = counted & (logits.argmax(1) != labels)
        return torch.stack((loss.detach(), wrong.sum(), counted.sum()))

    def update(self):
        scale = self.scaler.get_scale()
        if self.recipe.clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped += self.scaler.get_scale() < scale


class GraphedStep(Step):
    """The same with a few launches: batches of the first one's shape replay a CUDA graph, others are eager.

    The steps before the capture are steps of the training. A graph reads and writes at fixed addresses: the batch and
    the learning rate are copied there, and weights, momentum and statistics stay where they are.
    """

    def __init__(self, model, optimizer, amp, recipe=PAPER):
        # A cached cast would outlive its weight.
        super().__init__(model, optimizer, lambda: amp(cache_enabled=False), recipe=recipe)
        set_capturable(optimizer, True)
        self.stream, self.seen, self.replay, self.static = torch.cuda.Stream(), 0, None, None

    def set_learning_rate(self, value):
        for group in self.optimizer.param_groups:
            group["lr"].fill_(value * group.get("lr_factor", 1))

    def __call__(self, images, labels, count, *mixed):
        batch = (images, labels, *mixed)
        if self.static is None:
            self.static = [torch.empty_like(tensor) for tensor in batch]
        if images.shape != self.static[0].shape:
            return self.eager(images, labels, count, *mixed)
        if self.seen < WARM_UP:
            self.seen += 1
            return self.beside(self.eager, images, labels, count, *mixed)
        for place, value in zip(self.static, batch, strict=True):
            place.copy_(value)
        if self.replay is None:
            self.replay, self.result = self.capture(count)
        self.replay()
        return self.result.clone()

    def beside(self, function, *args):
        """Call a function on the stream of captures."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = function(*args)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def capture(self, count):
        """A function that repeats the step on what ``static`` holds, and the tensor that it leaves its result in."""
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad()  # the gradients are to be the graph's own
        # The thread that pins a DataLoader's memory may go on meanwhile.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            images, labels, *mixed = self.static
            result = self.eager(images, labels, count, *mixed)
        return graph.replay, result


def compile_model(model):
    """Compile a model's forward pass once for all batch sizes, not anew for the odd last batch."""
    compiled = torch.compile(model.forward)

    def forward(images):
        torch._dynamo.maybe_mark_dynamic(images, 0)
        return compiled(images)

    model.forward = forward


def set_capturable(optimizer, capturable):
    """Let an optimiser keep on the device what a CUDA graph has to find there, or not, whatever state it has loaded.

    That is the learning rate, which becomes a tensor, and Adam's counts of steps.
    """
    for group in optimizer.param_groups:
        device = group["params"][0].device if capturable else "cpu"
        rate = float(group["lr"])
        group["lr"] = torch.tensor(rate, device=device) if capturable else rate
        if "capturable" in group:
            group["capturable"] = capturable
        else:  # SGD, which can be captured where it is one kernel
            group["fused"] = capturable or None
        for state in filter(None, map(optimizer.state.get, group["params"])):
            if "step" in state:
                state["step"] = state["step"].to(device)
