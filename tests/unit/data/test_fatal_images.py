"""Images that kill their process: found again by the next process, tried apart, never blamed without need."""

import os
import signal
import subprocess
import sys
import tempfile

import pytest
from support.fatal import FATAL_END, write_sitecustomize
from support.hostile import encode, picture

from attrib.common.errors import ImageError
from attrib.data.fatal_images import fatal_positions, without_fatal

IMAGE = encode(picture(), "PNG")
FATAL = IMAGE + FATAL_END
ROWS = [{"id": 2**62 + number} for number in range(4)]
DECODE = """
import sys, tempfile, time
from attrib.data import fatal_images
from attrib.data.decoding import decode_image
tempfile.tempdir, action = sys.argv[1:]
if action == "hang":
    fatal_images.MAX_DECODE_SECONDS = 2
rows = [{"id": 2**62 + number} for number in range(4)]
for number, _ in enumerate(fatal_images.without_fatal(rows, [b"x"] * 4, "out", 1.0)):
    if number == 2:
        time.sleep(60) if action == "hang" else decode_image(sys.stdin.buffer.read(), max_megapixels=1.0)
"""


@pytest.fixture
def fatal_folder(tmp_path, monkeypatch):
    """A scratch folder of its own; processes that are started import sitecustomize.py."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.syspath_prepend(write_sitecustomize(tmp_path / "site"))
    return tmp_path


def run_process(folder, action: str) -> int:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder / "site"), *filter(None, sys.path)])}
    command = [sys.executable, "-c", DECODE, str(folder), action]
    return subprocess.run(command, input=FATAL, env=environment, timeout=60).returncode


def outcomes(images: list[bytes], output: str = "out") -> list[str]:
    found = without_fatal(ROWS, images, output, 1.0)
    return [data.reason if isinstance(data, ImageError) else "kept" for data in found]


def test_image_that_killed_a_process_fails_in_the_next_one(fatal_folder):
    assert run_process(fatal_folder, "decode") == -signal.SIGKILL
    images = [IMAGE, IMAGE, FATAL, IMAGE]
    assert outcomes(images, "another output") == ["kept"] * 4
    assert outcomes(images) == ["kept", "kept", "the decoder process died", "kept"]
    assert outcomes(images) == ["kept"] * 4, "the memory of it ends with the work"


def test_image_of_a_process_that_was_stopped_from_outside_is_kept(fatal_folder):
    assert run_process(fatal_folder, "decode") == -signal.SIGKILL
    assert outcomes([IMAGE] * 4) == ["kept"] * 4


def test_decoding_without_end_ends_the_process(fatal_folder):
    assert run_process(fatal_folder, "hang") == -signal.SIGALRM
    assert len(os.listdir(fatal_folder / f"attrib-decoding-{os.getuid()}")) == 1


def test_all_fatal_images_of_many_are_found(fatal_folder):
    images = [IMAGE, FATAL, b"no image", FATAL, FATAL, IMAGE]
    assert fatal_positions(images, 1.0) == {1, 3, 4}
