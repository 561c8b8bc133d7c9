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
    given = shlex.split(command.replace("$seed", "1"))[1:]
    arguments.parse_args([flag for flag in given if flag not in ("--resume", "if-any", "--help")])


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
    found, costs = re.findall(r"^\| `--arch (\w+)`[^|\n]* \| ([\d,]+) \|(?: ([\d.]+) \|)?", README, re.MULTILINE), {}
    assert {name for name, *_ in found} == set(densenet.ARCHITECTURES)
    for name, count, _ in found:
        products, (classes, size) = [], (10, 32) if "_" in name else (1000, 224)
        with torch.device("meta"):
            model = densenet.DenseNet(**densenet.ARCHITECTURES[name], num_classes=classes)
            for module in model.modules():
                if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                    module.register_forward_hook(lambda made, _, out, to=products: to.append(out.numel() * made.weight[0].numel()))
            model(torch.empty(1, 3, size, size))
        assert f"{sum(p.numel() for p in model.parameters()):,}" == count, name
        costs[name] = sum(products)
    assert all(cost in ("", f"{costs[name] / costs['densenet_bc_100_12']:.1f}") for name, _, cost in found)


# Tables that are made from code, benchmarks and logs


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


def measured(name, **values):
    """Rows of a benchmark's CSV that have these values, by candidate."""
    rows = pd.read_csv(ROOT / "bench" / name)
    return rows[(rows[list(values)] == pd.Series(values)).all(axis=1)].set_index("candidate")


EPYC, H200 = measured("epyc.csv", precision="bf16"), measured("h200.csv", precision="bf16", depth=100, batch_size=64)


def block_table():
    rows = []
    for machine, found, digits in (("NVIDIA H200, a CUDA graph", H200, 2), ("AMD EPYC, two cores", EPYC, 0)):
        values = [(found.ms[block], found.peak_mib[block]) for block in ("naive", "fused")]
        rows.append((machine, *(f"{ms:,.{digits}f} ms, {peak:,.0f} MiB" for ms, peak in values)))
    return table("training step, batch 64, bf16 | usual block (`naive`) | `fused` |", rows)


def published(name):
    """train.csv and test.csv of a published run."""
    return (pd.read_csv(ROOT / "work" / name / f"{log}.csv") for log in ("train", "test"))


def final_error(name):
    """The error after the last epoch and its 95 % interval, as work/README.md writes it."""
    return table_row(ROOT / "work" / name)[5]


def result_table():
    rows = []
    for name in ("cifar10-jpeg.bc100", "cifar10-jpeg.bc40"):
        config = json.loads((ROOT / "work" / name / "config.json").read_text())
        network = f"DenseNet-BC, L = {config['model']['depth']}, {config['parameters']:,} parameters"
        epochs = len(next(published(name)))
        rows.append(("CIFAR-10, JPEG re-encoding", network, epochs, final_error(name), f"[work/{name}](work/{name})"))
    return table("data | network (k = 12) | epochs | test error (%), 95 % interval | source |", rows)


def optimizer_table():
    rows = []
    for name in ("sgd", "adam", "adam-step"):
        log, test = published(f"optimizers/{name}")
        rates = " → ".join(f"{rate:g}" for rate in log.lr.unique())
        errors = final_error(f"optimizers/{name}"), f"{test.error.min():.2f}", f"{log.error.iloc[-1]:.2f}"
        rows.append((f"[{name}](../work/optimizers/{name})", rates, *errors))
    return table("run | learning rate | test error (%), 95 % interval | best on test (%), not a result | training error (%) |", rows)


def spread(errors, digits):
    return f"{np.mean(errors):.{digits}f} ± {np.std(errors, ddof=1):.{digits}f}"


def few_images_table():
    errors, rows = pd.read_csv(ROOT / "bench/few-images.csv", keep_default_na=False), []
    for name, of_flags in errors.groupby("flags", sort=False):
        cells = (spread(group.error, 1) for _, group in of_flags.groupby("epochs"))
        rows.append((f"`{name}`" if name else "none: from scratch", *cells))
    return table("flags | 5 epochs | 10 epochs | 30 epochs |", rows)


