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
IMPATIENT = f"""
import datetime, sys
sys.path.insert(0, {str(ROOT)!r})
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
    return {int(pid) for pid in subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True).stdout.split()}


@pytest.fixture
def hosts(tmp_path):
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
        yield a, b
    finally:
        for name in HOSTS:
            for pid in pids(name):
                os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name])


def launch(host, script, *flags):
    """torchrun on a host with the options of docs/distributed.md, but one small process."""
    section = PAGE[PAGE.index("## Several machines") :].replace("--nproc_per_node=8", "--nproc_per_node=1").replace("HOST", next(iter(HOSTS)))
    words = shlex.split(re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1].replace("\\\n", ""))
    options = words[words.index("torchrun") + 1 : words.index("train.py")]
    inside = f"mount --bind hosts /etc/hosts && hostname {host} && exec \"$@\" >{host}.txt 2>&1"
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(script), *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", inside, "sh", *command], env=env)


def wait_until(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def epoch():
    return Run("run").latest()[0]["epoch"] if Run("run").can_go_on() else -1


def test_two_machines_lose_a_launcher_and_the_network_and_go_on(hosts):
    a, b = hosts
    Path("impatient.py").write_text(IMPATIENT)
    one, other = (launch(host, ROOT / "train.py", *TINY, "--epochs", "100000", "--no-plot", "--save", "run") for host in hosts)
    wait_until(lambda: epoch() >= 2)
    other.kill()
    assert one.wait(120) == 1 and "another process of this run has ended; epoch" in Path(f"{a}.txt").read_text()
    wait_until(lambda: not pids(a) | pids(b))

    end, resume = epoch() + 2, ["--save", "run", "--resume", "--no-plot", "--epochs"]
    one, other = (launch(host, "impatient.py", *resume, "100000") for host in hosts)
    wait_until(lambda: epoch() >= end)
    ip(f"-n {b} link set eth0 down")
    assert one.wait(120) == 1
    wait_until(lambda: pids(b) <= {other.pid})
    ip(f"-n {b} link set eth0 up")
    assert other.wait(240) != 0  # the other's launcher has gone

    end = epoch() + 2
    assert [launcher.wait(240) for launcher in [launch(host, ROOT / "train.py", *resume, str(end)) for host in hosts]] == [0, 0]
    for name in ("train", "test"):
        assert pd.read_csv(f"run/{name}.csv")["epoch"].tolist() == list(range(1, end + 1))
