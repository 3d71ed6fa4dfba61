"""The jobs that no other test runs whole, at their smallest."""

from attrib.distributed import benchmark, demo
from attrib.settings import BenchmarkSettings, DemoSettings


def test_the_demo_runs_and_tells_its_recall(local_ray, tmp_path):
    settings = DemoSettings(
        output=str(tmp_path / "demo"), num_sources=100, num_exemplars=3, samples_per_exemplar=2, num_epochs=1
    )
    said = demo.run(settings)
    assert "6 (0 failed)" in said and (tmp_path / "demo" / "run" / "report.html").exists()
    rates = {line[:34].strip(): line[34:].split() for line in said.splitlines() if line[34:].split()}
    assert rates["chance"] == ["0.010", "0.100"]
    for name in ("this run (Parquet)", "colour histogram", "the same network, untrained"):
        at_1, at_10 = map(float, rates[name])
        assert 0 <= at_1 <= at_10 <= 1


def test_the_benchmark_prints_ratios(local_ray, tmp_path, start_job):
    values = {
        "output": str(tmp_path / "benchmark"),
        "only": ["embed", "search"],
        "num_rounds": 1,
        "num_images": 160,
        "image_px": 64,
        "backbone": {"name": "test_resnet", "weights": "random"},
        "num_vectors": 5000,
        "dimension": 32,
        "num_queries": 200,
        "nprobe": 4,
    }
    rows = benchmark.run(BenchmarkSettings(**values))
    assert len(rows) == 4 and all(row["lowest"] == row["median"] == row["highest"] > 0 for row in rows)
    assert rows[0]["median"] < rows[1]["median"]  # the ceiling with decoding is lower than the one without
    assert len(benchmark.format_table(rows).splitlines()) == 5

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    process = start_job("benchmark", values | {"output": str(tmp_path / "mine")}, tmp_path)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1 and "holds something that jobs.benchmark did not make" in said
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
