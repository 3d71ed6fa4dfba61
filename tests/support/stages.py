"""The stages that the fault campaign attacks, on a dozen images, and what a finished stage left."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage, bytes_sha256, join
from support.images import pictures, write_folder

STAGES = ("manifest", "embed", "index", "attribute", "pipeline")
BACKBONE = {"name": "test_resnet", "weights": "random"}
MANIFEST = {"partition_rows": 7}
EMBED = {"chunk_rows": 3, "num_workers": 1, "device_batch_size": 4, "device": "cpu"}
INDEX = {"kind": "ivf_sq8", "num_lists": 2, "shard_rows": 7, "held_out_rows": 3, "recall_k": 2, "device": "cpu"}
# The engine "auto" depends on measured speeds.
ATTRIBUTE = {"top_k": 3, "query_block_rows": 4, "engine": "lists", "device": "cpu", "recall_check_queries": 3}
NUM_SOURCES, NUM_GENERATED = 14, 8
# Of records: what differs between two equal runs.
VOLATILE = {"written_at", "estimate", "rates", "versions", "settings", "record_sha256", "engine_reason", "num_tasks"}


@dataclass(frozen=True)
class Place:
    """A folder or prefix with images, and the storage of the jobs that use it. run: output of jobs.pipeline."""

    root: str
    storage_values: dict[str, Any]

    @cached_property
    def storage(self) -> Storage:
        return Storage(StorageSettings(**self.storage_values))

    @property
    def run(self) -> str:
        return join(self.root, "run")

    def write_inputs(self) -> None:
        sources = pictures([f"{i % 3}/s{i}.jpg" for i in range(NUM_SOURCES)])
        generated = pictures([f"g{i}.png" for i in range(NUM_GENERATED)]) | {"broken.jpg": sources["0/s0.jpg"][:300]}
        write_folder(sources, join(self.root, "in/sources"), self.storage)
        write_folder(generated, join(self.root, "in/generated"), self.storage)
        owners = "key,owner\n" + "".join(f"{key},owner {i % 4}\n" for i, key in enumerate(sources))
        self.storage.write_bytes(join(self.root, "in/owners.csv"), owners.encode())

    def values(self, stage: str, output: str, **changed: Any) -> dict[str, Any]:
        """The config of a stage that reads the finished stages before it in `run`."""
        sources = {"name": "sources", "uri": join(self.root, "in/sources")}
        sources["metadata"] = {"uri": join(self.root, "in/owners.csv")}
        generated = {"name": "generated", "uri": join(self.root, "in/generated")}
        by_stage = {
            "manifest": MANIFEST | {"collection": sources},
            "embed": EMBED | {"manifest": join(self.run, "sources/manifest"), "backbone": BACKBONE},
            "index": INDEX | {"embeddings": join(self.run, "sources/embeddings")},
            "attribute": ATTRIBUTE
            | {"queries": join(self.run, "generated/embeddings"), "index": join(self.run, "index")},
            "pipeline": {"sources": sources, "generated": generated, "backbone": BACKBONE}
            | {"manifest": MANIFEST, "embed": EMBED, "index": INDEX, "attribute": ATTRIBUTE},
        }
        shares = {"max_failed_share": 0.5} if stage in ("embed", "attribute", "pipeline") else {}
        return by_stage[stage] | shares | {"output": output, "storage": self.storage_values} | changed


def write_config(values: dict[str, Any], path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def results(output: str, storage: Storage) -> dict[str, Any]:
    """{path below output: content} of what a stage left: digests of tables and arrays, records without VOLATILE.

    Pages hold dates, so that only their presence counts. Temporary files count, since none may be left.
    """
    prefix, found = output.removeprefix("s3://") + "/", {}
    for info in storage.list_folder(output, recursive=True):
        name = info.path.removeprefix(prefix)
        if not info.is_file or (info.base_name.startswith(".") and not name.endswith(".tmp")):
            continue
        uri = join(output, name)
        if name.endswith(".json"):
            found[name] = _steady(_parsed(storage.read_bytes(uri)))
        else:
            found[name] = "" if name.endswith(".html") else bytes_sha256(storage.read_bytes(uri))
    return found


def _parsed(content: bytes) -> Any:
    """JSON; the content itself if it is none: a damaged record that no stage had to read."""
    try:
        return json.loads(content)
    except ValueError:
        return content


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _steady(inner) for name, inner in value.items() if name not in VOLATILE}
    return [_steady(inner) for inner in value] if isinstance(value, list) else value


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """What differs, "" for nothing."""
    names = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
    kinds = {name: "missing" if name not in found else "left" if name not in expected else "other" for name in names}
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items())[:300]
