"""One training step: forward pass, loss, backward pass and update, eager or replayed as a CUDA graph."""

import torch
import torch.nn.functional as F

from batches import IGNORE_INDEX

WARM_UP = 3  # eager steps before one is captured: libraries set themselves up, the optimiser makes its state


class Step:
    """Calling it trains ``model`` on a batch; ``ranks`` processes share each batch.

    ``amp`` makes the autocast context. Nothing is read back from the device, but with ``scaled``: for fp16, in which
    small gradients would be 0, ``scaler`` multiplies the loss, and leaves out an update where that was too much.
    ``skipped`` counts those.
    """

    def __init__(self, model, optimizer, amp, ranks=1, scaled=False):
        self.model, self.optimizer, self.amp, self.ranks = model, optimizer, amp, ranks
        # Where it is not enabled, its methods do nothing.
        self.scaler, self.skipped = torch.amp.GradScaler(next(model.parameters()).device.type, enabled=scaled), 0
        set_capturable(optimizer, False)

    def set_learning_rate(self, value):
        """Of all parameters, but for a group that has an ``lr_factor``: that times as much."""
        for group in self.optimizer.param_groups:
            group["lr"] = value * group.get("lr_factor", 1)

    def __call__(self, images, labels, count):
        """Images (B, C, H, W), labels (B,), and how many images all ranks have: (3,), summed loss, wrong, images."""
        return self.eager(images, labels, count)

    def eager(self, images, labels, count):
        self.optimizer.zero_grad()
        with self.amp():
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        scale = self.scaler.get_scale()
        # The gradient of the mean loss, once averaged over the ranks.
        self.scaler.scale(loss * (self.ranks / count)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped += self.scaler.get_scale() < scale
        counted = labels != IGNORE_INDEX
        wrong = counted & (logits.detach().argmax(1) != labels)
        return torch.stack((loss.detach(), wrong.sum(), counted.sum()))


class GraphedStep(Step):
    """The same with a few launches: batches of the first one's shape replay a CUDA graph, others are eager.

    The steps before the capture are steps of the training. A graph reads and writes at fixed addresses: the batch and
    the learning rate are copied there, and weights, momentum and statistics stay where they are.
    """

    def __init__(self, model, optimizer, amp):
        super().__init__(model, optimizer, lambda: amp(cache_enabled=False))  # a cached cast would outlive its weight
        set_capturable(optimizer, True)
        self.stream, self.seen, self.replay, self.static = torch.cuda.Stream(), 0, None, None

    def set_learning_rate(self, value):
        for group in self.optimizer.param_groups:
            group["lr"].fill_(value * group.get("lr_factor", 1))

    def __call__(self, images, labels, count):
        if self.static is None:
            self.static = torch.empty_like(images), torch.empty_like(labels)
        if images.shape != self.static[0].shape:
            return self.eager(images, labels, count)
        if self.seen < WARM_UP:
            self.seen += 1
            return self.beside(self.eager, images, labels, count)
        for place, value in zip(self.static, (images, labels), strict=True):
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
            result = self.eager(*self.static, count)
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
