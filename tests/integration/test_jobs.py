"""jobs.demo from start to end at its smallest size."""

import json

from attrib.demo import job as demo_job
from attrib.demo.settings import DemoSettings


def test_the_demo_runs_and_reports_its_recall(local_ray, tmp_path):
    folder = tmp_path / "demo"
    settings = DemoSettings(output=str(folder), num_sources=100, num_exemplars=3, samples_per_exemplar=2, num_epochs=1)
    report = demo_job.run(settings)
    assert "6 (0 failed)" in report and (folder / "run" / "report.html").exists()
    trained = json.loads((folder / "model" / "train.json").read_text())
    assert trained["num_images"] == 100 and [row["epoch"] for row in trained["history"]] == [-1, 0]
    rates = {line[:34].strip(): line[34:].split() for line in report.splitlines() if line[34:].split()}
    assert rates["chance"] == ["0.010", "0.100"]
    untrained = ("the same network, untrained", "the same, whitened, no training")
    for name in ("this run (Parquet)", "colour histogram", *untrained):
        at_1, _, _, at_10, _, _ = rates[name]
        assert 0 <= float(at_1) <= float(at_10) <= 1
