"""A two-node Ray cluster on one machine with token authentication: python cluster/local_two_nodes.py

Starts a head and a worker. Each `ray start` has its own working folder, --temp-dir (sockets, logs, working directories,
spilled objects) and object store, so nodes exchange only what machines would exchange. All ports are free ones, so
several such clusters can run at the same time. When this program ends, it ends only the processes that it started.

Authentication. In Ray 2.60 a cluster requires a token if its processes run with RAY_AUTH_MODE=token, or if `ray start`
finds a token. Every process and every client needs the same token: in RAY_AUTH_TOKEN, in the file that
RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token (made by `ray get-auth-token --generate`). A client also needs
RAY_AUTH_MODE=token. Here a new token is written to the cluster's folder, readable by its owner only. Other machines
get it from a Secret (rayjob.yaml) or a copied file (aws.yaml).
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
    """One `ray start --block` and all processes of its node."""

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
                start_new_session=True,  # Ctrl-C must not interrupt Ray while this program stops it
            )

    def kill(self) -> None:
        """SIGKILL the raylet, its agents and its workers, like the loss of a machine."""
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
        # Until they have ended, they may write to the folder that is removed next.
        deadline = time.monotonic() + 5
        while everything & set(_processes()) and time.monotonic() < deadline:
            time.sleep(0.05)


class LocalCluster:
    """A head and any number of workers. Stop it with `stop`, or use it as a context manager."""

    def __init__(self, cpus_per_node: int = 1, object_store_mib: int = 256, environment: dict[str, str] | None = None):
        # Not below TMPDIR: the path of a socket is limited to 107 bytes, and Ray appends about 70.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        self.token = secrets.token_hex(32)
        token_path = self.folder / "auth_token"
        token_path.touch(mode=0o600)
        token_path.write_text(self.token)
        self.client_environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_path)}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self._environment = inherited | self.client_environment | (environment or {})
        # `python` in the entrypoint of a job must be this interpreter, even if its environment is not activated.
        self._environment["PATH"] = os.pathsep.join(
            [os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]
        )
        self._per_node = [
            f"--num-cpus={cpus_per_node}",
            "--num-gpus=0",
            f"--object-store-memory={object_store_mib * 2**20}",
            # 0: any free port. With the default range, two raylets would give the same port to two workers.
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
        """Start the head and one worker and wait for both. Raises RuntimeError with the end of the log on failure."""
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

    def add_worker(self, num_tries: int = 3) -> Node:
        """Start another worker; it joins within seconds. Ray gives it 30 s, which is too little on a busy machine."""
        self._num_started += 1
        try:
            return self._add(f"worker-{self._num_started}", f"--address={self.gcs_address}")
        except RuntimeError:
            if num_tries == 1:
                raise
            self.kill(self.nodes[-1])
            return self.add_worker(num_tries - 1)

    def _add(self, name: str, *arguments: str) -> Node:
        node = Node(name, self.folder / name, [*self._per_node, *arguments], self._environment)
        self.nodes.append(node)
        self._wait_until(lambda: b"Ray runtime started" in node.log.read_bytes(), name)
        return node

    def kill(self, node: Node) -> None:
        node.kill()
        self.nodes.remove(node)

    def stop(self) -> None:
        for node in reversed(self.nodes):  # the head last: workers without a head try to reconnect
            node.stop()
        self.nodes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def get(self, path: str) -> bytes:
        """GET a path of the job server with the token."""
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
    """(parent, session) of every running process."""
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
    """Processes in the session of `leader` and all their descendants.

    Both are needed: drivers of submitted jobs have their own session, and orphans have no parent.
    """
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
