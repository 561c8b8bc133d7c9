"""What README.md and the other pages say about flags, networks, commands and results is what the code does."""

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
import evaluate
from common.checkpoints import read_checkpoint
from publish import error_cell
from training import arguments, flags

ROOT = Path(__file__).parents[2]
PAGES = {  # whose commands are checked
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench/README.md")
    if path.name != "extending.md"  # whose commands are of changed copies: tests/test_extending.py
}
MORE = ("docs/extending.md", "work/README.md", "attic/debugging-discussion.md")
LINKING = PAGES | {name: (ROOT / name).read_text() for name in MORE}
README = PAGES["README.md"]


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)[1]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def flag_table():
    """The table of flags as Markdown, from the parser's own help texts."""
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for action in flags.make_parser()._actions[1:]:
        values = {"default": action.default, "prog": "train.py"}
        text = action.help.replace("%%", "%").replace("%(default)s", str(values["default"]))
        meaning, _, rest = text.partition(" (default: ")
        default, _, more = rest.partition(")")
        name = " ".join(action.option_strings).replace(" --no-", "/--no-")
        if action.choices and not action.metavar:
            meaning = f"{', '.join(map(str, action.choices))}: {meaning}"
        elif action.metavar:
            name += f" [{action.metavar}]" if action.nargs == "?" else f" {action.metavar}"
        lines.append(f"| `{name}` | {default or '–'} | {meaning}{more} |")
    return "\n".join(lines).replace("<", "&lt;").replace(">", "&gt;")


def test_flag_table_is_the_parsers():
    assert flag_table() in PAGES["docs/flags.md"], f"put this table into docs/flags.md:\n{flag_table()}"
    assert "](docs/flags.md)" in section("Flags")


def commands():
    """Training commands of all pages, also of inline code that a line break divides."""
    for text in PAGES.values():
        text = re.sub(r"(?<!`)`[^`]+`(?!`)", lambda code: " ".join(code[0].split()), text)
        yield from re.findall(r"(?:python|--\S+|\\\n) +(train\.py[^\n`|#&\\]*)", text)


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_training_command_is_valid(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arguments, "read_source", lambda *_: None)  # which another command writes, or a download
    flags = [flag for flag in shlex.split(command.replace("$seed", "1"))[1:] if flag not in ("--resume", "if-any", "--help")]
    arguments.parse_args(flags)


def test_table_of_networks_has_the_code_s_parameter_counts():
    rows = re.findall(r"^\| `--arch (\w+)`[^|\n]* \| ([\d,]+) \|", section("Reproduce the paper"), re.MULTILINE)
    assert {name for name, _ in rows} == set(densenet.ARCHITECTURES)
    for name, count in rows:
        classes = 1000 if "bc" not in name and "_" not in name else 10
        with torch.device("meta"):
            model = densenet.DenseNet(**densenet.ARCHITECTURES[name], num_classes=classes)
        assert f"{sum(p.numel() for p in model.parameters()):,}" == count, name


def links(name):
    """(path, anchor) of every link and picture of a page that is not on another site; paths relative to the page."""
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
def test_links_and_pictures_exist(name):
    for path, anchor in links(name):
        assert path.exists(), path
        assert not anchor or anchor in anchors(path), f"{path}#{anchor}"


@pytest.mark.parametrize("name", LINKING)
def test_files_that_are_named_exist(name):
    folders = "attic|bench|common|fused|inference|inputs|reports|tests|training"
    for path in re.findall(rf"(?<![\w/])(?:{folders})/[\w/-]+\.\w+(?!`?\s+of\s+commit)\b", LINKING[name]):
        assert (ROOT / path).exists(), path


def test_every_page_is_linked_from_the_readme():
    assert {ROOT / name for name in LINKING} <= {ROOT / "README.md", *(path for path, _ in links("README.md"))}


def test_table_of_contents_is_complete():
    headings = re.findall(r"^## (.*)$", README, re.MULTILINE)
    linked = [anchor for path, anchor in links("README.md") if path == ROOT / "README.md"]
    assert {heading.lower().replace(" ", "-") for heading in headings} <= set(linked)


def test_layout_lists_every_command_and_folder():
    linked = {path for path, _ in re.findall(r"\[\S+\]\(([\w.]+)(/README\.md)?\)", section("Layout"))}
    here = {path.name for path in (*ROOT.glob("*.py"), *ROOT.glob("*/")) if not path.name.startswith((".", "_"))}
    assert here - {"data"} == linked - {"docs/extending.md"}


def test_every_figure_is_shown_or_linked():
    assert set((ROOT / "images").iterdir()) <= {path for name in PAGES for path, _ in links(name)}


