"""What README.md and the other pages say about flags, networks, commands and results is what the code does."""

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
from conftest import ROOT
from PIL import Image

import densenet
import evaluate
from common.checkpoints import read_checkpoint
from publish import table_row
from training import arguments, flags

PAGES = {  # whose commands are checked
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench/README.md")
    if path.name != "extending.md"  # whose commands are of changed copies: test_extending.py
}
MORE = ("docs/extending.md", "work/README.md", "attic/debugging-discussion.md")
LINKING = PAGES | {name: (ROOT / name).read_text() for name in MORE}
README = PAGES["README.md"]


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)[1]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def table(header, rows):
    rule = "|---" * header.count("|") + "|"
    return "\n".join([f"| {header}", rule, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def flag_table():
    """The table of flags as Markdown, from the parser's own help texts."""
    rows = []
    for action in flags.make_parser()._actions[1:]:
        text = action.help.replace("%%", "%").replace("%(default)s", str(action.default))
        meaning, _, rest = text.partition(" (default: ")
        default, _, more = rest.partition(")")
        name = " ".join(action.option_strings).replace(" --no-", "/--no-")
        if action.choices and not action.metavar:
            meaning = f"{', '.join(map(str, action.choices))}: {meaning}"
        elif action.metavar:
            name += f" [{action.metavar}]" if action.nargs == "?" else f" {action.metavar}"
        rows.append((f"`{name}`", default or "–", meaning + more))
    return table("flag | default | meaning |", rows).replace("<", "&lt;").replace(">", "&gt;")


def commands():
    """Training commands of all pages, also of inline code that a line break divides."""
    for text in PAGES.values():
        text = re.sub(r"(?<!`)`[^`]+`(?!`)", lambda code: " ".join(code[0].split()), text)
        yield from re.findall(r"(?:python|--\S+|\\\n) +(train\.py[^\n`|#&\\]*)", text)


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_training_command_is_valid(command, monkeypatch):
    monkeypatch.setattr(arguments, "read_source", lambda *_: None)  # which another command writes, or a download
    given = shlex.split(command.replace("$seed", "1"))[1:]
    arguments.parse_args([flag for flag in given if flag not in ("--resume", "if-any", "--help")])


def test_table_of_networks_has_the_code_s_parameter_counts():
    rows = re.findall(r"^\| `--arch (\w+)`[^|\n]* \| ([\d,]+) \|", section("Reproduce the paper"), re.MULTILINE)
    assert {name for name, _ in rows} == set(densenet.ARCHITECTURES)
    for name, count in rows:
        with torch.device("meta"):
            model = densenet.DenseNet(**densenet.ARCHITECTURES[name], num_classes=10 if "_" in name else 1000)
        assert f"{sum(p.numel() for p in model.parameters()):,}" == count, name


def links(name):
    """(path, anchor) of every link and picture of a page that is not on another site."""
    page = ROOT / name
    for target in re.findall(r'\]\(([^)\s]+)\)|<img src="([^"]+)"', LINKING[name]):
        path, _, anchor = "".join(target).partition("#")
        if not path.startswith("https://"):
            yield Path(os.path.normpath(page.parent / path)) if path else page, anchor


def anchors(path):
    """What GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", LINKING)
def test_what_is_linked_or_named_exists(name):
    for path, anchor in links(name):
        assert path.exists(), path
        assert not anchor or anchor in anchors(path), f"{path}#{anchor}"
    for path in re.findall(r"(?<![\w/])(?:attic|bench|common|fused|inputs|tests|training)/[\w/-]+\.\w+(?!`\s+of\s+commit)\b|(?<=python )\w+\.py", LINKING[name]):
        assert (ROOT / path).exists(), path


def test_all_is_reached_from_the_readme():
    """Pages by a link, sections by the table of contents, commands and folders by the layout, figures by any page."""
    linked = list(links("README.md"))
    assert {ROOT / name for name in LINKING} <= {ROOT / "README.md", *(path for path, _ in linked)}
    assert {title.lower().replace(" ", "-") for title in re.findall(r"^## (.*)$", README, re.MULTILINE)} <= {anchor for _, anchor in linked}
    parts = {path.name for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert parts <= {os.path.relpath(path, ROOT) for path, _ in linked}
    assert set((ROOT / "images").iterdir()) <= {path for name in PAGES for path, _ in links(name)}


def measured(name, **values):
    """Rows of a benchmark's CSV that have these values, by candidate."""
    rows = pd.read_csv(ROOT / "bench" / name)
    return rows[(rows[list(values)] == pd.Series(values)).all(axis=1)].set_index("candidate")


def test_block_table_is_the_benchmark_s():
    cpu, gpu = measured("epyc.csv", precision="bf16"), measured("h200.csv", precision="bf16", depth=100, batch_size=64)
    for name in densenet.BLOCKS:
        on_gpu, on_cpu = re.search(rf"^\| `{name}` \|.* \| (.*) \| (.*) \|$", README, re.MULTILINE).groups()
        assert on_cpu == f"{cpu.ms[name]:,.0f}, {cpu.peak_mib[name]:,.0f}"
        assert on_gpu == (f"{gpu.ms[name]:.2f}, {gpu.peak_mib[name]:,.0f}" if name in gpu.index else "not measured")
    assert "about a quarter of its memory" in README and round(gpu.peak_mib["naive"] / gpu.peak_mib["fused"]) == 4
    times, in_fp32 = cpu.times_as_fast["fused"], measured("epyc.csv", precision="fp32").times_as_fast["fused"]
    words = f"`fused` is {times:.2f} times as fast in bf16, and in fp32, where it saves memory only, {in_fp32:.2f} times"
    assert words in " ".join(section("Speed and memory").split())
    for batch_size in (64, 256):
        ms = measured("h200.csv", precision="bf16", depth=100, batch_size=batch_size).ms
        assert f"| {ms['naive'] / ms['fused']:.2f} |" in PAGES["bench/README.md"]


def published(name):
    """config.json, train.csv and test.csv of a published run."""
    run = ROOT / "work" / name
    return json.loads((run / "config.json").read_text()), *(pd.read_csv(run / f"{log}.csv") for log in ("train", "test"))


def final_error(name):
    """The error after the last epoch and its 95 % interval, as work/README.md writes it."""
    return table_row(ROOT / "work" / name)[5]


def result_rows():
    rows = []
    for name in ("cifar10-jpeg.bc100", "cifar10-jpeg.bc40"):
        config, log, *_ = published(name)
        network = f"DenseNet-BC, L = {config['model']['depth']}, {config['parameters']:,} parameters"
        rows.append(("CIFAR-10, JPEG re-encoding", network, len(log), final_error(name), f"[work/{name}](work/{name})"))
    return table("data | network (k = 12) | epochs | test error (%), 95 % interval | source |", rows)


def optimizer_table():
    rows = []
    for name in ("sgd", "adam", "adam-step"):
        _, log, test = published(f"optimizers/{name}")
        rates = " → ".join(f"{rate:g}" for rate in log.lr.unique())
        errors = final_error(f"optimizers/{name}"), f"{test.error.min():.2f}", f"{log.error.iloc[-1]:.2f}"
        rows.append((f"[{name}](../work/optimizers/{name})", rates, *errors))
    return table("run | learning rate | test error (%), 95 % interval | best on test (%), not a result | training error (%) |", rows)


def spread(errors, digits):
    return f"{np.mean(errors):.{digits}f} ± {np.std(errors, ddof=1):.{digits}f}"


def few_images_table():
    errors = pd.read_csv(ROOT / "bench/few-images.csv", keep_default_na=False)
    rows = [
        (f"`{name}`" if name else "none: from scratch", *(spread(group.error, 1) for _, group in of_flags.groupby("epochs")))
        for name, of_flags in errors.groupby("flags", sort=False)
    ]
    return table("flags | 5 epochs | 10 epochs | 30 epochs |", rows)


def ablation_errors(fill, momentum):
    """Final test errors of the seeds."""
    return [published(f"ablation/{fill}-{momentum}-seed{seed}")[2].error.iloc[-1] for seed in (1, 2, 3)]


def ablation_table():
    names = {"nesterov": "Nesterov momentum", "plain": "plain momentum"}
    rows = [(name, *(spread(ablation_errors(fill, key), 2) for fill in ("mean", "black"))) for key, name in names.items()]
    return table("| mean colour beyond the border | black |", rows)


def effect(one, other):
    """Mean difference between two settings, all else equal, seed included, with the 95 % interval of a paired t-test."""
    low, high = scipy.stats.ttest_rel(one, other).confidence_interval(0.95)
    return f"{np.mean(one) - np.mean(other):+.2f} points (95 % interval {low:+.2f} … {high:+.2f})".replace("-", "−")


@pytest.mark.parametrize(
    ("page", "made"),
    [
        ("docs/flags.md", flag_table),
        ("README.md", result_rows),
        ("README.md", few_images_table),
        ("docs/adam.md", optimizer_table),
        ("docs/implementations.md", ablation_table),
    ],
)
def test_tables_are_those_of_the_code_and_the_published_runs(page, made):
    assert made() in PAGES[page], f"put this table into {page}:\n{made()}"


def test_numbers_in_the_text_are_those_of_the_published_runs():
    readme, more = (" ".join(PAGES[name].split()) for name in ("README.md", "docs/implementations.md"))
    error, _, interval = final_error("cifar10-jpeg.bc100").partition(" ")
    assert f"**{error} % test error** (95 % interval {interval.strip('()')})" in readme
    test, seconds = published("digits.bc16")[2], read_checkpoint(ROOT / "work/digits.bc16/weights.pth")["seconds"]
    assert f"its 20 epochs took {seconds:.0f} seconds and ended with a test error of {test.error.iloc[-1]:.2f} %" in readme
    errors = np.array([[ablation_errors(fill, momentum) for momentum in ("nesterov", "plain")] for fill in ("mean", "black")])
    for found in (effect(errors[1].ravel(), errors[0].ravel()), effect(errors[:, 1].ravel(), errors[:, 0].ravel())):
        assert found in more, found


def test_scores_of_the_published_digits_are_what_evaluate_prints(capsys):
    [text] = blocks(section("Use a trained network"), "text")
    assert evaluate.main([str(ROOT / "work/digits.bc16/weights.pth"), "--device", "cpu", "--precision", "fp32"]) == 0
    assert set(text.splitlines()) - {"…"} <= set(capsys.readouterr().out.splitlines())


# What stands for python, torchrun, … while the pages' commands run: the real one, on a small network and few images.
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
    args += ["--warmup", "1", "--cutout", "4"] if "--recipe" in args else []
if args[0] == "bench/recipes.py":
    args = ["bench/recipes.py", "--help"]
if args[0] == "bench/speed.py":
    args += "--device cpu --depths 10 --batch-size 2 --precisions fp32 --candidates fused".split()
if tool == "torchrun":
    changed = {{"--nnodes": "1", "--nproc_per_node": "2", "--rdzv-endpoint": "localhost:29500"}}
    pairs = [arg.partition("=") for arg in args]
    args = ["-m", "torch.distributed.run", *(f"{{k}}={{changed.get(k, v)}}" if e else k for k, e, v in pairs)]
os.execv("{python}", ["{python}", *args])
"""


@pytest.mark.long
def test_every_block_of_commands_runs(tmp_path):
    """The pages' blocks of commands, verbatim and in their order, in a copy of the repository; then the README's Python."""
    shutil.copytree(ROOT, tmp_path / "clone", ignore=shutil.ignore_patterns(".git", "data", "work", "__pycache__"))
    for run in ("digits.bc16", "cifar10-jpeg.bc40"):
        shutil.copytree(ROOT / "work" / run, tmp_path / "clone/work" / run)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("python", "torchrun", "pip", "pytest", "git", "srun", "scontrol"):
        (tools / name).write_text(SHORTENED.format(python=sys.executable))
        (tools / name).chmod(0o755)
    for shade, name in enumerate(("cat.jpg", "dog.png", "photos/1.png", *(f"DIR/{split}/{kind}/1.png" for split in ("train", "test") for kind in "ab"))):
        path = tmp_path / "clone" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 30, 3), 40 * shade, dtype=np.uint8)).save(path)
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    env |= {"SLURM_NNODES": "1", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "localhost"}
    found = [(name, block) for name, text in PAGES.items() for block in blocks(text, "bash")]
    assert len(found) >= 10
    for name, block in found:
        command = ["bash", "-euo", "pipefail", "-c", block]
        result = subprocess.run(command, cwd=tmp_path / "clone", env=env, capture_output=True, text=True)
        assert result.returncode == 0, f"{name}:\n{block}\n{result.stdout}\n{result.stderr}"
    for program in blocks(README, "python"):
        command = [sys.executable, "-c", program]
        result = subprocess.run(command, cwd=tmp_path / "clone", capture_output=True, text=True, check=True)
        assert result.stdout.strip() in "airplane automobile bird cat deer dog frog horse ship truck".split()
