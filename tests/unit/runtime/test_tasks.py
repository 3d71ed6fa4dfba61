"""Results of work units without a cluster: their order, and the items that the progress bar counts."""

import pytest

from attrib.runtime import tasks


@pytest.mark.parametrize("label", ["", "square"])
def test_results_are_in_the_order_of_the_units(monkeypatch, label):
    seen, updates = [], []

    def finish_in_reverse(function, units, **resources):
        seen.append(resources)
        return reversed([(i, function(*unit)) for i, unit in enumerate(units)])

    monkeypatch.setattr(tasks, "run_units", finish_in_reverse)
    monkeypatch.setattr(tasks.Progress, "update", lambda self, count: updates.append(count))
    counts = [5, 6, 7]
    assert tasks.run_all(lambda x: x * x, [(1,), (2,), (3,)], label, "items", counts, num_cpus=2) == [1, 4, 9]
    assert seen == [{"num_cpus": 2}]
    assert updates == ([7, 6, 5] if label else [])
    assert tasks.run_all(lambda x: x, []) == []
