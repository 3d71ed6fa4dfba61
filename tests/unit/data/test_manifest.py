"""Manifests: partitions, replaced ids and joined metadata."""

import random

import numpy as np
import pytest
from support.images import pictures, write_folder

from attrib.data import ids as identity
from attrib.data.collections import list_images, list_units
from attrib.data.ids import duplicated_ids, resolve_collisions
from attrib.data.manifest import build_partition, plan_partitions
from attrib.data.settings import CollectionSettings, MetadataSettings


@pytest.mark.parametrize("seed", range(20))
def test_partitions_cut_the_listings_in_order(seed):
    rng = random.Random(seed)
    table_rows = [rng.choice([0, 1, 2, 7, 30]) for _ in range(rng.randint(1, 9))]
    partition_rows = rng.randint(1, 12)
    partitions = plan_partitions(table_rows, partition_rows)
    rows = [(s.table, row) for slices in partitions for s in slices for row in range(s.start, s.stop)]
    assert rows == [(table, row) for table, count in enumerate(table_rows) for row in range(count)]
    sizes = [sum(s.stop - s.start for s in slices) for slices in partitions]
    assert all(size == partition_rows for size in sizes[:-1]) and all(0 < size <= partition_rows for size in sizes[-1:])
    assert all(s.start < s.stop for slices in partitions for s in slices)


def test_replaced_ids_reach_the_partitions(tmp_path, local):
    write_folder(pictures(["a.jpg", "b.jpg", "c.jpg"]), str(tmp_path), local)
    sidecar = tmp_path / "about.csv"
    sidecar.write_text("key,owner\nb.jpg,B\n")
    collection = CollectionSettings(name="c", uri=str(tmp_path), metadata=MetadataSettings(uri=str(sidecar)))
    tables = [list_images(unit, collection, local) for unit in list_units(collection, local)]
    ids = dict(zip(tables[0]["key"].to_pylist(), tables[0]["id"].to_pylist()))
    built = build_partition(tables, {"b.jpg": 77}, collection, local)
    assert dict(zip(built["key"].to_pylist(), built["id"].to_pylist())) == ids | {"b.jpg": 77} and built[
        "owner"
    ].to_pylist() == [None, "B", None]
    assert built.schema.field("id") == tables[0].schema.field("id")


def test_collisions_wrap_around_at_the_last_id():
    last = (1 << identity.ID_BITS) - 1
    sorted_ids = np.array([0, last, last], np.int64)
    assert duplicated_ids(sorted_ids).tolist() == [last]
    assert resolve_collisions([(last, "b"), (last, "a")], sorted_ids) == {"b": 1}
