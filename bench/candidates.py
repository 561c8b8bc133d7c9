"""What speed.py measures: our blocks, torchvision's, timm's and two known repositories' networks, each in a process.

A job is a dict: candidate, depth, batch_size, precision, compiled, graph, device and task: "check", "profile", "steps"
or "epochs" (of so many images). Its process prints its answer or, for the last two, one for each word it is told.
"""

import contextlib
import copy
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts of this folder run from anywhere

from common.console import Parser, command
from common.hardware import choose_device, choose_precision, peak_memory_mib, set_up_device
from densenet import BLOCKS, FROM_TORCHVISION, DenseNet, rename
from inputs import splits
from inputs.batches import ImageTensors, memory_format
from training import arguments, trial
from training.choice import default_block
from training.step import GraphedStep, Step, compile_model, evaluate

CHECKED_IMAGES = 4
DRAWS = 5  # of images to check with


def bamos(ours):
    """bamos/densenet.pytorch concatenates after every layer: our naive block, in contiguous memory and fp32."""
    return ours


def gpleiss(ours):
    """gpleiss/efficient_densenet_pytorch: up to the first convolution, a layer runs under reentrant checkpointing.

    Its batch norms update their running statistics twice in a step.
    """
    ours.blocks = nn.ModuleList(ReentrantBlock(block.layers) for block in ours.blocks)
    return ours


