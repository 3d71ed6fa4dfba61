"""jobs.registry: what it registers, lists and removes, what it prints, and what it refuses."""

from types import SimpleNamespace

import pytest
from support.generators import STORAGE, drawn_file, write_spectrum_method

from attrib.common.errors import AttribError
from attrib.common.storage import Storage
from attrib.generators.registry import registration
from attrib.generators.registry.registration import run
from attrib.generators.registry.registry import open_registry
from attrib.generators.registry.settings import RegistrySettings


@pytest.fixture
def job(tmp_path):
    """jobs.registry with 12 images of one generator, one broken file, and a fingerprint method."""
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(12):
        (folder / f"{seed:02d}.png").write_bytes(drawn_file("nearest", seed))
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    write_spectrum_method(str(tmp_path / "method"), STORAGE)
    made_by = {"name": "log-spectrum", "uri": str(tmp_path / "method")}

    def ask(action: str, **values) -> list[str]:
        if action == "register":
            values = {"images": {"name": "a", "uri": str(folder)}} | values
        return run(RegistrySettings(**{"registry": str(tmp_path / "registry"), "action": action, "name": "a"} | values))

    return SimpleNamespace(ask=ask, folder=folder, made_by=made_by, registry=str(tmp_path / "registry"))


def test_the_job_registers_lists_and_removes(job):
    with pytest.raises(AttribError, match="is a new registry; set method"):
        job.ask("register")
    lines = job.ask("register", method=job.made_by)
    assert lines[0] == "a version 1 as generator: 12 images, 12 PNG; left out: 1 not decodable"
    assert "self-similarity" in lines[2]
    with pytest.raises(AttribError, match=r"was made with method\.name 'log-spectrum', not 'spectrum-lda'"):
        job.ask("register", method=job.made_by | {"name": "spectrum-lda"}, new_version=True)
    lines = job.ask("register", new_version=True, max_images=10)
    assert "a version 2 as generator: 10 images" in lines[0]
    assert "a v2" in job.ask("list")[1]
    assert len(job.ask("remove")) == 1


def test_two_first_registrations_at_once_are_both_kept(job, monkeypatch):
    """The second run begins while the first one loads its method, and ends before it."""
    load = registration.load_method

    def load_slowly(*arguments):
        monkeypatch.setattr(registration, "load_method", load)
        job.ask("register", method=job.made_by, name="faster")
        return load(*arguments)

    monkeypatch.setattr(registration, "load_method", load_slowly)
    job.ask("register", method=job.made_by)
    assert [entry.name for entry in open_registry(job.registry, STORAGE).entries] == ["faster", "a"]


def test_a_run_that_begins_while_the_output_is_checked_is_no_stranger(job, monkeypatch):
    names = STORAGE.names

    def names_later(storage, uri, *arguments):
        monkeypatch.undo()
        job.ask("register", method=job.made_by, name="faster")
        return names(uri, *arguments)

    monkeypatch.setattr(Storage, "names", names_later)
    job.ask("register", method=job.made_by)
    assert [entry.name for entry in open_registry(job.registry, STORAGE).entries] == ["faster", "a"]


def test_copies_do_not_count_towards_max_images(job):
    """12 distinct images among 57 files, of which at most 30 are taken."""
    copies = [drawn_file("nearest", 3)] * 40 + [drawn_file("nearest", 1, px=12)] * 4
    for i, data in enumerate(copies):
        (job.folder / f"x{i:02d}.png").write_bytes(data)
    lines = job.ask("register", method=job.made_by, max_images=30)
    assert lines[0] == "a version 1 as generator: 12 images, 12 PNG; left out: 43 copies, 1 not decodable, 1 too small"


def test_a_failed_first_registration_leaves_no_registry(job):
    for path in sorted(job.folder.iterdir())[5:]:
        path.unlink()
    with pytest.raises(AttribError, match="has 5 distinct images that can be assessed and needs 10"):
        job.ask("register", method=job.made_by)
    assert not STORAGE.exists(job.registry)


def test_degradations_of_a_registry_cannot_be_changed(job):
    job.ask("register", method=job.made_by, degradations=["none", "jpeg-85"])
    with pytest.raises(AttribError, match=r"made with degradations \['none', 'jpeg-85'\], not \['none', 'webp-85'\]"):
        job.ask("register", new_version=True, degradations=["none", "webp-85"])
    assert "version 2" in job.ask("register", new_version=True)[0]
    assert "version 3" in job.ask("register", new_version=True, degradations=["none", "jpeg-85"])[0]


def test_entries_are_listed_and_removed_without_the_method(job):
    job.ask("register", method=job.made_by)
    job.ask("register", name="b", images={"name": "b", "uri": str(job.folder)})
    assert job.ask("list")[-1].startswith("families by family_accuracy 0.6 and family_level 0.05, the defaults")
    STORAGE.delete_folder(job.made_by["uri"])
    lines = job.ask("list")
    assert lines[1:3] == ["  a v1 (generator): 12 images", "  b v1 (generator): 12 images"]
    assert lines[3].startswith("WARNING: self-similarity and families are not known: ")
    assert job.ask("remove")[1] == "  b v1 (generator): 12 images"
    assert [entry.name for entry in open_registry(job.registry, STORAGE).entries] == ["b"]


def test_entries_of_another_format_are_named_at_registration(job):
    job.ask("register", method=job.made_by)
    for seed in range(12):
        (job.folder / "jpeg").mkdir(exist_ok=True)
        (job.folder / "jpeg" / f"{seed}.jpg").write_bytes(drawn_file("checker", seed, format="JPEG"))
    lines = job.ask("register", name="b", images={"name": "b", "uri": str(job.folder / "jpeg")})
    assert any(
        text.startswith("WARNING: the formats of a (100% PNG), b (100% JPEG) differ from those of the other")
        for text in lines
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"action": "register", "name": "a"}, "exactly one of images and pool"),
        ({"action": "remove"}, "needs the name of an entry"),
        ({"action": "register", "name": "a", "pool": "p"}, "needs role 'synthetic'"),
        ({"action": "list", "degradations": ["jpeg-85"]}, "must start with 'none' and have no duplicates"),
        ({"action": "list", "method": {"name": "extractor"}}, "needs uri"),
        ({"action": "remove", "name": "a|b"}, "pattern"),
    ],
)
def test_contradictory_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RegistrySettings(registry="r", **values)
