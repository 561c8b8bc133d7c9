"""What all commands share: help, mistakes in one line, closed pipes, consoles of any encoding, files written whole."""

import errno
import importlib
import io
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, status_of
from PIL import Image

import evaluate
import train
from common import console, files

SCRIPTS = [f"{name}.py" for name in ("train", "evaluate", "plot", "make_graph", "publish", "check_data")]
SCRIPTS += [f"{folder}/{path.name}" for folder in ("bench", "attic") for path in sorted((ROOT / folder).glob("*.py"))]
SCRIPTS = [name for name in SCRIPTS if name not in ("attic/checks.py", "bench/candidates.py")]  # parts of the others


@pytest.fixture
def main_of(monkeypatch):
    """The main function of a script, by its path."""
    monkeypatch.syspath_prepend(ROOT / "attic")
    return lambda script: importlib.import_module(Path(script).stem).main


@pytest.fixture
def terminal(monkeypatch):
    """Stands in for a terminal of one encoding: terminal("ascii") → the bytes that were written to it."""

    def make(encoding):
        shown = io.BytesIO()
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(shown, encoding, write_through=True))
        return shown

    return make


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_in_any_encoding_a_closed_pipe_and_a_mistake(main_of, monkeypatch, terminal, capfd, script):
    monkeypatch.setattr(sys, "argv", [script])
    main, (reader, writer) = main_of(script), os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        assert status_of(main, ["--help"]) == 141
    assert capfd.readouterr() == ("", "")
    assert status_of(main, ["--no-such-flag"]) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"{Path(script).name}: error: ") and err.count("\n") == 1
    shown = terminal("ascii")
    assert status_of(main, ["--help"]) == 0
    text = shown.getvalue().decode()
    assert text.startswith(f"usage: {Path(script).name}") and "--help" in text and "Traceback" not in text
    assert list(Path().iterdir()) == []


def run(command, stdout, **env):
    return subprocess.run([sys.executable, *command], stdout=stdout, stderr=subprocess.PIPE, text=True, env=os.environ | env)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_in_a_process_of_its_own(unbuffered):
    """The interpreter flushes standard output once more when it ends."""
    reader, writer = os.pipe()
    os.close(reader)
    result = run([ROOT / "check_data.py", "--dataset", "digits", "--stats"], writer, PYTHONUNBUFFERED=unbuffered)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_standard_output_is_named():
    with open("/dev/full", "w") as full:
        result = run([ROOT / "plot.py", "--help"], full, PYTHONUNBUFFERED="")
    assert (result.returncode, result.stderr) == (1, "plot.py: error: standard output: No space left on device\n")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_class_names_that_a_console_cannot_show_or_would_obey(terminal):
    for split in ("train", "test"):
        for shade, name in enumerate(("猫", "\x1b[2J")):
            Path("images", split, name).mkdir(parents=True)
            Image.new("RGB", (8, 8), (200 * shade,) * 3).save(f"images/{split}/{name}/0.png")
    shown = terminal("cp1252")
    flags = "--device cpu --dataset folder --data images --image-size 8 --depth 10 --growth-rate 4 --epochs 1 --save run"
    assert train.main([*flags.split(), "--no-plot", "--no-progress"]) == 0
    assert evaluate.main(["run/latest.pth"]) == 0
    assert evaluate.main(["run/latest.pth", "images/test", "--top", "2"]) == 0
    text = shown.getvalue().decode("cp1252")
    assert "confusion matrix" in text and "images/test/?/0.png: " in text and "Traceback" not in text
    assert "images/test/\\x1b[2J/0.png: " in text and "\x1b" not in text


def failing(error):
    def fail(argv=None):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (console.Mistake("depth 43:\ntry \x1b[2J40"), 2, "test_console.py: error: depth 43: try \\x1b[2J40\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x/y"), 2, "test_console.py: error: x/y: No such file\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "test_console.py: error: x: No space left on device\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_a_user_can_cause_is_one_line(capsys, error, status, words):
    assert console.command(failing(error))() == status
    assert capsys.readouterr() == ("", words)


def test_what_is_our_fault_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        console.command(failing(ZeroDivisionError()))()


# Files.


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """Also if there is a link in the place of the unfinished one."""
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_text("old"), other.write_text("precious")
    (tmp_path / "file.tmp").symlink_to("other")
    with pytest.raises(KeyboardInterrupt), files.written_whole(path) as file:
        file.write(b"ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and {*tmp_path.iterdir()} == {path, other}
    with files.written_whole(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and other.read_text() == "precious" and {*tmp_path.iterdir()} == {path, other}


@pytest.mark.skipif(os.name == "nt", reason="Windows opens no folders")
def test_a_new_name_outlives_a_power_cut(tmp_path, monkeypatch):
    """First the content is on the disk, then the name in its folder."""
    done, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(stat.S_IFMT(os.fstat(file).st_mode)), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), rename(*paths)))
    with files.written_whole(tmp_path / "a") as file:
        file.write(b"new")
    assert done == [stat.S_IFREG, "replace", stat.S_IFDIR]
