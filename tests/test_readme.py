"""What the README says about flags, networks and commands is what the code does."""

import csv
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from PIL import Image

import densenet
import train
from publish import error_cell
from workdir import read_checkpoint

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)[1]


def flag_table():
    """The table of flags as Markdown, from the parser's own help texts."""
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for action in train.make_parser()._actions[1:]:
        values = {"default": action.default, "prog": "train.py"}
        text = action.help.replace("%%", "%").replace("%(default)s", str(values["default"]))
        meaning, _, rest = text.partition(" (default: ")
        default, _, more = rest.partition(")")
        name = " ".join(action.option_strings).replace(" --no-", "/--no-")
        if action.choices and not action.metavar:
            meaning = f"{', '.join(action.choices)}: {meaning}"
        elif action.metavar:
            name += f" {action.metavar}"
        lines.append(f"| `{name}` | {default or '–'} | {meaning}{more} |")
    return "\n".join(lines).replace("<", "&lt;").replace(">", "&gt;")


def test_flag_table_is_the_parsers():
    assert flag_table() in section("Flags"), f"put this table into the README:\n{flag_table()}"


def commands():
    return re.findall(r"(?:python|--\S+|\\\n) +(train\.py[^\n`|#&\\]*)", README)


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_training_command_is_valid(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [flag for flag in shlex.split(command.replace("$seed", "1"))[1:] if flag not in ("--resume", "--help")]
    train.parse_args(flags)


def test_table_of_networks_has_the_code_s_parameter_counts():
    rows = re.findall(r"\| ([\d,]+) \|[^\n]*--arch (\w+)", section("Reproduce the paper"))
    assert {name for _, name in rows} == set(densenet.ARCHITECTURES)
    for count, name in rows:
        classes = 1000 if "bc" not in name and "_" not in name else 10
        with torch.device("meta"):
            model = densenet.DenseNet(**densenet.ARCHITECTURES[name], num_classes=classes)
        assert f"{sum(p.numel() for p in model.parameters()):,}" == count, name


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_figure_is_shown_or_linked():
    for path in (ROOT / "images").iterdir():
        assert f"images/{path.name}" in README, path.name


def test_block_table_is_the_benchmark_s():
    """What the README says of memory and time stands in work/bench/cpu.csv, at depth 100."""
    with open(ROOT / "work/bench/cpu.csv", newline="") as file:
        rows = {row["candidate"]: row for row in csv.DictReader(file)}
    for name in densenet.BLOCKS:
        line = re.search(rf"^\| `{name}` \|.*$", README, re.MULTILINE)[0]
        kept, peak, ms = (int(value.replace(",", "")) for value in re.findall(r"\| ([\d,]+) (?=\|)", line))
        row = rows[name]
        assert (kept, peak, ms) == tuple(round(float(row[column])) for column in ("saved_mib", "peak_mib", "ms"))


def published(name):
    """config.json, train.csv and test.csv of a published run."""
    run = ROOT / "work" / name
    return json.loads((run / "config.json").read_text()), *(pd.read_csv(run / f"{log}.csv") for log in ("train", "test"))


def final_error(name):
    """The error after the last epoch and its 95 % interval, as work/README.md writes it."""
    test = read_checkpoint(ROOT / "work" / name / "weights.pth")["test"]
    return error_cell(test["error"], test["images"])


def result_row():
    name = "cifar10-jpeg.bc40"
    config, train_log, _ = published(name)
    network = f"DenseNet-BC, L = {config['model']['depth']}, {config['parameters']:,} parameters"
    link = f"[work/{name}](work/{name})"
    return f"| CIFAR-10, JPEG re-encoding | {network} | {len(train_log)} | {final_error(name)} | {link} |"


def optimizer_table():
    lines = [
        "| run | learning rate | test error (%), 95 % interval | best on test (%), not a result | training error (%) |",
        "|---|---|---|---|---|",
    ]
    for name in ("sgd", "adam", "adam-step"):
        _, train_log, test = published(f"optimizers/{name}")
        rates = " → ".join(f"{rate:g}" for rate in train_log.lr.unique())
        lowest, training = f"{test.error.min():.2f}", f"{train_log.error.iloc[-1]:.2f}"
        cells = (f"[{name}](work/optimizers/{name})", rates, final_error(f"optimizers/{name}"), lowest, training)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ablation_errors():
    """{(fill, momentum): final test errors of the seeds}."""
    cells = itertools.product(("mean", "black"), ("nesterov", "plain"))
    return {
        (fill, momentum): [published(f"ablation/{fill}-{momentum}-seed{seed}")[2].error.iloc[-1] for seed in (1, 2, 3)]
        for fill, momentum in cells
    }


def ablation_table():
    errors = ablation_errors()
    lines = ["| | mean colour beyond the border | black |", "|---|---|---|"]
    for momentum, name in (("nesterov", "Nesterov momentum"), ("plain", "plain momentum")):
        cells = [f"{np.mean(e):.2f} ± {np.std(e, ddof=1):.2f}" for e in (errors["mean", momentum], errors["black", momentum])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def effect(errors, one, other):
    """Mean difference between two settings, all else equal, seed included, with the 95 % interval of a paired t-test."""
    one, other = ([error for cell, values in errors.items() if name in cell for error in values] for name in (one, other))
    low, high = scipy.stats.ttest_rel(one, other).confidence_interval(0.95)
    difference = np.mean(one) - np.mean(other)
    return f"{difference:+.2f} points (95 % interval {low:+.2f} … {high:+.2f})".replace("-", "−")


@pytest.mark.parametrize("table", [result_row, optimizer_table, ablation_table])
def test_tables_of_results_are_the_published_runs(table):
    assert table() in README, f"put this table into the README:\n{table()}"


def test_effects_are_those_of_the_published_runs():
    errors, text = ablation_errors(), " ".join(README.split())
    for one, other in (("black", "mean"), ("plain", "nesterov")):
        assert effect(errors, one, other) in text, f"{one} against {other}: {effect(errors, one, other)}"


def test_first_run_s_error_is_the_published_one():
    error = published("digits.bc16")[2].error.iloc[-1]
    text, seconds = " ".join(README.split()), read_checkpoint(ROOT / "work/digits.bc16/weights.pth")["seconds"]
    assert f"a test error of {error:.2f} %" in text and f"epochs took {seconds:.0f} seconds" in text


# What stands for python, torchrun, … while the README's commands run: the real one, on a small network and few images.
SHORTENED = """#!{python}
import os, sys
tool, args = os.path.basename(sys.argv[0]), sys.argv[1:]
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
    if "DIR" in args and "--save" in args:  # a place to fill in: each command its own
        args[args.index("--save") + 1] = f"run-{{os.getpid()}}"
    args += "--dataset digits --image-size 8 --limit-train 64 --limit-test 50 --epochs 2 --device cpu".split()
    args += "--depth 10 --valid-size 0 --no-plot".split()
if args[0] == "data.py":
    args += ["--dataset", "digits"]
if tool == "torchrun":
    changed = {{"--nnodes": "1", "--nproc_per_node": "2", "--rdzv-endpoint": "localhost:29500"}}
    pairs = [arg.partition("=") for arg in args]
    args = ["-m", "torch.distributed.run", *(f"{{k}}={{changed.get(k, v)}}" if e else k for k, e, v in pairs)]
os.execv("{python}", ["{python}", *args])
"""


@pytest.mark.slow
def test_every_block_of_commands_runs(tmp_path):
    """The README's blocks of commands, verbatim and in their order, in a copy of the repository; then its Python."""
    shutil.copytree(ROOT, tmp_path / "clone", ignore=shutil.ignore_patterns(".git", "data", "work", "__pycache__"))
    for run in ("digits.bc16", "cifar10-jpeg.bc40"):
        shutil.copytree(ROOT / "work" / run, tmp_path / "clone/work" / run)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("python", "torchrun", "pip", "pytest", "git", "srun", "scontrol"):
        (tools / name).write_text(SHORTENED.format(python=sys.executable))
        (tools / name).chmod(0o755)
    for name in ("cat.jpg", "dog.png"):
        Image.fromarray(np.zeros((40, 30, 3), dtype=np.uint8)).save(tmp_path / "clone" / name)
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    env |= {"SLURM_NNODES": "1", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "localhost"}
    blocks = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 10
    for block in blocks:
        command = ["bash", "-euo", "pipefail", "-c", block]
        result = subprocess.run(command, cwd=tmp_path / "clone", env=env, capture_output=True, text=True)
        assert result.returncode == 0, f"{block}\n{result.stdout}\n{result.stderr}"
    [program] = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path / "clone", capture_output=True, text=True, check=True)
    assert result.stdout.strip() in "airplane automobile bird cat deer dog frog horse ship truck".split()
