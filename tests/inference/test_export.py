"""What publish.py exports is the network of the run, and evaluate.py takes it like a checkpoint."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import photo, write_folder
from PIL import Image

import evaluate
import publish
from common.checkpoints import read_checkpoint
from common.console import Mistake
from inference import export
from inference.network import classify, load_model, preprocess

WEIGHTS = ROOT / "work/digits.bc16/weights.pth"


@pytest.fixture
def published(tiny, tmp_path):
    """A run on class folders alone, of which a fifth is set apart for testing."""
    root = write_folder(tmp_path / "images", train=50, classes=("cat", "dog")) / "train"
    flags = ["--dataset", "folder", "--data", str(root), "--image-size", "8", "--depth", "10", "--growth-rate", "4"]
    assert tiny("--save", "run", "--epochs", "1", *flags, args=[]) == 0 and publish.main(["run"]) == 0
    return read_checkpoint("run/weights.pth")


def onnx_metadata(path, published):
    """As the package onnx reads them, after a look at what the graph takes and returns."""
    import onnx

    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == onnx.helper.find_min_ir_version_for(model.opset_import) < 10  # which older runtimes refuse
    [images], [logits] = model.graph.input, model.graph.output
    sizes = [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in (images, logits)]
    assert (images.name, logits.name, sizes) == ("images", "logits", [["batch", 3, 8, 8], ["batch", 2]])
    return {entry.key: entry.value for entry in model.metadata_props}


def safetensors_metadata(path, published):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        assert all(torch.equal(file.get_tensor(name), value) for name, value in published["model"].items())
        return file.metadata()


@pytest.mark.parametrize(
    ("kind", "package", "metadata"),
    [("onnx", "onnxscript", onnx_metadata), ("safetensors", "safetensors", safetensors_metadata)],
)
def test_exported_networks_are_those_of_the_run(published, kind, package, metadata, capsys):
    pytest.importorskip(package)
    assert publish.main(["run", "--export", kind]) == 0
    out, path = capsys.readouterr().out.replace("\\", "/"), f"run/weights.{kind}"
    assert float(re.search(rf"^{path}: on 20 test images, logits differ from torch's by (\S+) of the largest$", out, re.MULTILINE)[1]) < 1e-5
    assert metadata(path, published) == export.describe(published)
    content, network = Path(path).read_bytes(), export.read_network(path)
    assert network["classes"] == ["cat", "dog"] and b"cat/" not in content and b"python " not in content and b".png" not in content
    assert evaluate.main(["run/weights.pth", "--precision", "fp32"]) == 0 and (expected := capsys.readouterr().out)
    assert evaluate.main([path, "--precision", "fp32"]) == 0 and capsys.readouterr().out == expected
    image = str(next(Path("images").rglob("*.png")))
    torch.testing.assert_close(classify(network, [image]), classify(published, [image]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("image_size", "channels"), [(32, 3), (128, 1)])
def test_metadata_say_how_images_are_read(image_size, channels):
    """Followed with Pillow alone, the network is given what it is given here."""
    checkpoint = read_checkpoint(WEIGHTS)
    checkpoint["config"]["arguments"] |= {"image_size": image_size, "channels": channels}
    checkpoint["normalize"] = [[100.0, 90.0, 80.0][:channels], [50.0, 60.0, 70.0][:channels]]
    photo(300, 200).save("a.png")
    told = json.loads(export.describe(checkpoint)["images"])
    image, (_, depth, height, width) = Image.open("a.png").convert({"RGB": "RGB", "grey": "L"}[told["colours"]]), told["shape"]
    if told["crop"]:
        short = int(re.fullmatch(r"the shorter side to (\d+)", told["resize"])[1])
        image = image.resize((int(short * 1.5), short), Image.BILINEAR)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image.resize((width, height), Image.BILINEAR), dtype=float).reshape(height, width, depth)
    values = ((pixels - told["mean"]) / told["std"]).transpose(2, 0, 1)
    assert "BILINEAR" in told["filter"]
    ours = preprocess("a.png", checkpoint["config"]["arguments"], checkpoint["normalize"])
    assert np.abs(ours.numpy() - values).max() < 0.05


def test_torch_export(published, tiny, capsys):
    assert publish.main(["run", "--export", "pt2"]) == 0
    network = torch.export.load("run/weights.pt2", extra_files=(extra := {"metadata.json": ""})).module()
    assert json.loads(json.loads(extra["metadata.json"])["classes"]) == published["classes"]
    assert "python " not in extra["metadata.json"] and "images" in json.loads(extra["metadata.json"])
    for size in (1, 5):
        images = torch.randn(size, 3, 8, 8)
        torch.testing.assert_close(network(images), load_model(published)(images), rtol=1e-5, atol=1e-5)
    assert evaluate.main(["run/weights.pt2"]) == 2 and "could run any code" in capsys.readouterr().err
    assert tiny("--save", "run", "--epochs", "1", "--overwrite") == 0
    assert not list(Path("run").glob("weights.*"))  # of the run that is no more


@pytest.mark.parametrize("size", export.SIZES)
def test_an_export_that_is_wrong_for_one_batch_size_is_not_kept(size, tmp_path, monkeypatch):
    checkpoint, wrong = read_checkpoint(WEIGHTS), 0
    model, images = load_model(checkpoint), torch.randn(64, 3, 32, 32)

    def network(images):
        return model(images) + (wrong if len(images) == size else 0)

    monkeypatch.setitem(export.FORMATS, ".x", (lambda checkpoint: b"content", lambda content: {"network": network}))
    wrong = 1e-3
    with pytest.raises(Mistake, match="would compute something else: logits differ by"):
        export.export(checkpoint, tmp_path / "weights.x", images)
    assert list(tmp_path.iterdir()) == []
    wrong = 1e-6
    assert 0 < export.export(checkpoint, tmp_path / "weights.x", images) < 1e-5
    assert (tmp_path / "weights.x").read_bytes() == b"content"


def test_other_files_are_refused_in_a_line(capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    save = pytest.importorskip("safetensors.torch").save_file
    save({"x": torch.zeros(1)}, "described.safetensors", {"format": "pt"})
    Path("damaged.onnx").write_bytes(b"damaged")
    Path("short.safetensors").write_bytes(b"damaged")
    for name, words in (
        ("described.safetensors", " is not a checkpoint of train.py"),
        ("damaged.onnx", " is damaged or no .onnx file"),
        ("short.safetensors", " is damaged or no .safetensors file"),
        ("missing.onnx", ": No such file"),
    ):
        assert evaluate.main([name]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"evaluate.py: error: {name}{words}") and err.count("\n") == 1
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for call in (export.to_onnx, export.from_onnx, export.to_safetensors, export.from_safetensors):
        with pytest.raises(Mistake, match=r"packages that are not installed: pip install .*(onnx|safetensors)"):
            call(None)
