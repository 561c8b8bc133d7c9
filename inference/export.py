"""A trained network as a file for other programs, in ONNX, safetensors or torch.export's format; and read back.

    from inference import classify, read_network
    checkpoint = read_network("work/digits.bc16/weights.onnx")  # for classify, like that of weights.pth

The metadata of each file hold, as JSON by name, what a checkpoint holds beside its weights, such as "classes" and
"config" with the architecture; and "images": their size, colours, resizing, and each channel's mean and deviation.
"""

import importlib.util
import io
import json
from pathlib import Path

import torch

from common.checkpoints import load_file, upgrade
from common.config import stages
from common.console import Mistake, memory_problem
from common.files import readable, written_whole
from inference.network import load_model, reader_of

SIZES = (1, 3, 64)  # of the batches that check an exported network
TOLERANCE = 1e-5  # of the largest logit, or of 1
NEEDED = {"config", "normalize", "classes"}  # beside the weights


class Exported(torch.nn.Module):
    """A network that another program runs on the CPU: images (N, C, S, S) → logits (N, classes), float32."""

    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, images):
        return self.run(images.cpu().contiguous()).to(images.device)


@torch.no_grad()
def export(checkpoint, path, images):
    """Write the network of a checkpoint to ``path``, in the format of its suffix.

    Checks its logits for ``images`` (64, C, S, S), normalised. Returns their largest difference, as a fraction of the
    largest logit, or of 1. Raises Mistake if that exceeds TOLERANCE.
    """
    write, read = FORMATS[path.suffix]
    content = write(checkpoint)
    networks = load_model(checkpoint), load_model(read(content))
    expected, exported = (torch.cat([network(images[:size]) for size in SIZES]) for network in networks)
    difference = (exported - expected).abs().max().item() / max(1.0, expected.abs().max().item())
    if not difference <= TOLERANCE:
        raise Mistake(f"{path} would compute something else: logits differ by {difference:.1e} of the largest one")
    with written_whole(path) as file:
        file.write(content)
    return difference


def read_network(path):
    """The checkpoint in a .pth file or an exported one, for ``load_model``. Raises Mistake, or OSError if missing."""
    return upgrade(read_weights(path), path)


def read_weights(path):
    """What a file of weights by any program holds. Raises Mistake if it is damaged, OSError if an export is missing."""
    suffix = Path(path).suffix
    if suffix not in FORMATS:
        return load_file(path)
    if suffix == ".pt2":
        raise Mistake(f"{path} could run any code when it is loaded: name a .pth, .onnx or .safetensors file")
    try:
        return FORMATS[suffix][1](readable(path).read_bytes())
    except Exception as error:  # each format raises others
        if isinstance(error, (Mistake, OSError)) or memory_problem(error):
            raise
        raise Mistake(f"{path} is damaged or no {suffix} file ({type(error).__name__})") from error


def require(*packages):
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise Mistake(f"this needs packages that are not installed: pip install {' '.join(missing)}")


def describe(checkpoint):
    """All but the weights, as JSON by name, and "images"; without commands and names of test files."""
    first, *resumed = ({**stage, "command": None} for stage in stages(checkpoint["config"]))
    own = {"images": reading(checkpoint), "config": first | {"resumed": resumed}}
    if checkpoint["manifest"]:
        own["manifest"] = checkpoint["manifest"] | {"test_files": []}
    return {name: json.dumps(value) for name, value in (checkpoint | own).items() if name != "model"}


def reading(checkpoint):
    """How other programs prepare images for the network."""
    reader, (mean, std) = reader_of(checkpoint), checkpoint["normalize"]
    size, resized = reader.image_size, reader.image_size * 8 // 7
    return {
        "shape": ["N", reader.channels, size, size],
        "colours": "RGB" if reader.channels == 3 else "grey",
        "resize": f"the shorter side to {resized}" if reader.streams else f"the whole image to {size}×{size}",
        "crop": f"the centre, {size}×{size}" if reader.streams else None,
        "filter": "bilinear, antialiased (Pillow's BILINEAR)",
        "values": "(0 … 255 - mean) / std, of each channel",
        "mean": mean,
        "std": std,
    }


def described(metadata):
    """The inverse of ``describe``; {} if another program wrote the metadata."""
    return {name: json.loads(value) for name, value in metadata.items()} if metadata.keys() >= NEEDED else {}


def traced(checkpoint):
    """The network, an example of its input, and that input's dimension whose size may change: the batch."""
    arguments = checkpoint["config"]["arguments"]
    images = torch.zeros(2, arguments["channels"], *[arguments["image_size"]] * 2)  # torch makes 1 a constant
    return load_model(checkpoint), (images,), ({0: torch.export.Dim("batch")},)


# For each format: a checkpoint → bytes, and back. A format without a state dict gives the checkpoint a "network" and an
# empty "model".


def to_onnx(checkpoint):
    require("onnx", "onnxscript", "onnxruntime")
    import onnx

    model, inputs, sizes = traced(checkpoint)
    names = dict(input_names=["images"], output_names=["logits"])
    program = torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=sizes, verbose=False, **names)
    program.model.metadata_props.update(describe(checkpoint))
    content = program.model_proto
    content.ir_version = onnx.helper.find_min_ir_version_for(content.opset_import)  # for older runtimes
    return content.SerializeToString()


def from_onnx(content):
    require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(images):
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return described(session.get_modelmeta().custom_metadata_map) | {"model": {}, "network": Exported(run)}


def to_safetensors(checkpoint):
    require("safetensors")
    from safetensors.torch import save

    return save({name: value.contiguous() for name, value in checkpoint["model"].items()}, describe(checkpoint))


def from_safetensors(content):
    require("safetensors")
    from safetensors.torch import load

    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return described(header.get("__metadata__", {})) | {"model": load(content)}


def to_pt2(checkpoint):
    model, inputs, sizes = traced(checkpoint)
    file = io.BytesIO()
    program = torch.export.export(model, inputs, dynamic_shapes=sizes)
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(describe(checkpoint))})
    return file.getvalue()


def from_pt2(content):
    program = torch.export.load(io.BytesIO(content)).module()
    return {"model": {}, "network": Exported(program.__call__)}  # the module itself has no evaluation mode


FORMATS = {
    ".onnx": (to_onnx, from_onnx),
    ".safetensors": (to_safetensors, from_safetensors),
    ".pt2": (to_pt2, from_pt2),
}
