"""torch.hub.load finds networks and published weights here, from projects whose modules have the names of ours."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from helpers import photo
from PIL import Image, ImageOps

import densenet
from common.checkpoints import read_checkpoint
from inference.network import classify, preprocess

PROGRAM = """
import torch
import data, cli

network = torch.hub.load({root!r}, "run", "digits.bc16", source="local")
fresh = torch.hub.load({root!r}, "densenet_40_12", source="local", num_classes=3, block="fused")
import evaluate, fused, densenet, inference
assert {{module.OWNER for module in (data, cli, evaluate, fused, densenet, inference)}} == {{"the project"}}
assert network(network.preprocess("x.png")[None]).shape == (1, 10) and len(network.classes) == 10 and not network.training
assert fresh(torch.randn(2, 3, 8, 8)).shape == (2, 3)
"""


def hub(*args, **options):
    return torch.hub.load(str(ROOT), *args, source="local", **options)


def test_a_project_with_modules_of_the_same_names(tmp_path):
    for name in ("data", "cli", "evaluate", "fused", "densenet", "inference"):
        (tmp_path / f"{name}.py").write_text('OWNER = "the project"\n')
    (tmp_path / "program.py").write_text(PROGRAM.format(root=str(ROOT)))
    Image.new("RGB", (40, 30), "red").save(tmp_path / "x.png")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", densenet.ARCHITECTURES)
def test_every_architecture(name):
    classes = 1000 if name in ("densenet121", "densenet161", "densenet169", "densenet201") else 10
    with torch.device("meta"):
        network, ours = hub(name), densenet.DenseNet(**densenet.ARCHITECTURES[name], num_classes=classes)
        assert hub(name, num_classes=7).classifier.out_features == 7
    assert {key: value.shape for key, value in network.state_dict().items()} == {key: value.shape for key, value in ours.state_dict().items()}


@pytest.mark.parametrize("path", sorted((ROOT / "work").glob("**/weights.pth")), ids=lambda path: path.parent.name)
def test_every_published_run(path):
    checkpoint = read_checkpoint(path)
    network = hub("run", path.parent.relative_to(ROOT / "work").as_posix())
    assert not network.training and network.classes == checkpoint["classes"]
    weights = network.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in checkpoint["model"].items())


def test_an_unknown_run_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"publishes no run 'digits', but .*digits.bc16"):
        hub("run", "digits")


def pictures():
    """Files of many kinds, and what torch.hub's users have of them: opened, decoded or converted."""
    image = photo(300, 200)
    for name, picture in (("rgb.png", image), ("grey.png", image.convert("L")), ("alpha.png", image.convert("RGBA")), ("palette.gif", image.convert("P"))):
        picture.save(name)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save("turned.jpg", exif=exif)
    return ["rgb.png", "grey.png", "alpha.png", "palette.gif", "turned.jpg"]


@torch.no_grad()
@pytest.mark.parametrize("image_size", [32, 128])
def test_images_are_read_as_in_evaluation(image_size):
    """From files and from images that Pillow has opened, in memory and streamed."""
    checkpoint = read_checkpoint(ROOT / "work/digits.bc16/weights.pth")
    checkpoint["config"]["arguments"]["image_size"] = image_size
    network = hub("run", "digits.bc16")
    network.preprocess.arguments["image_size"] = image_size
    for path in pictures():
        images = network.preprocess(path)
        assert images.shape == (3, image_size, image_size)
        torch.testing.assert_close(network(images[None]).softmax(1), classify(checkpoint, [path]), rtol=0, atol=1e-6)
        opened = Image.open(path)
        assert torch.equal(network.preprocess(opened), images)
        decoded = ImageOps.exif_transpose(opened)  # which opened still can be, at its full size
        assert sorted(decoded.size) == [200, 300]
        assert (network.preprocess(decoded) - images).abs().max() < 0.1  # of standard deviations
        assert torch.equal(preprocess(path, checkpoint["config"]["arguments"], checkpoint["normalize"]), images)


def test_workers_of_a_data_loader_can_have_preprocess():
    """Those that do not fork get a pickle, and know nothing of hubconf.py."""
    network = hub("run", "digits.bc16")
    again = pickle.loads(pickle.dumps(network.preprocess))
    pictures()
    assert torch.equal(again("rgb.png"), network.preprocess("rgb.png"))