class ReentrantBlock(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        outputs = [x]
        for layer in self.layers:

            def recomputed(*outputs, layer=layer):
                return layer.up_to_conv1(torch.cat(outputs, 1))

            differentiated = torch.is_grad_enabled() and any(output.requires_grad for output in outputs)
            x = checkpoint(recomputed, *outputs, use_reentrant=True) if differentiated else recomputed(*outputs)
            outputs.append(layer.after_conv1(x))
        return torch.cat(outputs, 1)


def torchvision(ours, memory_efficient=False):
    from torchvision.models import DenseNet as Theirs

    channels = ours.stem.conv.out_channels
    theirs = Theirs(**shape_of(ours), num_init_features=channels, memory_efficient=memory_efficient)
    return with_our_weights(theirs, ours)


def timm(ours, memory_efficient=False):
    from timm.models.densenet import DenseNet as Theirs

    return with_our_weights(Theirs(**shape_of(ours), memory_efficient=memory_efficient), ours)


def shape_of(ours):
    """Arguments of torchvision's and timm's DenseNet."""
    layers = tuple(len(block.layers) for block in ours.blocks)
    growth_rate = ours.blocks[0].layers[0].conv2.out_channels
    return dict(growth_rate=growth_rate, block_config=layers, num_classes=ours.classifier.out_features)


def with_our_weights(theirs, ours):
    """Their network with the stem for small images and our weights."""
    theirs.features.conv0 = nn.Conv2d(3, ours.stem.conv.out_channels, 3, padding=1, bias=False)
    for name in ("norm0", "relu0", "pool0"):
        if hasattr(theirs.features, name):
            setattr(theirs.features, name, nn.Identity())
    theirs.load_state_dict(ours.torchvision_state_dict())
    return theirs


MODELS = {
    "bamos": bamos,
    "gpleiss": gpleiss,
    "torchvision": torchvision,
    "torchvision-efficient": lambda ours: torchvision(ours, memory_efficient=True),
    "timm": timm,
    "timm-efficient": lambda ours: timm(ours, memory_efficient=True),
}


CHANNELS_LAST = "-channels-last"  # of a name: in our memory format instead of torch's default
FP32_ONLY = ("bamos", "gpleiss")  # without mixed precision, as they are


def available():
    """Names of candidates whose library is installed."""
    names = [*MODELS, *(name + CHANNELS_LAST for name in ("torchvision", "timm"))]
    return [name for name in names if not name.startswith("timm") or importlib.util.find_spec("timm")]


def our_name(name):
    """A parameter's name in our network."""
    return rename(name, FROM_TORCHVISION)


# The tasks.


def make_model(name, depth):
    """A candidate's network, in training mode, with the weights that all candidates share."""
    torch.manual_seed(0)
    ours = DenseNet(depth=depth, block=name if name in BLOCKS else "naive")
    return ours if name in BLOCKS else MODELS[name.removesuffix(CHANNELS_LAST)](ours)


def place(model, name, device):
    """On the device, in the memory format that the candidate's users have."""
    ours = name in BLOCKS or name.endswith(CHANNELS_LAST)
    layout = memory_format(device) if ours else torch.contiguous_format
    return model.to(device, memory_format=layout), layout


def make_images(count, seed, device, dtype=torch.float32):
    return trial.make_images(count, {"model": {}, "image_size": 32}, seed, dtype, device)


def check(job, device):
    """Relative errors of a training step's results: in float64 on one draw of images, else on several.

    Running statistics are compared for our blocks alone: gpleiss updates its own twice.
    """
    exact_amp, _ = choose_precision("fp32", device)
    amp, _ = choose_precision(job["precision"], device)
    reference = make_model("naive", job["depth"]).double()
    model, layout = place(make_model(job["candidate"], job["depth"]), job["candidate"], device)

    def errors(reference, model, dtype, amp, seed):
        exact = trial.outcome(reference, *make_images(CHECKED_IMAGES, seed, "cpu", torch.float64), exact_amp)
        images, labels = make_images(CHECKED_IMAGES, seed, next(model.parameters()).device, dtype)
        found = trial.outcome(model, images.to(memory_format=layout), labels, amp, our_name)
        kinds = exact if job["candidate"] in BLOCKS else ("output", "gradients")
        return trial.errors(found, {kind: exact[kind] for kind in kinds})

    double = copy.deepcopy(model).to("cpu" if device.type == "mps" else device).double()  # which MPS has not
    in_double = errors(copy.deepcopy(reference), double, torch.float64, exact_amp, 0)
    if job["compiled"]:
        compile_model(model)
    draws = [errors(reference, model, torch.float32, amp, seed) for seed in range(DRAWS)]
    return {"float64": in_double, "draws": draws}


def step_functions(job, device):
    """Two functions, a training step and an inference, each on one batch that is on the device already."""
    amp, _ = choose_precision(job["precision"], device)
    model, layout = place(make_model(job["candidate"], job["depth"]), job["candidate"], device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    images, labels = make_images(job["batch_size"], 1, device)
    images = images.to(memory_format=layout)
    scaled = job["precision"] == "fp16"
    job["saved_mib"] = round(saved_bytes(lambda: model(images), model, amp) / 2**20, 1)
    if job["compiled"]:
        compile_model(model)

    step = GraphedStep(model, optimizer, amp) if job.get("graph") else Step(model, optimizer, amp, scaled=scaled)

    def train():
        model.train()
        step(images, labels, len(labels))

    @torch.no_grad()
    def infer():
        model.eval()
        with amp():
            model(images)

    return train, infer


def saved_bytes(forward, model, amp=contextlib.nullcontext):
    """Bytes that autograd keeps between forward and backward pass, each storage once, parameters not counted."""
    kept, parameters = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor lives on, so no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), amp():
        out = forward()
    del out
    return sum(size for size, _ in kept.values())


def profile(job, device):
    """The ten operations that take most of a training step, as a table; our loops stand under SharedBuffer."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    train, _ = step_functions(job, device)
    train()
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
    with profile(activities=activities) as profiler:
        train()
    kind = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    operations = [o for o in profiler.key_averages() if device.type != "cuda" or o.device_type == DeviceType.CUDA]
    operations.sort(key=lambda operation: -getattr(operation, kind))
    total = sum(getattr(operation, kind) for operation in operations)
    lines = [f"| {job['candidate']}, {job['precision']}: operation | calls | ms | share |", "|---|---|---|---|"]
    for operation in operations[:10]:
        spent = getattr(operation, kind)
        name = operation.key.removeprefix("aten::")
        lines.append(f"| {name} | {operation.count} | {spent / 1000:.3g} | {100 * spent / total:.0f} % |")
    return "\n".join([*lines, f"| all | | {total / 1000:.3g} | |\n"])


# Whole epochs, on random pixels: what they show does not change the time.


class TransformedImages(torch.utils.data.Dataset):
    """What torchvision's CIFAR10 is to a DataLoader: PIL images, transformed one by one."""

    def __init__(self, tensors, transform):
        self.pixels, self.labels, self.transform = tensors.pixels.numpy(), tensors.labels.tolist(), transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[i])), self.labels[i]


