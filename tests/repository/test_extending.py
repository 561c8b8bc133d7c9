"""What docs/extending.md shows is run as it stands there, each section in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

TEXT = (ROOT / "docs/extending.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]}
SHORT = "--depth 10 --growth-rate 4 --limit-train 64 --limit-test 50 --epochs 1 --device cpu --no-plot"
# The section's promise, as its commands print it.
SAID = {
    "The activation, or the order of a layer": "(blocks.0: a BottleneckLayer that fused was not made for): this run takes naive",
    "A module in the layer": "block checkpoint",
    "Another block": "block list",
    "A data set": "mine: 64 training, 50 test images in 5 classes",
    "A flag that reaches the network": "DenseNet",
}


def blocks(section, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", SECTIONS[section], re.MULTILINE | re.DOTALL)


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
def edited(tmp_path):
    def edit(section):
        ignored = shutil.ignore_patterns(".git", "data", "work", "attic", "images", "__pycache__")
        shutil.copytree(ROOT, tmp_path / "clone", ignore=ignored)
        for diff in blocks(section, "diff"):
            apply(diff, tmp_path / "clone")
        return tmp_path / "clone"

    return edit


def run(directory, command):
    env = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = re.sub(r"^(python train\.py.*)$", lambda line: line[0] if "--resume" in line[0] else f"{line[0]} {SHORT}", command, flags=re.MULTILINE)
    result = subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=directory, env=env, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_every_section_has_a_promise():
    assert [*SECTIONS] == [*SAID, "Which tests to run"]


@pytest.mark.parametrize("section", SAID)
def test_a_section_s_changes_fit(section, edited):
    edited(section)


@pytest.mark.slow
@pytest.mark.parametrize("section", SAID)
def test_a_section_runs(section, edited):
    clone = edited(section)
    assert SAID[section] in "".join(run(clone, block) for block in blocks(section, "bash"))


@pytest.mark.long
@pytest.mark.parametrize("section", SAID)
def test_the_tests_that_are_named_pass(section, edited):
    [command] = blocks("Which tests to run", "bash")
    run(edited(section), command)
