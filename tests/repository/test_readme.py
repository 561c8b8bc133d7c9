"""What README.md and the other pages say about flags, networks, commands and results is what the code does."""

import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from conftest import ROOT

import densenet
import evaluate
from common.checkpoints import read_checkpoint
from publish import table_row
from training import arguments, flags

FOLDERS = (".", "docs", "bench", "work", "attic")
PAGES = {str(path.relative_to(ROOT)): path.read_text() for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.md"))}
VALID = {name: text for name, text in PAGES.items() if name not in ("docs/extending.md", "work/README.md")}  # which need changed code, a GPU
README = PAGES["README.md"]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands():
    """Training commands of all pages, also of inline code that a line break divides."""
    for text in VALID.values():
        text = re.sub(r"(?<!`)`[^`]+`(?!`)", lambda code: " ".join(code[0].split()), text)
        yield from re.findall(r"(?:python|--\S+|\\\n) +(train\.py[^\n`|#&\\]*)", text)


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_training_command_is_valid(command, monkeypatch):
    monkeypatch.setattr(arguments, "read_source", lambda *_: None)  # which another command writes, or a download
    line = shlex.split(command.replace("$seed", "1"))[1:]
    arguments.parse_args([flag for flag in line if flag not in ("--resume", "if-any", "--help", "…")])


def links(name):
    """(path, anchor) of every link and picture of a page that is not on another site."""
    for target in re.findall(r'\]\(([^)\s]+)\)|<img src="([^"]+)"', PAGES[name]):
        path, _, anchor = "".join(target).partition("#")
        if not path.startswith("https://"):
            yield Path(os.path.normpath((ROOT / name).parent / path)) if path else ROOT / name, anchor


def anchors(path):
    """What GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_what_is_linked_or_named_exists(name):
    for path, anchor in links(name):
        assert path.exists(), path
        assert not anchor or anchor in anchors(path), f"{path}#{anchor}"
    named = r"(?<![\w/])(?:attic|bench|common|fused|inputs|tests|training)/[\w/-]+\.\w+(?!`\s+of\s+commit)\b|(?<=python )\w+\.py"
    assert [path for path in re.findall(named, PAGES[name]) if not (ROOT / path).exists()] == []


def test_all_is_reached_from_the_readme():
    """Pages, commands and folders by a link, figures from any page."""
    linked = {path for path, _ in links("README.md")} | {ROOT / "README.md"}
    parts = {*ROOT.glob("*.py")} | {path.parent for path in ROOT.glob("*/__init__.py")}
    assert {ROOT / name for name in PAGES} | parts <= linked
    assert {*(ROOT / "images").iterdir()} <= {path for name in PAGES for path, _ in links(name)}


def test_table_of_networks_is_the_code_s():
    """Parameters; products of a forward pass, as a multiple of the default network's."""
    table, costs = re.findall(r"^\| `--arch (\w+)`[^|\n]* \| ([\d,]+) \|(?: ([\d.]+) \|)?", README, re.MULTILINE), {}
    assert {name for name, *_ in table} == set(densenet.ARCHITECTURES)
    for name, count, _ in table:
        products, (classes, size) = [], (10, 32) if "_" in name else (1000, 224)
        with torch.device("meta"):
            model = densenet.DenseNet(**densenet.ARCHITECTURES[name], num_classes=classes)
            for module in model.modules():
                if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                    module.register_forward_hook(lambda made, _, out, to=products: to.append(out.numel() * made.weight[0].numel()))
            model(torch.empty(1, 3, size, size))
        assert f"{sum(p.numel() for p in model.parameters()):,}" == count, name
        costs[name] = sum(products)
    assert all(cost in ("", f"{costs[name] / costs['densenet_bc_100_12']:.1f}") for name, _, cost in table)


def row(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def test_table_of_flags_is_the_parser_s():
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
        rows.append(row(f"`{name}`", default or "–", meaning + more).replace("<", "&lt;").replace(">", "&gt;"))
    assert re.findall(r"^\| `--.*$", PAGES["docs/flags.md"], re.MULTILINE) == rows


# What the pages say of benchmarks and published runs


def measured(name, **values):
    """Rows of a benchmark's CSV that have these values, by candidate."""
    rows = pd.read_csv(ROOT / "bench" / name)
    return rows[(rows[list(values)] == pd.Series(values)).all(axis=1)].set_index("candidate")


def published(name, log="test"):
    return pd.read_csv(ROOT / "work" / name / f"{log}.csv")


def final_error(name):
    """The error after the last epoch and its 95 % interval, as work/README.md writes it."""
    return table_row(ROOT / "work" / name)[5]


def spread(errors, digits):
    return f"{np.mean(errors):.{digits}f} ± {np.std(errors, ddof=1):.{digits}f}"


def speed():
    epyc, h200 = measured("epyc.csv", precision="bf16"), measured("h200.csv", precision="bf16", depth=100, batch_size=64)
    for machine, rows, digits in (("NVIDIA H200, a CUDA graph", h200, 2), ("AMD EPYC, two cores", epyc, 0)):
        values = ((rows.ms[block], rows.peak_mib[block]) for block in ("naive", "fused"))
        yield row(machine, *(f"{ms:,.{digits}f} ms, {peak:,.0f} MiB" for ms, peak in values))
    assert [round(h200[column]["naive"] / h200[column]["fused"]) for column in ("ms", "peak_mib")] == [2, 4]
    yield "halves the time of a training step on an NVIDIA H200, in about a quarter of the memory"
    yield f"A step takes {epyc.ms['checkpoint']:,.0f} ms and {epyc.peak_mib['checkpoint']:,.0f} MiB on the EPYC"
    times = (rows.times_as_fast["fused"] for rows in (epyc, measured("epyc.csv", precision="fp32")))
    yield "`fused` is {:.2f} times as fast in bf16; in fp32, where it saves memory only, {:.2f} times".format(*times)


def results():
    for name in ("cifar10-jpeg.bc100", "cifar10-jpeg.bc40"):
        config = json.loads((ROOT / "work" / name / "config.json").read_text())
        network = f"DenseNet-BC, L = {config['model']['depth']}, {config['parameters']:,} parameters"
        yield row("CIFAR-10, JPEG re-encoding", network, len(published(name)), final_error(name), f"[work/{name}](work/{name})")
    error, _, interval = final_error("cifar10-jpeg.bc100").partition(" ")
    yield f"**{error} % test error** (95 % interval {interval.strip('()')})"
    seconds, error = read_checkpoint(ROOT / "work/digits.bc16/weights.pth")["seconds"], final_error("digits.bc16").split()[0]
    yield f"its 20 epochs took {seconds:.0f} seconds and ended with a test error of {error} %"


def optimizers():
    for name in ("sgd", "adam", "adam-step"):
        test, log = (published(f"optimizers/{name}", log) for log in ("test", "train"))
        rates = " → ".join(f"{rate:g}" for rate in log.lr.unique())
        errors = final_error(f"optimizers/{name}"), f"{test.error.min():.2f}", f"{log.error.iloc[-1]:.2f}"
        yield row(f"[{name}](../work/optimizers/{name})", rates, *errors)


def few_images():
    for name, group in pd.read_csv(ROOT / "bench/few-images.csv", keep_default_na=False).groupby("flags"):
        cells = (spread(errors, 1) for _, errors in group.groupby("epochs").error)
        yield row(f"`{name}`" if name else "none: from scratch", *cells)


def ablation():
    runs = [[f"{fill}-{momentum}" for fill in ("mean", "black")] for momentum in ("nesterov", "plain")]
    errors = np.array([[[published(f"cifar10.ablation/{name}-seed{seed}").error.iloc[-1] for seed in (1, 2, 3)] for name in names] for names in runs])
    for name, cells in zip(("Nesterov momentum", "plain momentum"), errors, strict=True):
        yield row(name, *(spread(seeds, 2) for seeds in cells))
    for mine, other in ((errors[:, 1], errors[:, 0]), (errors[1], errors[0])):  # all else equal, seed included
        low, high = scipy.stats.ttest_rel(mine.ravel(), other.ravel()).confidence_interval(0.95)
        effect = f"{np.mean(mine) - np.mean(other):+.2f} points (95 % interval {low:+.2f} … {high:+.2f})"
        yield effect.replace("-", "−")


@pytest.mark.parametrize(
    ("page", "claims"),
    [
        ("README.md", speed),
        ("README.md", results),
        ("docs/adam.md", optimizers),
        ("docs/finetuning.md", few_images),
        ("docs/implementations.md", ablation),
    ],
)
def test_numbers_are_those_of_measurements_and_published_runs(page, claims):
    text = " ".join(PAGES[page].split())
    assert [claim for claim in claims() if claim not in text] == []


def test_scores_of_the_published_digits_are_what_evaluate_prints(capsys):
    [text] = blocks(PAGES["docs/using.md"], "text")
    assert evaluate.main([str(ROOT / "work/digits.bc16/weights.pth"), "--device", "cpu", "--precision", "fp32"]) == 0
    assert set(text.splitlines()) - {"…"} <= set(capsys.readouterr().out.splitlines())
