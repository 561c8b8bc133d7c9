"""Other implementations of DenseNet-BC for bench.py: the ways of the two seeds, torchvision's and timm's networks."""

import contextlib
import importlib.util
import itertools

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
from densenet import FROM_TORCHVISION, DenseNet, rename
from evaluate import evaluate


def bamos(ours):
    """bamos/densenet.pytorch concatenates after every layer: our naive block, in contiguous memory and fp32."""
    return ours


def gpleiss(ours):
    """gpleiss/efficient_densenet_pytorch: up to the first convolution, a layer runs under reentrant checkpointing.

    Its batch norms update their running statistics twice in a step.
    """
    for block in ours.blocks:
        block.forward = lambda x, layers=block.layers: reentrant(layers, x)
    return ours


def reentrant(layers, x):
    outputs = [x]
    for layer in layers:

        def first_conv(*outputs, layer=layer):
            return layer.conv1(F.relu(layer.norm1(torch.cat(outputs, 1))))

        recomputed = torch.is_grad_enabled() and any(output.requires_grad for output in outputs)
        x = checkpoint(first_conv, *outputs, use_reentrant=True) if recomputed else first_conv(*outputs)
        outputs.append(layer.after_first_conv(x))
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


def available():
    """Names of MODELS whose library is installed."""
    return [name for name in MODELS if not name.startswith("timm") or importlib.util.find_spec("timm")]


def our_name(name):
    """A parameter's name in our network."""
    return rename(name, FROM_TORCHVISION)


# Whole epochs, on random pixels: what they show does not change the time.


class Images(torch.utils.data.Dataset):
    """What torchvision's CIFAR10 is to a DataLoader: PIL images, transformed one by one."""

    def __init__(self, images, transform):
        self.pixels, self.labels, self.transform = images.pixels.numpy(), images.labels.tolist(), transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[i])), self.labels[i]


def epoch_functions(name, depth, batch_size, count, device):
    """Two functions, a training epoch and an evaluation of ``count`` images each: the seeds' way, or train.py's."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)
    images = data.Images(pixels, torch.randint(10, (count,), generator=generator))
    torch.manual_seed(0)
    make = seed_epochs if name == "bamos" else our_epochs
    return make(depth, batch_size, images, device)


def seed_epochs(depth, batch_size, images, device):
    """As both seeds train: PIL transforms in a DataLoader, contiguous fp32, one loop over parameters in the optimiser,
    loss and error read from the device in every step."""
    from torchvision import transforms

    normalize = transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    finish = [transforms.ToTensor(), normalize]
    pin = device.type == "cuda"
    loaders = {}
    for training in (True, False):
        transformed = Images(images, transforms.Compose(augment + finish if training else finish))
        options = {"shuffle": training, "num_workers": 1, "pin_memory": pin}
        loaders[training] = torch.utils.data.DataLoader(transformed, batch_size, **options)
    model = DenseNet(depth=depth).to(device)
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


def our_epochs(depth, batch_size, images, device):
    """As train.py trains by default on this device."""
    import train  # what is measured is that very script

    args = train.parse_args(["--depth", str(depth), "--batch-size", str(batch_size), "--save", "never-written"])[0]
    train.set_up_device(device)
    train.set_up_torch(args)
    amp, precision = train.choose_precision(args.precision, device)
    dataset = data.Dataset(images, images, [str(i) for i in range(10)], data.NORMALIZE["cifar10"]).to(device)
    batches = train.make_batches(args, dataset)
    model, _ = train.make_model(args, dataset, device, train.choose_block(args, device, precision))
    optimizer = train.make_optimizer(args, model.parameters())
    epochs = itertools.count(1)

    def epoch():
        with tqdm(disable=True) as bar:
            shuffled = batches["train"].shuffled(next(epochs))
            train.train_epoch(model, shuffled, optimizer, lambda step: args.lr, amp, bar)

    return epoch, lambda: evaluate(model, batches["test"], amp)
