"""What the README says about flags, networks and commands is what the code does."""

import csv
import re
import shlex
from pathlib import Path

import pytest
import torch

import densenet
import train

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
    return re.findall(r"python train\.py[^\n`|#&\\]*", README)


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_training_command_is_valid(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [flag for flag in shlex.split(command)[2:] if flag not in ("--resume", "--help")]
    train.parse_args(flags)


def test_table_of_networks_has_the_code_s_parameter_counts():
    rows = re.findall(r"\| ([\d,]+) \|[^\n]*--arch (\w+)", section("The networks of the paper"))
    assert {name for _, name in rows} == set(densenet.ARCHITECTURES)
    for count, name in rows:
        classes = 1000 if "bc" not in name and "_" not in name else 10
        with torch.device("meta"):
            model = densenet.DenseNet(**densenet.ARCHITECTURES[name], num_classes=classes)
        assert f"{sum(p.numel() for p in model.parameters()):,}" == count, name


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_block_table_is_the_benchmark_s():
    """What the README says of memory and time stands in work/bench/cpu.csv, at depth 100."""
    with open(ROOT / "work/bench/cpu.csv", newline="") as file:
        rows = {row["block"]: row for row in csv.DictReader(file) if row["depth"] == "100"}
    for name in densenet.BLOCKS:
        line = re.search(rf"^\| `{name}` \|.*$", README, re.MULTILINE)[0]
        kept, peak, ms = (int(value.replace(",", "")) for value in re.findall(r"\| ([\d,]+) (?=\|)", line))
        row = rows[name]
        assert (kept, peak, ms) == (round(float(row["saved_mib"])), int(row["peak_mib"]), int(row["ms"]))


def test_headline_is_the_committed_run_s():
    error = float((ROOT / "work/digits.bc16/test.csv").read_text().split()[-1].split(",")[-1])
    assert f"a test error of {error:.2f} %" in " ".join(README.split())
