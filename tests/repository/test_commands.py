"""Every block of commands in README.md and the other pages runs as it stands, in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_readme import PAGES, blocks

# What stands for python, torchrun, … meanwhile: the real one, on a small network and few images.
SHORTENED = f"""#!{sys.executable}
import os, sys
tool, args = os.path.basename(sys.argv[0]), sys.argv[1:]
if tool == "git" and args[-1] == "densenet":  # the clone
    os.symlink(".", "densenet")
if tool in ("pip", "pytest", "git"):
    sys.exit()
if tool == "scontrol":
    print("localhost")
    sys.exit()
if tool == "srun":
    os.execvp(args[0], args)
if "train.py" in args:
    if "--save" not in args and "--dataset" not in args:
        args += ["--save", "work/cifar10.base"]
    if "--save DIR" in " ".join(args):  # a place to fill in: each command its own
        args[args.index("--save") + 1] = f"work/{{os.getpid()}}"
    if "imagenet" in args:  # a download
        args = [arg for arg in args if arg not in ("--init-from", "imagenet", "--arch", "densenet121")]
    args += "--limit-train 64 --limit-test 50 --epochs 2 --valid-size 0 --device cpu --no-plot".split()
    args += [] if "mine" in args else "--dataset digits --image-size 8".split()
    args += [] if "--init-from" in args else "--depth 10".split()
    args += ["--warmup", "1", "--cutout", "4"] if "--recipe" in args else []
if args[0] == "bench/speed.py":
    args += "--device cpu --depths 10 --batch-size 2 --precisions fp32 --candidates fused".split()
if tool == "torchrun":
    changed = {{"--nnodes": "1", "--nproc_per_node": "2", "--rdzv-endpoint": "localhost:29500"}}
    pairs = [arg.partition("=") for arg in args]
    args = ["-m", "torch.distributed.run", *(f"{{k}}={{changed.get(k, v)}}" if e else k for k, e, v in pairs)]
os.execv(sys.executable, [sys.executable, *args])
"""
TEXT = PAGES["docs/extending.md"]
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]}
TESTS = SECTIONS.pop("Which tests to run")
# What the commands of a section print: its promise.
SAID = {
    "The activation": "(blocks.0: a BottleneckLayer that fused was not made for): this run takes naive",
    "The order of a layer": "(blocks.0: a BottleneckLayer that fused was not made for): this run takes naive",
    "A module in the layer": "block checkpoint",
    "Another block": "block list",
    "A data set": "mine: 64 training, 50 test images in 5 classes",
    "A flag that reaches the network": "DenseNet",
}


@pytest.fixture
def clone(tmp_path):
    """A copy of the repository with two published runs and some images; its own programs stand for python, git, …"""
    ignored = shutil.ignore_patterns(".git", "data", "work", "__pycache__")
    clone = shutil.copytree(ROOT, tmp_path / "clone", ignore=ignored)
    for run in ("digits.bc16", "cifar10-jpeg.bc40"):
        shutil.copytree(ROOT / "work" / run, clone / "work" / run)
    (tmp_path / "tools").mkdir()
    for name in ("python", "torchrun", "pip", "pytest", "git", "srun", "scontrol"):
        (tmp_path / "tools" / name).write_text(SHORTENED)
        (tmp_path / "tools" / name).chmod(0o755)
    folders = [f"DIR/{split}/{label}" for split in ("train", "test") for label in "ab"]
    for shade, name in enumerate(("cat.jpg", "dog.png", "photos/1.png", *(f"{folder}/1.png" for folder in folders))):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 30, 3), 40 * shade, dtype=np.uint8)).save(clone / name)
    return clone


def run(clone, text, tools="tools"):
    """The output of all blocks of commands in a text."""
    path = os.pathsep.join([str(clone.parent / tools), os.path.dirname(sys.executable), os.environ["PATH"]])
    slurm = {"SLURM_NNODES": "1", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "localhost"}
    env, output = os.environ | slurm | {"PATH": path, "OMP_NUM_THREADS": "1"}, ""
    for block in blocks(text, "bash"):
        command = ["bash", "-euo", "pipefail", "-c", block]
        result = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True)
        assert result.returncode == 0, f"{block}\n{result.stdout}\n{result.stderr}"
        output += result.stdout
    return output


def files(clone):
    """Those that git would see, or a user would have to clean up."""
    places = (path.relative_to(clone).as_posix() for path in clone.rglob("*"))
    return {place for place in places if not re.search(r"^(data|work|DIR|densenet|\.ruff_cache)\b|__pycache__", place)}


@pytest.mark.long
@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if blocks(text, "bash") and text != TEXT])
def test_every_block_of_commands_runs(page, clone):
    before = files(clone)
    run(clone, PAGES[page])
    assert files(clone) == before
    for program in blocks(PAGES[page], "python"):
        result = run(clone, f"```bash\npython -c '\n{program}'\n```\n")
        assert result.strip() in "airplane automobile bird cat deer dog frog horse ship truck 0 1 2 3 4 5 6 7 8 9".split()


def apply(diff, directory):
    """Change a file: in each part between @@, lines without "+" stand in the file, those without "-" take their place."""
    name, _, rest = diff.removeprefix("--- ").partition("\n")
    source = (directory / name).read_text()
    for part in rest.rstrip("\n").split("\n@@\n"):
        old, new = ("\n".join(line[1:] for line in part.split("\n") if line[:1] != sign) for sign in "+-")
        assert f"\n{old}\n" in source, old
        source = source.replace(f"\n{old}\n", f"\n{new}\n")
    compile(source, name, "exec")
    (directory / name).write_text(source)


@pytest.fixture
def edited(clone):
    def edit(section):
        for diff in blocks(SECTIONS[section], "diff"):
            apply(diff, clone)
        return clone

    return edit


@pytest.mark.parametrize("section", SECTIONS)
def test_a_change_of_the_network_fits(section, edited):
    edited(section)


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_a_change_of_the_network_runs(section, edited):
    assert SAID[section] in run(edited(section), SECTIONS[section])


@pytest.mark.long
@pytest.mark.parametrize("section", SECTIONS)
def test_a_change_of_the_network_passes_the_tests_that_are_named(section, edited):
    run(edited(section), TESTS, tools="none")
