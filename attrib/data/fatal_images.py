"""Images that kill the process that decodes them: by a fault of a decoder, by their memory or because they never end.

Such an image costs one worker and becomes a failure. Ray repeats the chunk of a worker that died. The id of the image
in work stands in a small file on the local disk. Where the file is found again, the image is first decoded in a process
of its own, so that an image is not blamed for a worker that was stopped by something else.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from hashlib import sha256
from typing import Any

import pyarrow as pa

from attrib.common.errors import AttribError, ImageError
from attrib.common.storage import Storage
from attrib.data.manifest import Manifest
from attrib.data.reading import read_all

MAX_DECODE_SECONDS = 300  # more than 100 megapixels take in any format on a busy core
ID_BYTES = 8
TRIAL = f"""
import os, pickle, signal, sys
from attrib.common.errors import ImageError
from attrib.data.decoding import decode_pixels
for data in pickle.load(sys.stdin.buffer):
    signal.setitimer(signal.ITIMER_REAL, {MAX_DECODE_SECONDS})
    try:
        decode_pixels(data, max_megapixels=float(sys.argv[1]))
    except ImageError:
        pass
    os.write(1, b".")
"""


def without_fatal(
    rows: list[dict[str, Any]], encoded: Iterable[bytes | ImageError], output: str, max_megapixels: float
) -> Iterator[bytes | ImageError]:
    """Yield the encoded images of `rows`, and an ImageError in place of one that killed an earlier process.

    The caller decodes each image before it asks for the next one. If that takes MAX_DECODE_SECONDS, the process ends.
    output: of the job. A process knows of earlier ones of the same output and rows on the same machine alone.
    """
    folder = os.path.join(tempfile.gettempdir(), f"attrib-decoding-{os.getuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    ids = [int(row["id"]).to_bytes(ID_BYTES, "little") for row in rows]
    path = os.path.join(folder, sha256(output.encode() + b"\0" + b"".join(ids)).hexdigest())
    # pytest-timeout and others use this timer with a handler. Without a handler, it ends the process.
    has_timer = signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        found = os.read(file, ID_BYTES * len(rows))
        suspects = [found[i : i + ID_BYTES] for i in range(0, len(found), ID_BYTES) if any(found[i : i + ID_BYTES])]
        end = os.pwrite(file, b"".join(suspects), 0)
        for image, data in zip(ids, encoded):
            if image in suspects and isinstance(data, bytes) and fatal_positions([data], max_megapixels):
                data = ImageError("decode", "the decoder process died")
            os.pwrite(file, image, end)
            if has_timer:
                signal.setitimer(signal.ITIMER_REAL, MAX_DECODE_SECONDS)
            yield data
            if has_timer:
                signal.setitimer(signal.ITIMER_REAL, 0)
            os.pwrite(file, bytes(ID_BYTES), end)
    finally:
        if has_timer:
            signal.setitimer(signal.ITIMER_REAL, 0)
        os.close(file)
        with suppress(FileNotFoundError):  # a repetition of the same chunk may run while this process is given up
            os.unlink(path)


def without_fatal_rows(
    images: pa.Table, manifest: Manifest, max_megapixels: float, io_threads: int, storage: Storage
) -> pa.Table:
    """Return the manifest rows whose images kill no process: for a driver, which has nobody to repeat its work.

    Raises AttribError if there is none.
    """
    encoded = list(read_all(images.to_pylist(), manifest, io_threads, storage))
    fatal = fatal_positions([b"" if isinstance(data, ImageError) else data for data in encoded], max_megapixels)
    kept = images.take(pa.array([i for i in range(len(images)) if i not in fatal], pa.int64()))
    if len(images) and not len(kept):
        raise AttribError(
            f"all of {len(images)} images of {manifest.collection.uri} that were tried kill the process that decodes "
            "them; give the job more memory, or lower max_megapixels"
        )
    return kept


def fatal_positions(images: list[bytes], max_megapixels: float) -> set[int]:
    """Return which encoded images kill a process that decodes them. An error of Python is no sign of that."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", TRIAL, str(max_megapixels)]
    fatal: set[int] = set()
    start = 0
    while start < len(images):
        trial = subprocess.run(command, input=pickle.dumps(images[start:]), env=environment, stdout=subprocess.PIPE)
        if trial.returncode >= 0:
            break
        start += len(trial.stdout) + 1
        fatal.add(start - 1)
    return fatal
