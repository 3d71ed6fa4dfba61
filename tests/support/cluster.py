"""Helpers of the cluster tests: an S3 server that can delay writes, drawn images, and submitted jobs."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import numpy as np
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from PIL import Image, ImageDraw
from werkzeug.serving import WSGIRequestHandler, make_server

REPOSITORY = Path(__file__).resolve().parents[2]
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
BUSY = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>",
)


@dataclass
class Hold:
    """Delays writes to matching paths after the first `allowed` ones; `release` answers the waiting ones 503 SlowDown.

    This stops a stage half-way, independent of the speed of the machine. A live client repeats the request; a killed
    client has written nothing.
    """

    pattern: re.Pattern
    allowed: int
    waiting: int = 0
    released: threading.Event = field(default_factory=threading.Event)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def passes(self, path: str) -> bool:
        if self.released.is_set() or not self.pattern.search(path):
            return True
        with self.changed:
            if self.allowed > 0:
                self.allowed -= 1
                return True
            self.waiting += 1
            self.changed.notify_all()
        self.released.wait(120)
        return False

    def wait(self, count: int, timeout_seconds: float = 90) -> None:
        """Wait until `count` writes are held. With one CPU per node, two held writes mean that both nodes work."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.waiting >= count, timeout_seconds):
                raise TimeoutError(
                    f"{self.waiting} of {count} writes to {self.pattern.pattern} came in {timeout_seconds:g} s"
                )

    def release(self) -> None:
        self.released.set()


class QuietHandler(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_) -> None:
        pass


def _starts_and_publishes(method: str, query: str) -> tuple[bool, bool]:
    """(starts a write, makes the object visible). A plain PUT does both, a multipart upload one per request."""
    plain = method == "PUT" and "partNumber=" not in query
    return plain or (method == "POST" and query.startswith("uploads")), plain or (
        method == "POST" and "uploadId=" in query
    )


class S3Server:
    """moto over HTTP on a free port, with a log of reads and writes, and holds."""

    def __init__(self):
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._holds: list[Hold] = []
        self._lock = threading.Lock()
        self._log: list[tuple[str, str]] = []  # (read or write, path) of successful requests
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=QuietHandler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        )

    def _answer(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        starts, publishes = _starts_and_publishes(method, environ["QUERY_STRING"])
        if starts and not all(hold.passes(path) for hold in list(self._holds)):
            start_response(
                "503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(BUSY[0])))]
            )
            # Read the body; otherwise the server parses it as the next request.
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return BUSY

        def noted(status, headers, *rest):
            if status.startswith("2") and (publishes or method == "GET"):
                with self._lock:
                    self._log.append(("write" if publishes else "read", path))
            return start_response(status, headers, *rest)

        return self._moto(environ, noted)

    def hold(self, pattern: str, allowed: int) -> Hold:
        hold = Hold(re.compile(pattern), allowed)
        self._holds.append(hold)
        return hold

    def forget(self) -> None:
        """Reset the counts of `reads` and `writes`."""
        with self._lock:
            self._log.clear()

    def reads(self, pattern: str) -> Counter:
        return self._count("read", pattern)

    def writes(self, pattern: str) -> Counter:
        return self._count("write", pattern)

    def _count(self, kind: str, pattern: str) -> Counter:
        with self._lock:
            return Counter(path for found, path in self._log if found == kind and re.search(pattern, path))

    def stop(self) -> None:
        for hold in self._holds:
            hold.release()
        self._server.shutdown()
        self._server.server_close()


def drawn_image(seed: int) -> bytes:
    """A small PNG of coloured shapes, different for each seed."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (96, 80), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.integers(0, 80, 2).tolist()
        size = int(rng.integers(8, 50))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x, y, x + size, y + size), fill=tuple(rng.integers(0, 256, 3).tolist()))
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()


@dataclass
class Job:
    """A job submitted with `ray job submit`, which prints its log and waits for it."""

    name: str
    process: subprocess.Popen
    log: Path
    cluster: object

    def wait(self, timeout_seconds: float = 180) -> int:
        """Exit status of `ray job submit`: 0 if and only if the job succeeded."""
        try:
            return self.process.wait(timeout_seconds)
        finally:
            self.process.kill()

    def details(self) -> dict:
        return json.loads(self.cluster.get(f"/api/jobs/{self.name}"))

    def kill_driver(self) -> None:
        os.kill(int(self.details()["driver_info"]["pid"]), signal.SIGKILL)

    def output(self) -> str:
        return self.log.read_text(errors="replace")


def submit(cluster, folder: Path, name: str, module: str, config: Path) -> Job:
    log = folder / f"{name}.log"
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit"]
    command += ["--address", cluster.address, "--submission-id", name, "--working-dir", str(REPOSITORY)]
    command += ["--runtime-env-json", json.dumps({"env_vars": CREDENTIALS})]
    command += ["--", "python", "-m", module, "--config", str(config)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, env=environment | cluster.client_environment, stdout=file, stderr=subprocess.STDOUT, cwd=REPOSITORY
        )
    return Job(name, process, log, cluster)
