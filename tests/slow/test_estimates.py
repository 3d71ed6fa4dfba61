"""The embed estimate, compared with memory and bytes of real work, at sizes not used to fit its constants."""

import pytest
from support.hostile import encode
from support.images import picture, write_folder
from support.memory import measure

from attrib.embed.estimate import EncoderProbe, estimate_embed

TOLERANCE = 0.25
NUM_IMAGES = 112


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    from attrib.common.settings import StorageSettings
    from attrib.common.storage import Storage

    folder = tmp_path_factory.mktemp("estimates")
    pictures = {f"{i}.jpg": encode(picture(i, 640, 480), "JPEG") for i in range(NUM_IMAGES)}
    write_folder(pictures, f"{folder}/images", Storage(StorageSettings()))
    return folder


@pytest.mark.parametrize(("backbone", "num_images", "chunk_rows"), [("resnet10t", 112, 56), ("resnet18", 96, 96)])
def test_embedding_needs_the_estimated_memory_and_bytes(images, backbone, num_images, chunk_rows):
    sizes = {"folder": str(images), "backbone": backbone, "num_images": num_images, "chunk_rows": chunk_rows}
    found = measure("probe", **sizes)
    probe = EncoderProbe(**{name: found[name] for name in EncoderProbe.__dataclass_fields__})
    estimate = estimate_embed(num_images, found["dimension"], num_images, chunk_rows, 100.0, probe, num_workers=1)
    took = measure("embed", **sizes, output=f"out-{backbone}")
    # The estimate measures the memory of the libraries, so the growth beyond it is tested.
    growth, estimated = took["peak_bytes"] - took["baseline_bytes"], estimate.worker_bytes - probe.baseline_bytes
    assert growth == pytest.approx(estimated, rel=TOLERANCE)
    assert took["peak_bytes"] == pytest.approx(estimate.worker_bytes, rel=TOLERANCE)
    assert took["chunks_on_disk"] == pytest.approx(estimate.temporary_bytes, rel=TOLERANCE)
    assert took["partition_on_disk"] == pytest.approx(estimate.output_bytes, rel=TOLERANCE)
