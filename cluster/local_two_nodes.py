"""A two-node Ray cluster on one machine, with token authentication, to submit jobs to: python cluster/local_two_nodes.py

A head and a worker, each `ray start` in a folder of its own, so that nothing passes between them but what passes between machines: its
working folder, --temp-dir (sockets, logs, unpacked working directories, spilled objects) and object store. All ports are free ones, so
several such clusters stand side by side. The end of this program ends every process that it started, and no other Ray on the machine.

Authentication. Under Ray 2.60 a cluster asks for a token when its processes run with RAY_AUTH_MODE=token, or when `ray start` finds a token; every
process of the cluster and every client must then hold the same one: in RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, or in
~/.ray/auth_token (`ray get-auth-token --generate` makes that one). A client must say RAY_AUTH_MODE=token itself. Here a fresh token lies in
the cluster's folder, readable by its owner alone; other machines get theirs from a Secret (rayjob.yaml) or a copied file (aws.yaml).
"""

import argparse
import contextlib
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

STARTUP_SECONDS = 120
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


class Node:
    """One `ray start --block`, and with it every process of its node."""

    def __init__(self, name: str, folder: Path, arguments: list[str], environment: dict[str, str]):
        self.name, self.folder = name, folder
        self.temp_folder, working_folder = folder / "tmp", folder / "cwd"
        working_folder.mkdir(parents=True)
        self.log = folder / "ray-start.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*RAY, "start", "--block", "--temp-dir", str(self.temp_folder), *arguments],
                cwd=working_folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C for this program must not reach Ray half-way through its own shutdown
            )

    def kill(self) -> None:
        """SIGKILL the raylet, its agents and its workers, as the loss of the machine would."""
        _signal_all(_processes_of(self.process.pid), signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        everything = _processes_of(self.process.pid)
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        _signal_all(everything, signal.SIGKILL)
        # Until they are gone they may still write to the folder that is about to be removed.
        deadline = time.monotonic() + 5
        while everything & set(_processes()) and time.monotonic() < deadline:
            time.sleep(0.05)


class LocalCluster:
    """A head, and workers that come and go. Ends with `stop`, or as a context manager."""

    def __init__(self, cpus_per_node: int = 1, object_store_mib: int = 256, environment: dict[str, str] | None = None):
        # Not below the user's own TMPDIR: a socket's path may have 107 bytes, and Ray adds about 70 to the folder.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        self.token = secrets.token_hex(32)
        token_path = self.folder / "auth_token"
        token_path.touch(mode=0o600)
        token_path.write_text(self.token)
        self.client_environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_path)}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self._environment = inherited | self.client_environment | (environment or {})
        # `python` in a job's entrypoint is to be this one, whether or not its environment is activated.
        self._environment["PATH"] = os.pathsep.join(
            [os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]
        )
        self._per_node = [
            f"--num-cpus={cpus_per_node}",
            "--num-gpus=0",
            f"--object-store-memory={object_store_mib * 2**20}",
            # 0: any free port. Two raylets that both count up from the default would hand the same port to two workers.
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--dashboard-agent-listen-port=0",
            "--disable-usage-stats",
        ]
        self.nodes: list[Node] = []
        self._num_started = 0

    def __enter__(self) -> "LocalCluster":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self) -> None:
        """Start the head and one worker; returns once both are alive. Raises RuntimeError with the log's end if one is not."""
        port, dashboard_port, client_port = _free_ports(3)
        self.gcs_address = f"127.0.0.1:{port}"
        self.address = f"http://127.0.0.1:{dashboard_port}"
        self._add(
            "head",
            "--head",
            f"--port={port}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard_port}",
            f"--ray-client-server-port={client_port}",
        )
        self._wait_until(lambda: self._answers("/api/jobs/"), "the head's job server")
        self.add_worker()

    def add_worker(self) -> Node:
        """Another worker; it joins within seconds of the return."""
        self._num_started += 1
        return self._add(f"worker-{self._num_started}", f"--address={self.gcs_address}")

    def _add(self, name: str, *arguments: str) -> Node:
        node = Node(name, self.folder / name, [*self._per_node, *arguments], self._environment)
        self.nodes.append(node)
        self._wait_until(lambda: b"Ray runtime started" in node.log.read_bytes(), name)
        return node

    def kill(self, node: Node) -> None:
        node.kill()
        self.nodes.remove(node)

    def stop(self) -> None:
        for node in reversed(self.nodes):  # the head last, or workers would spend their last seconds looking for it
            node.stop()
        self.nodes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def get(self, path: str) -> bytes:
        """A GET of the job server's HTTP interface, with the token."""
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.read()

    def _answers(self, path: str) -> bool:
        try:
            self.get(path)
        except (urllib.error.URLError, OSError):
            return False
        return True

    def _wait_until(self, happened, what: str) -> None:
        deadline = time.monotonic() + STARTUP_SECONDS
        while not happened():
            node = self.nodes[-1]
            if node.process.poll() is not None or time.monotonic() > deadline:
                tail = node.log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{what} did not start; the end of {node.log}:\n{tail}")
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()


def _processes() -> dict[int, tuple[int, int]]:
    """(parent, session) of every process that has not ended."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                found[int(entry.name)] = int(fields[1]), int(fields[3])
    return found


def _processes_of(leader: int) -> set[int]:
    """The session of `leader` and everything below it: drivers of submitted jobs have sessions of their own, orphans no parent."""
    processes = _processes()
    members = {leader} | {pid for pid, (_, session) in processes.items() if session == leader}
    while True:
        below = {pid for pid, (parent, _) in processes.items() if parent in members} - members
        if not below:
            return members
        members |= below


def _signal_all(pids: set[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpus-per-node", type=int, default=1)
    parser.add_argument("--object-store-mib", type=int, default=256, help="of each node")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with LocalCluster(given.cpus_per_node, given.object_store_mib) as cluster:
        exports = " ".join(f"{key}={shlex.quote(value)}" for key, value in cluster.client_environment.items())
        print(f"Two nodes are up, in {cluster.folder}. From the repository, in another terminal:\n")
        print(f"  export {exports}")
        print(
            f"  ray job submit --address {cluster.address} --working-dir . -- python -m jobs.pipeline --config FILE\n"
        )
        print("Ctrl-C stops both.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