def ablation_errors(momentum):
    """Final test errors with the border in mean colour and in black, three seeds each: (2, 3)."""
    runs = ([f"ablation/{fill}-{momentum}-seed{seed}" for seed in (1, 2, 3)] for fill in ("mean", "black"))
    return np.array([[list(published(run))[1].error.iloc[-1] for run in row] for row in runs])


def ablation_table():
    names = {"nesterov": "Nesterov momentum", "plain": "plain momentum"}
    rows = [(name, *(spread(errors, 2) for errors in ablation_errors(key))) for key, name in names.items()]
    return table("| mean colour beyond the border | black |", rows)


MADE = {
    "README.md": [block_table, result_table],
    "docs/flags.md": [flag_table],
    "docs/finetuning.md": [few_images_table],
    "docs/adam.md": [optimizer_table],
    "docs/implementations.md": [ablation_table],
}


@pytest.mark.parametrize(("page", "made"), [(page, made) for page, tables in MADE.items() for made in tables])
def test_tables_are_those_of_the_code_and_the_published_runs(page, made):
    assert made() in PAGES[page], f"put this table into {page}:\n{made()}"


def effect(one, other):
    """Mean difference between two settings, all else equal, seed included, with the 95 % interval of a paired t-test."""
    low, high = scipy.stats.ttest_rel(one.ravel(), other.ravel()).confidence_interval(0.95)
    return f"{np.mean(one) - np.mean(other):+.2f} points (95 % interval {low:+.2f} … {high:+.2f})".replace("-", "−")


def sentences():
    """(page, what it says) of each number in a sentence that comes from a benchmark or a published run."""
    assert round(H200.ms["naive"] / H200.ms["fused"]) == 2 and round(H200.peak_mib["naive"] / H200.peak_mib["fused"]) == 4
    yield "README.md", "halves the time of a training step on an NVIDIA H200, in about a quarter of the memory"
    yield "README.md", f"A step takes {EPYC.ms['checkpoint']:,.0f} ms and {EPYC.peak_mib['checkpoint']:,.0f} MiB on the EPYC"
    times = EPYC.times_as_fast["fused"], measured("epyc.csv", precision="fp32").times_as_fast["fused"]
    yield "README.md", "`fused` is {:.2f} times as fast in bf16; in fp32, where it saves memory only, {:.2f} times".format(*times)
    wide = measured("h200.csv", precision="bf16", depth=100, batch_size=256).ms
    for ms in (H200.ms, wide):
        yield "bench/README.md", f"| {ms['naive'] / ms['fused']:.2f} |"
    error, _, interval = final_error("cifar10-jpeg.bc100").partition(" ")
    yield "README.md", f"**{error} % test error** (95 % interval {interval.strip('()')})"
    seconds, error = read_checkpoint(ROOT / "work/digits.bc16/weights.pth")["seconds"], final_error("digits.bc16").split()[0]
    yield "README.md", f"its 20 epochs took {seconds:.0f} seconds and ended with a test error of {error} %"
    nesterov, plain = ablation_errors("nesterov"), ablation_errors("plain")
    yield "docs/implementations.md", effect(plain, nesterov)
    yield "docs/implementations.md", effect(*(np.array([nesterov[fill], plain[fill]]) for fill in (1, 0)))


def test_numbers_in_sentences_are_those_of_the_measurements():
    for page, said in sentences():
        assert said in " ".join(PAGES[page].split()), said


def test_scores_of_the_published_digits_are_what_evaluate_prints(capsys):
    [text] = blocks(PAGES["docs/using.md"], "text")
    assert evaluate.main([str(ROOT / "work/digits.bc16/weights.pth"), "--device", "cpu", "--precision", "fp32"]) == 0
    assert set(text.splitlines()) - {"…"} <= set(capsys.readouterr().out.splitlines())