def test_block_table_is_the_benchmark_s():
    """What the README says of memory and time stands in bench/epyc.csv and bench/h200.csv."""
    table, gpu = (list(csv.DictReader((ROOT / "bench" / name).read_text().splitlines())) for name in ("epyc.csv", "h200.csv"))
    rows = {row["candidate"]: row for row in table if row["precision"] == "bf16"}
    fused = {row["precision"]: row["times_as_fast"] for row in table if row["candidate"] == "fused"}
    measured = {row["candidate"]: row for row in gpu[:2]}  # DenseNet-BC-100-12, bf16, batch 64
    text = " ".join(section("Speed and memory").split())
    assert f"`fused` is {fused['bf16']} times as fast in bf16, and in fp32, where it saves memory only, {fused['fp32']} times" in text
    for name in densenet.BLOCKS:
        line = re.search(rf"^\| `{name}` \|.*$", README, re.MULTILINE)[0]
        *_, on_gpu, on_cpu = line.removesuffix(" |").split(" | ")
        ms, peak = (int(value.replace(",", "")) for value in on_cpu.split(", "))
        assert (ms, peak) == tuple(round(float(rows[name][column])) for column in ("ms", "peak_mib"))
        if name in measured:
            ms, peak = (float(measured[name][column]) for column in ("ms", "peak_mib"))
            assert on_gpu.startswith(f"{ms:.2f}, ") and on_gpu.endswith(f"{peak:,.0f}")
    assert fused_on_gpu(gpu, 64) == "2.03" and f"| {fused_on_gpu(gpu, 256)} |" in PAGES["bench/README.md"]


def fused_on_gpu(rows, batch_size):
    """How many times as fast as naive fused is in bf16, DenseNet-BC-100-12."""
    ms = {row["candidate"]: float(row["ms"]) for row in reversed(rows)
          if (row["precision"], row["depth"], row["batch_size"]) == ("bf16", "100", str(batch_size))}  # fmt: skip
    return f"{ms['naive'] / ms['fused']:.2f}"


def published(name):
    """config.json, train.csv and test.csv of a published run."""
    run = ROOT / "work" / name
    return json.loads((run / "config.json").read_text()), *(pd.read_csv(run / f"{log}.csv") for log in ("train", "test"))


def final_error(name):
    """The error after the last epoch and its 95 % interval, as work/README.md writes it."""
    test = read_checkpoint(ROOT / "work" / name / "weights.pth")["test"]
    return error_cell(test["error"], test["images"])


def result_rows():
    return "\n".join(map(result_row, ("cifar10-jpeg.bc100", "cifar10-jpeg.bc40")))


def result_row(name):
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
        cells = (f"[{name}](../work/optimizers/{name})", rates, final_error(f"optimizers/{name}"), lowest, training)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def few_images_table():
    runs = pd.read_csv(ROOT / "bench/few-images.csv", keep_default_na=False)
    epochs = list(dict.fromkeys(runs.epochs))
    lines = [f"| flags | {' | '.join(f'{n} epochs' for n in epochs)} |", "|---" * (1 + len(epochs)) + "|"]
    for given in dict.fromkeys(runs["flags"]):
        seeds = [runs.error[(runs["flags"] == given) & (runs.epochs == n)] for n in epochs]
        cells = " | ".join(f"{errors.mean():.1f} ± {errors.std():.1f}" for errors in seeds)
        lines.append(f"| {f'`{given}`' if given else 'none: from scratch'} | {cells} |")
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


@pytest.mark.parametrize(
    ("page", "table"),
    [("README.md", result_rows), ("README.md", few_images_table), ("docs/adam.md", optimizer_table), ("docs/implementations.md", ablation_table)],
)
def test_tables_of_results_are_the_published_runs(page, table):
    assert table() in PAGES[page], f"put this table into {page}:\n{table()}"


def test_headline_is_the_published_one():
    error, _, interval = final_error("cifar10-jpeg.bc100").partition(" ")
    text = " ".join(README[: README.index("\n## ")].split())
    assert f"**{error} % test error** (95 % interval {interval.strip('()')})" in text


def test_effects_are_those_of_the_published_runs():
    errors, text = ablation_errors(), " ".join(PAGES["docs/implementations.md"].split())
    for one, other in (("black", "mean"), ("plain", "nesterov")):
        assert effect(errors, one, other) in text, f"{one} against {other}: {effect(errors, one, other)}"


def test_first_run_s_error_is_the_published_one():
    error = published("digits.bc16")[2].error.iloc[-1]
    text, seconds = " ".join(README.split()), read_checkpoint(ROOT / "work/digits.bc16/weights.pth")["seconds"]
    assert f"a test error of {error:.2f} %" in text and f"epochs took {seconds:.0f} seconds" in text


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
if args[0] == "data.py" and "--check" not in args:
    args += ["--dataset", "digits"]
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
