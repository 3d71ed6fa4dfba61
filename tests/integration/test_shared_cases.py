"""Inputs that failed once. Each folder of shared/cases has one, with CMD (how to run it) and EXPECTED (what is right).

ATTRIB_CASES names the folder; by default it lies beside the checkout. The jobs run in this process, and without the
actors of Ray Data, which test_embedding.py is about. "Top source" cases use weights that are random, not trained: right
is a similarity of 1.
"""

import logging
import re
import time
from hashlib import sha256

import numpy as np
import pytest
from support.cases import CASES, Runner, map_in_this_process, write_weights
from support.files import LOCAL

from attrib.common.errors import AttribError, ImageError
from attrib.common.storage import join
from attrib.data import job as manifest_job
from attrib.data.decoding import decode_pixels
from attrib.data.settings import ManifestSettings

if not CASES.is_dir():
    pytest.skip(f"no cases in {CASES}; set ATTRIB_CASES to their folder", allow_module_level=True)

RIGHT_PIXELS = (
    "gif-first-frame-offset",
    "png2-grey-trns",
    "png4-grey-trns",
    "tiff-thumbnail-first",
    "tiff12-grey",
    "tiff16-miniswhite",
)
LISTED = {  # the images of cases that only list
    "parquet-directory": ["0", "1"],
    "parquet-hf-struct": ["0.jpg", "1.jpg", "2.jpg"],
    "set-path-with-hash": ["b.png"],
    "symlink-loop": ["a/x.png"],
    "synology-eadir": ["a.png"],
    "tar-appledouble-shard": ["a.png"],
    "tar-concatenated": ["a.png", "b.png"],
    "tar-dot-parts": ["images/b.png", "images/sub/a.png"],
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_weights(folder / "weights" / "trained.safetensors")
    return folder


@pytest.fixture
def run(local_ray, request, tmp_path, demo, caplog, monkeypatch):
    """run(name) does what CMD of a case says and gives what it left."""
    caplog.set_level(logging.INFO, "attrib")
    monkeypatch.setattr("attrib.embed.job.map_chunks", map_in_this_process)
    return Runner(tmp_path, demo, lambda: request.getfixturevalue("s3_endpoint"), caplog).run


def is_one(similarity: float) -> bool:
    return abs(similarity - 1) < 1e-3


def check_shares(rows: list[dict]) -> None:
    assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert [row["similarity"] for row in rows] == sorted((row["similarity"] for row in rows), reverse=True)


def test_every_case_has_a_test():
    tests = " ".join(name for name in globals() if name.startswith("test_"))
    names = {path.name for path in CASES.iterdir() if path.is_dir()} - {*RIGHT_PIXELS, *LISTED}
    assert {name for name in names if name.replace("-", "_") not in tests} == set()


@pytest.mark.parametrize("name", RIGHT_PIXELS)
def test_top_source_has_the_right_pixels(name, run):
    case = run(name)
    (query,) = case.keys("run/generated/manifest")
    right, wrong = case.sources(query)
    assert right["source_key"] == "right.png" and is_one(right["similarity"])
    assert wrong["source_key"] == "wrong.png" and not is_one(wrong["similarity"])


@pytest.mark.parametrize("name", LISTED)
def test_images_are_listed(name, run):
    assert run(name).keys() == LISTED[name]


def test_few_training_points(run):
    rows = run("few-training-points").sources("q.png")
    assert len(rows) == 10
    copies = {row["source_key"] for row in rows[:8]}
    assert len(copies) == 8 and all(is_one(row["similarity"]) for row in rows[:8])
    folder = CASES / "few-training-points" / "in"
    query = (folder / "generated" / "q.png").read_bytes()
    assert copies == {path.name for path in (folder / "sources").iterdir() if path.read_bytes() == query}
    check_shares(rows)


def test_float16_underflow(run):
    rows = run("float16-underflow").vectors()
    assert len(rows) == 12
    assert {(r["stage"], r["reason"]) for r in rows.values()} == {("embed", "the embedding is too small for float16")}
    assert all(row["embedding"] is None for row in rows.values())


def test_nan_weights(run):
    rows = run("nan-weights").vectors()
    assert len(rows) == 3
    assert all(row["stage"] == "embed" and row["embedding"] is None for row in rows.values())


def test_index_duplicates_k_above_n(run):
    rows = run("index-duplicates-k-above-n").sources("q.png")
    copies = rows[:12]
    assert {row["source_key"] for row in copies} == {f"copy{i:02}.png" for i in range(12)}
    assert all(is_one(row["similarity"]) for row in copies) and not is_one(rows[12]["similarity"])
    ids = [row["source_id"] for row in rows]
    assert ids[:12] == sorted(ids[:12]), "ties in the order of their ids"
    assert len(set(ids)) == len(ids) == 19 and -1 not in ids
    check_shares(rows)


def test_one_source(run):
    (row,) = run("one-source").sources("q.png")
    assert (row["rank"], row["source_key"], row["share"]) == (1, "a.png", 1)


@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_sq8"])
def test_one_source_in_more_lists_than_vectors(kind, run):
    (row,) = run("one-source", f"index.kind={kind}", "index.num_lists=16").sources("q.png")
    assert (row["source_key"], row["share"]) == ("a.png", 1)


def test_jpeg_cmyk_no_adobe(run):
    """Inverted or not: either is right, and one of two sources is the top one."""
    rows = run("jpeg-cmyk-no-adobe").sources("jpeg_cmyk_no_adobe.jpg")
    assert {row["source_key"] for row in rows} == {"right.png", "wrong.png"}
    check_shares(rows)


def test_jpeg_half_then_eoi(run):
    error = run("jpeg-half-then-eoi").error
    assert "1 of 1 images failed" in error and "jpeg_half_then_eoi.jpg: damaged JPEG: truncated" in error


def test_names(run):
    rows = run("names").vectors()
    folder = CASES / "names" / "in"
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert len(rows) == 17 and rows.keys() == files.keys()
    for key, path in files.items():
        assert rows[key]["content_sha256"] == sha256(path.read_bytes()).digest() and rows[key]["embedding"], key


def test_parquet_null_and_empty(run):
    rows = run("parquet-null-and-empty").vectors()
    assert len(rows) == 3 and [key for key, row in rows.items() if row["embedding"]] == ["0"]
    assert (rows["1"]["stage"], rows["1"]["reason"]) == ("read", "the row holds no bytes")
    assert (rows["2"]["stage"], rows["2"]["reason"]) == ("decode", "empty file")


def test_parquet_rewritten(run):
    rows = run("parquet-rewritten").vectors()
    assert rows.keys() == {"black", "grey", "white"}
    for row in rows.values():
        assert row["embedding"] is None and row["stage"] == "read"
        assert "the file changed since it was listed" in row["reason"]


def test_parquet_types(run):
    case = run("parquet-types")
    nanoseconds = {row["key"]: row["t"] and row["t"].value for row in case.images()}
    first = 2**53 + 1
    assert nanoseconds == {str(first + i): 1 + i for i in range(3)} | {str(2**63 - 1): None}
    assert all(row["embedding"] for row in case.vectors().values())


def test_png_large_text(run):
    rows = run("png-large-text").vectors()
    assert rows.keys() == {"plain.png", "text.png", "itxt.png", "ztxt.png", "iccp.png"}
    assert all(row["embedding"] == rows["plain.png"]["embedding"] is not None for row in rows.values())


def test_report_binary_metadata(run):
    case = run("report-binary-metadata")
    about = {row["key"]: row for row in case.images("run/sources/manifest")}
    assert about["a.png"]["sha"] == b"\xff" * 20, "kept in the tables"
    assert is_one(case.sources("a.png")[0]["similarity"])
    assert "a.png" in case.page() and "\\xff" not in case.page() and "thumb" not in headings(case.page())


def headings(page: str) -> str:
    return " ".join(re.findall(r"<(?:h\d|th)[^>]*>.*?</", page, re.DOTALL))


def test_report_metadata_types(run):
    case = run("report-metadata-types")
    about = {row["key"]: row for row in case.images("run/sources/manifest")}
    assert (about["a.png"]["big"], about["b.png"]["big"]) == (2**53 + 1, 2**63 - 1)
    page = case.page()
    assert str(2**53 + 1) in page and str(2**63 - 1) in page, "exact, also on the page"
    assert "<img src=x" not in page and "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "<b>x</b>" not in page and "['x', '</script>']" not in page and "&lt;/script&gt;" in page


def test_s3_dot_parts(run):
    """Arrow reads a/b for a/./b, so the two images are counted; with the listed share of one half, that is an error."""
    refused = run("s3-dot-parts").errors[0]
    assert "2 of 3 images cannot be listed" in refused and "2 key that the storage client cannot read" in refused
    assert "'./a.png'" in refused


def test_s3fs_object_and_prefix(run):
    rows = run("s3fs-object-and-prefix").vectors()
    assert rows.keys() == {"a.png", "a.png/b.png"} and all(row["embedding"] for row in rows.values())
    assert rows["a.png"]["content_sha256"] != rows["a.png/b.png"]["content_sha256"]


def test_sidecar_img2dataset(run):
    case = run("sidecar-img2dataset")
    about = {row["key"]: (row["url"], row["status"]) for row in case.images()}
    assert about == {f"00000000{i}.jpg": (f"u{i}", "success") for i in range(2)}
    assert "1 of its 3 rows found no image, e.g. '000000002'" in case.log


def test_sidecar_partial_match(run):
    case = run("sidecar-partial-match")
    assert {row["key"] for row in case.images() if row["title"]} == {"c.png"}
    assert "describes 1 of 4 images" in case.log and "3 of its 4 rows found no image" in case.log


def test_sidecar_tsv_quote(run):
    titles = {row["key"]: row["title"] for row in run("sidecar-tsv-quote").images()}
    assert titles == {"a.png": '"Untitled', "b.png": "foo", "c.png": 'the bar"', "d.png": "last"}


@pytest.mark.parametrize(("name", "key"), [("tar-duplicate-key", "a.png"), ("tar-same-key-in-two-shards", "000.jpg")])
def test_tar_duplicate_key_and_tar_same_key_in_two_shards(name, key, run):
    assert f"the key '{key}' occurs more than once" in run(name).error


def test_tar_hardlink(run):
    rows = run("tar-hardlink").vectors()
    assert rows.keys() == {"a.png", "b.png", "c.png"}
    digests = {key: row["content_sha256"] for key, row in rows.items()}
    assert digests["a.png"] == digests["b.png"] != digests["c.png"]


def test_tar_mixed_gz(run):
    case = run("tar-mixed-gz")
    assert case.keys() == ["a.png", "c.png"], "2.TAR is a shard"
    assert "left out 1 compressed shard (e.g. '1.tar.gz')" in case.log


def test_tar_sparse(run):
    case = run("tar-sparse")
    assert case.keys() == [f"z{i:02}.png" for i in range(30)] == sorted(case.vectors())
    assert "left out 1 sparse member of a tar (e.g. 'a.bmp')" in case.log


def test_uri_column_file_scheme(run):
    rows = run("uri-column-file-scheme").vectors()
    folder = CASES / "uri-column-file-scheme" / "in" / "i m"
    files = {"umlaut": "ü 1.png", "percent": "100%.png", "localhost": "c.png", "plain": "c.png"}
    assert rows.keys() == files.keys()
    for key, name in files.items():
        assert rows[key]["content_sha256"] == sha256((folder / name).read_bytes()).digest()
        assert np.any(rows[key]["embedding"])


def test_vanished(run):
    rows = run("vanished").vectors()
    assert rows["a.png"]["embedding"] and rows["b.png"]["embedding"] is None
    assert (rows["b.png"]["stage"], rows["b.png"]["reason"]) == ("read", "the file is gone since it was listed")


@pytest.mark.parametrize("name", ["scanbomb_100.jpg", "scanbomb_1000.jpg"])
def test_hostile_scans_are_refused_before_they_cost_anything(name):
    started = time.perf_counter()
    with pytest.raises(ImageError, match="not supported: JPEG with more than 64 scans"):
        decode_pixels((CASES / "hostile" / name).read_bytes(), max_megapixels=100)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("name", ["avif_67mp.avif", "float_100mp.tif", "lossless_100mp.webp"])
def test_hostile_sizes_are_judged_by_the_header(name):
    """They hold up to 100 megapixels; decoding so many takes seconds, refusing them does not."""
    with pytest.raises(ImageError, match="megapixels"):
        decode_pixels((CASES / "hostile" / name).read_bytes(), max_megapixels=50)


def list_tar(name: str, folder) -> list[str]:
    """Keys of a collection that is one tar of hostile/."""
    LOCAL.write_bytes(str(folder / "in" / "0.tar"), (CASES / "hostile" / name).read_bytes())
    collection = {"name": "c", "uri": str(folder / "in"), "format": "webdataset"}
    manifest_job.run(ManifestSettings(collection=collection, output=str(folder / "out")))
    return sorted(LOCAL.read_table(join(str(folder / "out"), "part-00000.parquet"))["key"].to_pylist())


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "claim"), [("neg_loop.tar", "-512 bytes"), ("pax_claim.tar", "claims 107,374,182,400")]
)
def test_hostile_claims_of_tars_are_refused(name, claim, local_ray, tmp_path):
    with pytest.raises(AttribError, match=claim):
        list_tar(name, tmp_path)


def test_hostile_names_of_tars_stop_no_collection(local_ray, tmp_path):
    (key,) = list_tar("nonutf8.tar", tmp_path / "nonutf8")
    assert key.startswith("caf") and key.endswith(".jpg")
    keys = list_tar("traversal.tar", tmp_path / "traversal")
    assert len(keys) == 5 and {"ok.jpg", "hard.jpg"} <= set(keys)
    assert not {"link.jpg", "dev.jpg", "fifo.jpg"} & set(keys), "no link out of the tar, no device"
