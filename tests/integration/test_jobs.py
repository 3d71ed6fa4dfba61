"""The demo, which no other test runs whole, at its smallest."""

from attrib.demo import job as demo_job
from attrib.demo.settings import DemoSettings


def test_the_demo_runs_and_tells_its_recall(local_ray, tmp_path):
    settings = DemoSettings(
        output=str(tmp_path / "demo"), num_sources=100, num_exemplars=3, samples_per_exemplar=2, num_epochs=1
    )
    said = demo_job.run(settings)
    assert "6 (0 failed)" in said and (tmp_path / "demo" / "run" / "report.html").exists()
    rates = {line[:34].strip(): line[34:].split() for line in said.splitlines() if line[34:].split()}
    assert rates["chance"] == ["0.010", "0.100"]
    for name in ("this run (Parquet)", "colour histogram", "the same network, untrained"):
        at_1, at_10 = map(float, rates[name])
        assert 0 <= at_1 <= at_10 <= 1
