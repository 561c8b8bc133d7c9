"""Fine-tuning: find trained weights to start from, load those that fit a network, and freeze parts of it."""

import re
import sys
from collections import Counter
from http.client import HTTPException
from pathlib import Path

import torch
import torch.nn as nn

from common.checkpoints import upgrade
from common.console import Mistake
from densenet import ARCHITECTURES, FROM_TORCHVISION, rename
from inference.export import NEEDED, read_weights
from inputs.splits import NORMALIZE

PUBLISHED = [name for name, options in ARCHITECTURES.items() if options.get("stem") == "imagenet"]  # by torchvision
# Beginnings of tensor names here, and in torchvision's networks after "features."; a prefix may come before them.
OURS, THEIRS = r"(stem|blocks|transitions|norm|classifier)\.", r"(conv0|norm0|norm5|denseblock\d+|transition\d+)\."
NAME = re.compile(rf"(|.+?\.)(features\.)?({OURS}|{THEIRS})")
UNUSED = "num_batches_tracked"  # which early releases of torch did not have, and nothing here uses


def read_source(what, arch=None, channels=3):
    """Trained weights: {"model": {name here: tensor}} and, if they are known, the NEEDED entries of a checkpoint.

    ``what`` is a checkpoint of a run, an exported .safetensors file, a file with a DenseNet's state dict in it, or
    "imagenet": what torchvision publishes for ``arch``. A stem for another number of ``channels`` is changed so that it
    computes the same for a grey image. "found" says in words where the weights were, and what was changed. Raises
    Mistake.
    """
    content = published(arch) if what == "imagenet" else read_weights(what)
    if isinstance(content, dict) and content.keys() >= NEEDED and content["model"]:  # not so an .onnx file
        checkpoint = upgrade(content, what)
        source = {name: checkpoint[name] for name in ("model", *NEEDED)} | {"found": []}
    else:
        source = foreign(content, what)
    stem = source["model"].get("stem.conv.weight")
    if stem is not None and stem.ndim == 4 and stem.shape[1] != channels:
        source["model"]["stem.conv.weight"] = stem.sum(1, keepdim=True).repeat(1, channels, 1, 1) / channels
        source["found"].append(f"{stem.shape[1]} input channels {'summed' if channels == 1 else 'spread'}")
        if "normalize" in source:
            source["normalize"] = [[sum(values) / len(values)] * channels for values in source["normalize"]]
    return source


def foreign(content, what):
    """The weights of another program: of the dicts in a file, the one with most names of a DenseNet.

    The most frequent prefix of these names, such as "module.backbone.", is removed. Raises Mistake.
    """

    def prefixes(weights):
        return Counter(match[1] for match in map(NAME.match, weights) if match)

    found = max(state_dicts(content), key=lambda item: (prefixes(item[1]).total(), len(item[1])), default=None)
    if found is None:
        raise Mistake(f"--init-from {what}: the file holds no weights; name a .pth or .safetensors file that does")
    place, weights = found
    [(prefix, _)] = prefixes(weights).most_common(1) or [("", 0)]
    names = {name: re.sub(rf"^(?={THEIRS})", "features.", name.removeprefix(prefix)) for name in weights}
    source = {"model": {rename(names[name], FROM_TORCHVISION): value for name, value in weights.items()}}
    if any(name.startswith("features.") for name in names.values()):
        source["normalize"] = NORMALIZE["imagenet"]
    found = ([f"its {place}"] if place else []) + ([f"names without {prefix}"] if prefix else [])
    return source | {"found": found}


def state_dicts(content, place=""):
    """Yield (place, dict) for each dict of tensors by name in the content of a file."""
    if isinstance(content, dict) and content:
        if all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()):
            yield place, content
        for name, value in content.items():
            yield from state_dicts(value, f"{place}.{name}".strip("."))


def published(arch):
    """The state dict that torchvision publishes for one of PUBLISHED, downloaded once."""
    from torchvision.models import get_model_weights

    if arch not in PUBLISHED:
        raise Mistake(f"--init-from imagenet: say of which network, with --arch: {', '.join(sorted(PUBLISHED))}")
    url = get_model_weights(arch).DEFAULT.url
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)  # NAME-CHECKSUM.pth
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), path.stem.rpartition("-")[2], sys.stderr.isatty())
        except (OSError, RuntimeError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise Mistake(f"cannot download {url} ({reason}): put that file into {path.parent} by hand") from error
    return read_weights(path)


def unfit(model, source, what, classes=None):
    """The weights of a network that a source lacks, and why: {name: reason}.

    ``classes`` are the network's; a classifier of others does not fit. Raises Mistake if most weights do not fit: the
    source, which the user calls ``what``, is another network.
    """
    found, reasons = source["model"], {}
    own = {name: value.shape for name, value in model.state_dict().items() if not name.endswith(UNUSED)}
    for name, shape in own.items():
        if name not in found:
            reasons[name] = "not there"
        elif found[name].shape != shape:
            reasons[name] = f"there {tuple(found[name].shape)}"
        elif name.startswith("classifier.") and source.get("classes", classes) != classes:
            reasons[name] = "there of other classes"
    if 2 * len(reasons) > len(own):
        raise Mistake(
            f"--init-from {what}: only {len(own) - len(reasons)} of this network's {len(own)} tensors are there, among "
            f"{', '.join([*found][:3])}, …: say with --arch, or --depth, --growth-rate and others, which network it is"
        )
    return reasons


def take(model, source, what, classes=None):
    """Load the weights of a source that fit a network, and keep its others. Returns a line about it."""
    reasons, own = unfit(model, source, what, classes), model.state_dict()
    taken = {name: value for name, value in source["model"].items() if name in own and name not in reasons}
    model.load_state_dict(taken, strict=False)
    fresh = [f"{name} {tuple(own[name].shape)}, {reason}" for name, reason in reasons.items()]
    left = [name for name in source["model"] if name not in own and not name.endswith(UNUSED)]
    line = f"weights taken from {what}" + (f" ({', '.join(source['found'])})" if source.get("found") else "")
    for title, names in (("fresh", fresh), ("not taken", left)):
        more = [f"… {len(names) - 4} more"] if len(names) > 4 else []
        line += f"; {title}: {'; '.join(names[:4] + more)}" if names else ""
    return line


def freeze(model, names):
    """Stop training parts of a network, such as "stem,blocks.0". Returns a line about it. Raises Mistake."""
    children = {name: child for name, child in model.named_children() if name != "relu"}
    parts = {"features": [child for name, child in children.items() if name != "classifier"]}
    for name, child in children.items():
        several = isinstance(child, nn.ModuleList)
        parts |= {f"{name}.{i}": [part] for i, part in enumerate(child)} if several else {name: [child]}
    for name in names.split(","):
        if name not in parts:
            raise Mistake(f"--freeze {name}: the network has the parts {', '.join(parts)}")
        for part in parts[name]:
            part.requires_grad_(False)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not trained:
        raise Mistake(f"--freeze {names} leaves nothing to train: leave out some of it")
    return f"frozen: {names.replace(',', ', ')}; {trained:,} parameters are trained"


def training_mode(model):
    """Put a network into training mode, except for frozen batch norms, which keep their statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
            module.eval()


def parameter_groups(model, head_factor=None):
    """Parameter groups for the optimiser. The classifier's learning rate is ``head_factor`` times the others'."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if head_factor is None:
        return list(trained.values())
    others = [parameter for name, parameter in trained.items() if not name.startswith("classifier.")]
    head = {"params": list(model.classifier.parameters()), "lr_factor": head_factor}
    return [{"params": others}, head] if others else [head]
