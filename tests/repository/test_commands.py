"""Every block of commands in README.md and the other pages runs as it stands, in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from helpers import write_folder
from PIL import Image
from test_readme import PAGES, blocks

# What stands for python meanwhile: the real one, on a small network and few images.
SHORTENED = f"""#!{sys.executable}
import os, sys
args = sys.argv[1:]
if "train.py" in args:
    if "--save" not in args and "--dataset" not in args:
        args += ["--save", "work/cifar10.base"]
    if "--save DIR" in " ".join(args):  # a place to fill in: each command its own
        args[args.index("--save") + 1] = f"work/{{os.getpid()}}"
    if "imagenet" in args:  # a download
        args = [arg for arg in args if arg not in ("--init-from", "imagenet", "--arch", "densenet121")]
    args += "--epochs 2 --valid-size 0 --device cpu --no-plot".split()
    args += [] if "mine" in args else "--dataset digits --image-size 8 --limit-train 64 --limit-test 50".split()
    args += [] if "--init-from" in args else "--depth 10".split()
    args += ["--warmup", "1", "--cutout", "4"] if "--recipe" in args else []
if args[0] == "bench/speed.py":
    args += "--device cpu --depths 10 --batch-size 2 --precisions fp32 --candidates fused".split()
os.execv(sys.executable, [sys.executable, *args])
"""
# And for other programs.
PROGRAMS = """
pip() { :; }
pytest() { :; }
git() { [ "${*: -1}" != densenet ] || ln -s . densenet; }  # the clone
srun() { "$@"; }
scontrol() { echo localhost; }
torchrun() {
    set -- "${@/#--nnodes=*/--nnodes=1}"
    set -- "${@/#--nproc_per_node=*/--nproc_per_node=2}"
    python -m torch.distributed.run "${@/#--rdzv-endpoint=*/--rdzv-endpoint=localhost:29500}"
}
"""
SLURM = {"SLURM_NNODES": "1", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "localhost"}
TEXT = PAGES["docs/extending.md"]
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]}
TESTS = SECTIONS.pop("Which tests to run")


@pytest.fixture
def clone(tmp_path):
    """A copy of the repository with two published runs and some images."""
    ignored = shutil.ignore_patterns(".git", "data", "work", "__pycache__")
    clone = shutil.copytree(ROOT, tmp_path / "clone", ignore=ignored)
    for run in ("digits.bc16", "cifar10-jpeg.bc40"):
        shutil.copytree(ROOT / "work" / run, clone / "work" / run)
    for shade, path in enumerate(write_folder(clone / "DIR").rglob("*.png")):  # no two alike
        Image.new("RGB", (40, 30), (0, 0, 20 * shade)).save(path)
    photos = shutil.copytree(clone / "DIR/train/cat", clone / "photos")
    for name in ("cat.jpg", "dog.png"):
        Image.open(photos / "0.png").save(clone / name)
    (tmp_path / "python").write_text(SHORTENED)
    (tmp_path / "python").chmod(0o755)
    return clone


def run(clone, text, programs=PROGRAMS):
    """The output of all blocks of commands in a text."""
    path = os.pathsep.join([*([str(clone.parent)] if programs else []), os.path.dirname(sys.executable), os.environ["PATH"]])
    env, output = os.environ | SLURM | {"PATH": path, "OMP_NUM_THREADS": "1"}, ""
    for block in blocks(text, "bash"):
        command = ["bash", "-euo", "pipefail", "-c", programs + block]
        result = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True)
        assert result.returncode == 0, f"{block}\n{result.stdout}\n{result.stderr}"
        output += result.stdout
    return output


@pytest.mark.long
@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if blocks(text, "bash") and text != TEXT])
def test_every_block_of_commands_runs(page, clone):
    run(clone, PAGES[page])
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


def edited(clone, section):
    for diff in blocks(SECTIONS[section], "diff"):
        apply(diff, clone)
    return clone


@pytest.mark.parametrize("section", SECTIONS)
def test_a_change_of_the_network_fits(section, clone):
    edited(clone, section)


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_a_change_of_the_network_runs(section, clone):
    text = SECTIONS[section]
    output, said = (set(lines.splitlines()) for lines in (run(edited(clone, section), text), "".join(blocks(text, "text"))))
    assert said <= output
    assert not [line for line in output - said if "takes naive" in line]


@pytest.mark.long
@pytest.mark.parametrize("section", SECTIONS)
def test_a_change_of_the_network_passes_the_tests_that_are_named(section, clone):
    run(edited(clone, section), TESTS, programs="")