def epoch_functions(job, device):
    """Two functions, a training epoch and an evaluation of as many images each: bamos's way, or train.py's."""
    generator, count = torch.Generator().manual_seed(0), job["num_images"]
    pixels = torch.randint(256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)
    tensors = ImageTensors(pixels, torch.randint(10, (count,), generator=generator))
    torch.manual_seed(0)
    make = bamos_epochs if job["candidate"] == "bamos" else our_epochs
    return make(job, tensors, device)


def bamos_epochs(job, tensors, device):
    """As bamos and gpleiss train: PIL transforms in a DataLoader, contiguous fp32, one loop over parameters in the
    optimiser, loss and error read from the device in every step."""
    from torchvision import transforms

    normalize = transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    finish = [transforms.ToTensor(), normalize]
    pin = device.type == "cuda"
    loaders = {}
    for training in (True, False):
        transformed = TransformedImages(tensors, transforms.Compose(augment + finish if training else finish))
        options = {"shuffle": training, "num_workers": 1, "pin_memory": pin}
        loaders[training] = torch.utils.data.DataLoader(transformed, job["batch_size"], **options)
    model = DenseNet(depth=job["depth"]).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, foreach=False)

    def run(training):
        model.train(training)
        for x, labels in loaders[training]:
            x, labels = x.to(device), labels.to(device)
            with contextlib.nullcontext() if training else torch.no_grad():
                logits = model(x)
                loss = F.cross_entropy(logits, labels)
            if training:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            loss.item(), (logits.argmax(1) != labels).sum().item()

    return lambda: run(training=True), lambda: run(training=False)


def our_epochs(job, tensors, device):
    """As train.py trains by default on this device."""
    import train  # what is measured is that very script

    flags = {"--depth": job["depth"], "--batch-size": job["batch_size"], "--precision": job["precision"]}
    args, _ = arguments.parse_args([*map(str, itertools.chain(*flags.items())), "--save", "never-written"])
    set_up_device(device)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    amp, precision = choose_precision(args.precision, device)
    dataset = splits.Dataset(tensors, tensors, [str(i) for i in range(10)], splits.NORMALIZE["cifar10"]).to(device)
    batches = train.make_batches(args, dataset, device)
    model, _ = place(make_model(default_block(device), args.depth), default_block(device), device)
    step = train.make_step(model, train.make_optimizer(args, model.parameters()), amp, precision)
    epochs = itertools.count(1)

    def epoch():
        with tqdm(disable=True) as bar:
            train.train_epoch(step, batches["train"].shuffled(next(epochs)), lambda i: args.lr, bar)

    return epoch, lambda: evaluate(model, batches["test"], amp)


def serve(job):
    """A candidate's process: answers each word on its standard input, "train" or "infer", with seconds and MiB.

    On a GPU a word means several steps, of which one alone would be too short to time; the seconds are those of one.
    """
    device = choose_device(job["device"])
    torch.backends.cudnn.allow_tf32 = False  # whoever is called fp32 computes in fp32
    if job["candidate"] in BLOCKS:  # as train.py does
        set_up_device(device)
        torch.backends.cudnn.benchmark = True
    if job["task"] in ("check", "profile"):
        print(json.dumps({"check": check, "profile": profile}[job["task"]](job, device)))
        return
    if job["task"] == "epochs":
        (train, infer), times = epoch_functions(job, device), 1
    else:
        (train, infer), times = step_functions(job, device), None
    print(json.dumps(job), flush=True)
    for word in sys.stdin:
        if device.type == "cuda" and not job.get("graph"):  # which allocates only when it is captured
            torch.cuda.reset_peak_memory_stats(device)
        spent = trial.seconds({"train": train, "infer": infer}[word.strip()], device, times)
        print(json.dumps([spent, peak_memory_mib(device)]), flush=True)


@command
def main(argv=None):
    parser = Parser(prog="candidates.py", description=__doc__)
    parser.add_argument("job", type=json.loads, help="as JSON; speed.py makes them")
    serve(parser.parse_args(argv).job)


if __name__ == "__main__":
    sys.exit(main())
