"""torch.hub.load finds networks and published weights here, from projects whose modules have the names of ours."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from helpers import photo
from PIL import Image, ImageOps

import densenet
from common.checkpoints import read_checkpoint
from inference import classify, preprocess

PROJECT = """
import sys
import torch
import cli, common, data, densenet, evaluate, fused

class Pictures(torch.utils.data.Dataset):
    def __init__(self, preprocess):
        self.preprocess = preprocess

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return self.preprocess("x.png")

if __name__ == "__main__":
    fresh = torch.hub.load(sys.argv[1], "densenet_40_12", source="local", num_classes=3, block="fused")
    assert {name.split(".")[1] for name in sys.modules if name.startswith("hub_") and "." in name} <= {"densenet", "fused"}
    fresh(torch.randn(2, 3, 8, 8)).sum().backward()
    network = torch.hub.load(sys.argv[1], "run", "digits.bc16", source="local")
    assert type(network) is type(fresh) and len(network.classes) == 10 and not network.training
    [images] = torch.utils.data.DataLoader(Pictures(network.preprocess), 2, num_workers=1, multiprocessing_context="spawn")
    assert network(images).shape == (2, 10)
    import inference, inputs, reader, training
    modules = cli, common, data, densenet, evaluate, fused, inference, inputs, reader, training
    assert {module.OWNER for module in modules} == {"the project"}
"""


def hub(*args, **options):
    return torch.hub.load(str(ROOT), *args, source="local", **options)


def test_a_project_with_modules_of_the_same_names(tmp_path):
    """Its modules stay its own; workers that do not fork can have preprocess."""
    for name in "cli common data densenet evaluate fused inference inputs reader training".split():
        (tmp_path / f"{name}.py").write_text('OWNER = "the project"\n')
    Image.new("RGB", (40, 30), "red").save(tmp_path / "x.png")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    (tmp_path / "project.py").write_text(PROJECT)
    result = subprocess.run([sys.executable, "project.py", str(ROOT)], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", densenet.ARCHITECTURES)
def test_every_architecture(name):
    classes = 1000 if name in ("densenet121", "densenet161", "densenet169", "densenet201") else 10
    with torch.device("meta"):
        assert str(hub(name)) == str(densenet.DenseNet(**densenet.ARCHITECTURES[name], num_classes=classes))
        assert hub(name, num_classes=7).classifier.out_features == 7


def test_every_published_run_and_one_s_own():
    for path in (ROOT / "work").glob("**/weights.pth"):
        checkpoint, network = read_checkpoint(path), hub("run", path.parent.relative_to(ROOT / "work").as_posix())
        weights = network.state_dict()
        assert not network.training and network.classes == checkpoint["classes"]
        assert all(torch.equal(weights[name], value) for name, value in checkpoint["model"].items())
    shutil.copytree(ROOT / "work/digits.bc16", "own")
    assert hub("run", "own").classes == hub("run", "digits.bc16").classes
    with pytest.raises(ValueError, match=r"digits/weights.pth is missing: python publish.py digits writes it; work/ has those of .*digits.bc16"):
        hub("run", "digits")


@torch.no_grad()
@pytest.mark.parametrize("image_size", [32, 128])
def test_images_are_read_as_in_evaluation(image_size):
    """From files and from images that Pillow has opened, in memory and streamed."""
    checkpoint = read_checkpoint(ROOT / "work/digits.bc16/weights.pth")
    checkpoint["config"]["arguments"]["image_size"] = image_size
    network = hub("run", "digits.bc16")
    network.preprocess.arguments["image_size"] = image_size
    image, exif = photo(300, 200), Image.Exif()
    exif[0x0112] = 6
    image.save("turned.jpg", exif=exif)
    image.convert("RGBA").save("alpha.png")
    for path in ("alpha.png", "turned.jpg"):
        images = network.preprocess(path)
        assert images.shape == (3, image_size, image_size)
        torch.testing.assert_close(network(images[None]).softmax(1), classify(checkpoint, [path]), rtol=0, atol=1e-6)
        opened = Image.open(path)
        assert torch.equal(network.preprocess(opened), images)
        decoded = ImageOps.exif_transpose(opened)  # which opened still can be, at its full size
        assert sorted(decoded.size) == [200, 300]
        assert (network.preprocess(decoded) - images).abs().max() < 0.1  # of standard deviations
        assert torch.equal(preprocess(path, checkpoint["config"]["arguments"], checkpoint["normalize"]), images)
