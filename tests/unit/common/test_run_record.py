"""The refusal of an output folder that belongs to another run."""

import pytest

from attrib.common.errors import AttribError
from attrib.common.run_record import begin
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage
from attrib.train.settings import TrainSettings


def test_other_settings_are_named_by_the_keys_that_differ(tmp_path):
    local = Storage(StorageSettings())

    def start(digest: str = "d", **changes):
        values = {"manifest": "m", "output": str(tmp_path), "backbone": {"name": "x"}} | changes
        return begin(TrainSettings(**values), "train.json", {"manifest": digest}, local)

    assert start() is None and start() is None  # an unfinished run is continued
    with pytest.raises(AttribError) as caught:
        start("other", optimiser={"batch_size": 32}, seed=1)
    differences = "(optimiser.batch_size: there 256, now 32; seed: there 0, now 1; input manifest)"
    assert f"{tmp_path} belongs to a run with other settings or inputs {differences}; choose" in str(caught.value)
