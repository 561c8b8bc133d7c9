"""Two machines, really: two network namespaces that a veth pair joins, each with a host name, a launcher and its ranks.

They share a file system, and nothing else. Needs root and the command `ip`: pytest -m long tests/training/test_hosts.py
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, TINY

from training.run import Run

HOSTS = {"densenet-a": "10.99.7.1", "densenet-b": "10.99.7.2"}
PAGE = (ROOT / "docs/distributed.md").read_text()
# train.py, but in a step no rank waits ten minutes for the others.
IMPATIENT = """
import datetime, sys
sys.path.insert(0, {root!r})
import train
from training import distributed
distributed.SHORT = datetime.timedelta(seconds=30)
distributed.exit_from(train.main)
"""

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() or not shutil.which("ip"), reason="needs root and ip"),
]


def ip(command):
    subprocess.run(["ip", *command.split()], check=True)


def pids(host):
    found = subprocess.run(["ip", "netns", "pids", host], capture_output=True, check=False, text=True)
    return map(int, found.stdout.split())


@pytest.fixture
def network(tmp_path):
    """Two hosts that can reach each other by name."""
    a, b = HOSTS
    try:
        for name in HOSTS:
            ip(f"netns add {name}")
        ip(f"link add eth0 netns {a} type veth peer name eth0 netns {b}")
        for name, address in HOSTS.items():
            ip(f"-n {name} address add {address}/24 dev eth0")
            for device in ("lo", "eth0"):
                ip(f"-n {name} link set {device} up")
        (tmp_path / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in HOSTS.items()))
        yield
    finally:
        for name in HOSTS:
            for process in pids(name):
                os.kill(process, signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], check=False)


def command_of_the_page():
    """What docs/distributed.md says of several machines, with one small process on each."""
    section = PAGE[PAGE.index("## Several machines") :]
    words = shlex.split(re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1].replace("\\\n", ""))
    options = words[words.index("torchrun") + 1 : words.index("train.py")]
    changed = {"--nproc_per_node=8": "--nproc_per_node=1"}
    return [changed.get(option, option).replace("HOST", next(iter(HOSTS))) for option in options]


class Host:
    """The launcher on one host."""

    def __init__(self, name, options, script, *flags):
        inside = f"mount --bind hosts /etc/hosts && hostname {name} && exec \"$@\" >{name}.txt 2>&1"
        command = [sys.executable, "-m", "torch.distributed.run", *options, str(script), *flags]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        self.name, self.output = name, Path(f"{name}.txt")
        self.process = subprocess.Popen(["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", inside, "sh", *command], env=env)

    def ended(self, seconds):
        """The exit status, once the launcher has ended and no process is left on the host."""
        status = self.process.wait(seconds)
        self.lose_ranks(seconds)
        return status

    def lose_ranks(self, seconds):
        """Wait until no process is left on the host but, maybe, its launcher."""
        end = time.monotonic() + seconds
        while set(pids(self.name)) - {self.process.pid}:
            assert time.monotonic() < end, f"{self.name} still has processes"
            time.sleep(0.2)

def on_both(script, *flags):
    return [Host(name, command_of_the_page(), script, *flags) for name in HOSTS]


def wait_for(epoch, *hosts):
    deadline = time.monotonic() + 300
    while not (Run("run").can_go_on() and Run("run").latest()[0]["epoch"] >= epoch):
        assert time.monotonic() < deadline and all(host.process.poll() is None for host in hosts)
        time.sleep(0.2)


def finished():
    return Run("run").latest()[0]["epoch"]


def test_two_machines_lose_a_launcher_and_the_network_and_go_on(network, tmp_path):
    script, resume = ROOT / "train.py", ["--save", "run", "--resume", "--no-plot", "--epochs"]
    a, b = on_both(script, *TINY, "--epochs", "100000", "--block", "naive", "--no-plot", "--save", "run")
    wait_for(2, a, b)
    b.process.send_signal(signal.SIGKILL)
    assert b.ended(60) == -signal.SIGKILL and a.ended(120) == 1
    assert "another process of this run has ended; epoch" in a.output.read_text()

    epoch = finished()
    one = Host(a.name, ["--nproc_per_node=1"], script, *resume, str(epoch + 2))
    assert one.ended(120) == 0 and finished() == epoch + 2

    impatient = tmp_path / "impatient.py"
    impatient.write_text(IMPATIENT.format(root=str(ROOT)))
    a, b = on_both(impatient, *resume, "100000")
    wait_for(epoch + 4, a, b)
    ip(f"-n {b.name} link set eth0 down")
    assert a.ended(120) == 1
    b.lose_ranks(120)
    ip(f"-n {b.name} link set eth0 up")
    assert b.ended(240) != 0  # the other's launcher has gone

    epoch = finished()
    a, b = on_both(script, *resume, str(epoch + 2))
    assert a.ended(120) == 0 and b.ended(120) == 0
    for name in ("train", "test"):
        assert pd.read_csv(f"run/{name}.csv")["epoch"].tolist() == list(range(1, epoch + 3))
