"""Two hosts: network namespaces of their own, with a cable between them."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import assert_same
from tests.distributed.launching import ENVIRONMENT, reports, torchrun

HOSTS = ("10.77.31.1", "10.77.31.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Gives the names of two namespaces; needs root, and a system that allows them."""
    names = [f"hq{number}_{os.getpid()}" for number in (0, 1)]
    ends = [f"hqv{number}{os.getpid() % 10**6}" for number in (0, 1)]
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, HOSTS, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"network namespaces are not allowed here: {getattr(error, 'stderr', error)}")
    yield [f"{name}:{end}" for name, end in zip(names, ends, strict=True)]
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start(hosts: list[str], out: Path, *arguments: object) -> list[subprocess.Popen]:
    jobs = []
    for rank, (host, address) in enumerate(zip(hosts, HOSTS, strict=True)):
        name, interface = host.split(":")
        options = {"nnodes": 2, "node_rank": rank, "master_addr": HOSTS[0], "master_port": 29500}
        command = ["ip", "netns", "exec", name, *torchrun(1, out, *arguments, local_addr=address, **options)]
        environment = {**ENVIRONMENT, "GLOO_SOCKET_IFNAME": interface}
        jobs.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        )
    return jobs


def test_two_hosts_reach_what_one_process_reaches(hosts: list[str], alone: dict[str, Any], tmp_path: Path) -> None:
    jobs = start(hosts, tmp_path)
    said = [job.communicate(timeout=280)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], "".join(said)[-3000:]
    assert_same(reports(tmp_path, 2), alone)


def test_a_host_that_dies_ends_the_job_within_a_minute(hosts: list[str], tmp_path: Path) -> None:
    jobs = start(hosts, tmp_path, 20)  # the process of the second host dies
    said = jobs[1].communicate(timeout=280)[1]
    died = time.monotonic()
    assert "exitcode  : -9" in said
    said = jobs[0].communicate(timeout=280)[1]
    assert time.monotonic() - died < 60
    assert jobs[0].returncode != 0
    assert "TrainingError: Another of the 2 processes has ended" in said
    assert not (tmp_path / "model").exists()
