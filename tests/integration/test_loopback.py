"""A local Ray has no token, so no other machine may reach it: what its processes listen on."""

import ipaddress
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray

ROOT = Path(__file__).resolve().parents[2]
JOIN = """
import sys, ray
from attrib.common.settings import RaySettings
from attrib.runtime.session import connect
connect(RaySettings(address=sys.argv[1]))
print(ray.get(ray.remote(lambda: "joined").remote()))
"""


def listening(process: psutil.Process) -> set[str]:
    """Addresses on which a process takes connections, or datagrams."""
    return {
        connection.laddr.ip
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM
    }


def is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def processes_of_ray() -> dict[str, list[psutil.Process]]:
    """The driver, and what it started for Ray, by name. Other tests may have started other processes."""
    driver = psutil.Process()
    found = {"driver": [driver]}
    for process in driver.children(recursive=True):
        command = " ".join(process.cmdline())
        if command.startswith("ray::"):
            found.setdefault("ray::", []).append(process)
        elif "/ray/" in command:
            found.setdefault(process.cmdline()[0].rpartition("/")[2], []).append(process)
    return found


def test_every_process_of_a_local_ray_listens_on_loopback_only(local_ray):
    ray.get(ray.remote(lambda: None).remote())  # at least one worker is there
    found = processes_of_ray()
    addresses = {name: set().union(*map(listening, processes)) for name, processes in found.items()}
    for name in ("driver", "gcs_server", "raylet", "ray::"):
        assert addresses[name], f"{name} has ports, and the test must see them"
    reachable = {name: sorted(a for a in found if not is_loopback(a)) for name, found in addresses.items()}
    assert not any(reachable.values()), reachable


def test_gloo_listens_on_loopback_only(local_ray, tmp_path):
    folder = str(tmp_path)

    @ray.remote
    def open_gloo() -> list[str]:
        import torch.distributed as distributed

        distributed.init_process_group("gloo", store=distributed.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        connections = psutil.Process().net_connections("inet")
        distributed.destroy_process_group()
        return [connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN]

    addresses = ray.get(open_gloo.remote())
    assert addresses and all(map(is_loopback, addresses)), addresses


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_another_process_joins_by_the_loopback_address(host, local_ray):
    address = f"{host}:{local_ray.rpartition(':')[2]}"
    command = [sys.executable, "-c", JOIN, address]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert ended.stdout.split() == ["joined"], ended.stderr
