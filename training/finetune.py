"""Fine-tuning: trained weights to start from, what of them fits a network, and parts of it that stay as they are.

    from training.finetune import freeze, read_source, take
    source = read_source("work/digits.bc16/weights.pth")    # or torchvision's weights, from a file or by "imagenet"
    print(take(model, source, "digits"))
    print(freeze(model, "stem,blocks.0"))
"""

import hashlib
import sys
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
UNUSED = "num_batches_tracked"  # what early releases of torch did not count, and nothing here depends on


def read_source(what, arch=None):
    """Trained weights: {"model": {name here: tensor}} and, as far as it is known, what a checkpoint has in NEEDED.

    ``what`` is a checkpoint of a run, an exported .safetensors file, a file with a state dict in torchvision's names
    (or with a dict that has one in it), or "imagenet": what torchvision publishes for ``arch``. Raises Mistake.
    """
    content = published(arch) if what == "imagenet" else read_weights(what)
    found = content.get("model", content.get("state_dict", content)) if isinstance(content, dict) else None
    pairs = found.items() if isinstance(found, dict) else ()
    if not pairs or not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in pairs):
        raise Mistake(f"--init-from {what}: the file holds no weights; name a .pth or .safetensors file that does")
    source = {"model": {rename(name, FROM_TORCHVISION): value for name, value in pairs}}
    if content.keys() >= NEEDED:
        checkpoint = upgrade(content, what)
        source |= {name: checkpoint[name] for name in NEEDED}
    elif any("features." in name for name in found):  # torchvision's names
        source["normalize"] = NORMALIZE["imagenet"]
    return source


def published(arch):
    """The state dict that torchvision publishes for one of PUBLISHED, downloaded once."""
    from torchvision.models import get_model_weights

    if arch not in PUBLISHED:
        raise Mistake(f"--init-from imagenet: say of which network, with --arch: {', '.join(sorted(PUBLISHED))}")
    weights = get_model_weights(arch).DEFAULT
    path = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)  # NAME-CHECKSUM.pth
    if path.exists() and not hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem.rpartition("-")[2]):
        raise Mistake(f"{path} is incomplete or damaged: delete it, then run again")
    try:
        options = {"check_hash": True, "map_location": "cpu", "weights_only": True}
        return weights.get_state_dict(progress=sys.stderr.isatty(), **options)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise Mistake(f"cannot download {weights.url} ({reason}): put that file into {path.parent} by hand") from error


def unfit(model, source, what, classes=None):
    """Which weights of a network are not to be had from a source, and why: {name: reason}.

    ``classes`` are the names of the network's classes; a classifier of others does not fit. Raises Mistake where most
    weights don't: the source, which the user has called ``what``, is another network.
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
            f"--init-from {what}: only {len(own) - len(reasons)} of this network's {len(own)} tensors are there: "
            "say with --arch, or --depth, --growth-rate and others, of which network they are"
        )
    return reasons


def take(model, source, what, classes=None):
    """Give a network the weights of a source that fit, and leave the others as they are. Returns a line about it."""
    reasons, own = unfit(model, source, what, classes), model.state_dict()
    taken = {name: value for name, value in source["model"].items() if name in own and name not in reasons}
    model.load_state_dict(taken, strict=False)
    fresh = [f"{name} {tuple(own[name].shape)}, {reason}" for name, reason in reasons.items()]
    left = [name for name in source["model"] if name not in own and not name.endswith(UNUSED)]
    line = f"weights taken from {what}"
    for title, names in (("fresh", fresh), ("not taken", left)):
        more = [f"… {len(names) - 4} more"] if len(names) > 4 else []
        line += f"; {title}: {'; '.join(names[:4] + more)}" if names else ""
    return line


def freeze(model, names):
    """Let parts of a network, "stem,blocks.0" say, not be trained any more. Returns a line about it. Raises Mistake."""
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
    """Put a network into training mode, but for frozen batch norms, which keep their statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
            module.eval()


def parameter_groups(model, head_factor=None):
    """What the optimiser trains; the classifier in a group whose learning rate is ``head_factor`` times the others'."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if head_factor is None:
        return list(trained.values())
    others = [parameter for name, parameter in trained.items() if not name.startswith("classifier.")]
    head = {"params": list(model.classifier.parameters()), "lr_factor": head_factor}
    return [{"params": others}, head] if others else [head]
