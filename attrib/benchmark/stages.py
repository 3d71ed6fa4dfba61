"""The stages that need no Ray: who meets whom, on what sizes, with how many threads."""

from attrib.benchmark import autofaiss_contender, ours
from attrib.benchmark.bench import Bench, VectorSet, as_json
from attrib.benchmark.harness import Contender, Row

IMAGES, INDEX, SEARCH = (f"attrib.benchmark.{name}_contenders" for name in ("image", "index", "search"))
AUTOFAISS = "attrib.benchmark.autofaiss_contender:train_and_build"


def decode(bench: Bench) -> list[Row]:
    wanted = bench.settings.images
    job = {"folder": bench.jpegs, "num_images": wanted.decode_images, "backbone": as_json(bench.settings.backbone)}
    contenders = [
        Contender(
            "attrib.data.decoding", f"{IMAGES}:decode_and_resize", job, note="scaled as the embed job's default has it"
        ),
        Contender("attrib.data.decoding, full size", f"{IMAGES}:decode_and_resize", job | {"full_size": True}),
        Contender("Pillow loop", f"{IMAGES}:pillow", job),
        Contender("TorchCodec, no resize", f"{IMAGES}:torchcodec", job, may_fail=True),
    ]
    size = f"a JPEG of {wanted.min_megapixels:g} to {wanted.max_megapixels:g} megapixels"
    return bench.compare("decode + resize", {"image": size}, contenders)


def build(bench: Bench) -> list[Row]:
    """Training and filling together on all cores, then filling alone on one thread from one template."""
    rows = []
    for vectors in bench.vector_sets:
        rows += _train_and_build(bench, vectors) + _fill(bench, vectors)
    return rows


def prepare_template(bench: Bench, vectors: VectorSet) -> None:
    """For stages after `build` where that was left out: a template, our shard and FAISS's lists of the same."""
    bench.prepare("embeddings", f"{INDEX}:prepare", vectors.job(bench.settings, float32=None))
    job = vectors.job(bench.settings)
    bench.prepare("our shard", f"{INDEX}:train_and_build", job | {"output": job["shard"]})
    bench.prepare("FAISS index", f"{INDEX}:faiss_build", job)


def _train_and_build(bench: Bench, vectors: VectorSet) -> list[Row]:
    job = vectors.job(bench.settings)
    use_autofaiss = bench.settings.vectors.autofaiss and vectors.kind == "images"
    bench.prepare("embeddings", f"{INDEX}:prepare", job | ({} if use_autofaiss else {"float32": None}))
    is_slow = vectors.size == bench.largest.size or vectors.kind != "images"
    contenders = [
        Contender("attrib", f"{INDEX}:train_and_build", job | {"output": job["shard"]}, bench.num_cpus),
        Contender(
            "faiss.index_factory",
            f"{INDEX}:faiss_train_and_build",
            job,
            bench.num_cpus,
            note="10 iterations of k-means, ours 20; one index in memory",
        ),
    ]
    if use_autofaiss:
        contenders.append(_autofaiss(bench, vectors))
    size = f"{_described(bench, vectors)}, all cores"
    laps = {lap: f"{lap}: {size}" for lap in ("train and build", "train", "build")}
    num_rounds = bench.settings.vectors.slow_rounds if is_slow else None
    return bench.compare("build", laps, contenders, num_rounds)


def _autofaiss(bench: Bench, vectors: VectorSet) -> Contender:
    plan, _ = ours.ivf_plan(vectors.size, bench.settings.vectors.dimension)
    job = vectors.job(
        bench.settings,
        num_lists=plan.num_lists,
        threads=bench.num_cpus,
        memory="8G",
        index_memory="6G",
        output=vectors.folder,
    )
    try:
        python = autofaiss_contender.environment_python(f"{bench.inputs}/autofaiss")
    except OSError as error:
        return Contender("autofaiss", AUTOFAISS, {}, bench.num_cpus, may_fail=True, unavailable=str(error))
    note = f"IVF{plan.num_lists},Flat from float32 .npy; chooses its own training rows"
    return Contender("autofaiss", AUTOFAISS, job, bench.num_cpus, note=note, python=python, may_fail=True)


def _fill(bench: Bench, vectors: VectorSet) -> list[Row]:
    job = vectors.job(bench.settings)
    job["output"] = job["shard"]
    contenders = [
        Contender("attrib.index.shard.build_shard", f"{INDEX}:build", job),
        Contender("faiss, Parquet to index file", f"{INDEX}:faiss_build", job, note="same centroids"),
        Contender(
            "faiss index.add",
            f"{INDEX}:faiss_add",
            job,
            note="same centroids; vectors in memory, nothing read or written",
        ),
    ]
    return bench.compare("build", {"build": f"one shard, one thread: {_described(bench, vectors)}"}, contenders)


def build_slope(bench: Bench) -> list[Row]:
    """Filling at every size with the template of the largest: with lists that grow as sqrt(n), assignment alone would cost n^1.5."""
    template = bench.largest.job(bench.settings)["template"]
    rows = []
    for vectors in bench.vector_sets:
        if vectors.kind == "images":
            job = vectors.job(bench.settings, template=template, output=f"{vectors.folder}/sloped")
            contenders = [Contender("attrib.index.shard.build_shard", f"{INDEX}:build", job)]
            size = f"one shard, one thread: {vectors.size:,} vectors, lists of {bench.largest.size:,}"
            rows += bench.compare("build slope", {"build": size}, contenders)
    return rows


def search(bench: Bench) -> list[Row]:
    rows = []
    for vectors in bench.vector_sets:
        if "build" not in bench.settings.only:
            prepare_template(bench, vectors)
        wanted = bench.settings.vectors
        job = vectors.job(bench.settings, timed_queries=min(wanted.slow_peer_queries, wanted.batches[-1]))
        found = bench.prepare("exact neighbours", f"{SEARCH}:prepare", job)
        more = [nprobe for nprobe in wanted.more_nprobes if found["nprobe"] < nprobe < found["num_lists"]]
        for nprobe in (found["nprobe"], *more):
            # The worst case needs one look: it is slow for all.
            for threads in wanted.threads if vectors.kind == "images" else wanted.threads[:1]:
                rows += _search(bench, vectors, job | {"nprobe": nprobe}, threads, found)
    return rows


def _search(bench: Bench, vectors: VectorSet, job: dict, threads: int, found: dict) -> list[Row]:
    whole = {name: value for name, value in job.items() if name != "timed_queries"}
    # FAISS's search costs the same for each query; on noise, where nprobe is nearly all lists, the whole batch would take too long.
    theirs = whole if vectors.kind == "images" else job
    argsort = job | {"timed_queries": bench.settings.vectors.argsort_queries}
    contenders = [
        Contender("attrib.index.search.search_shard", f"{SEARCH}:batch_search", whole, threads),
        Contender("faiss index.search", f"{SEARCH}:faiss_search", theirs, threads, note="same lists and nprobe"),
        Contender("faiss.knn, exact", f"{SEARCH}:brute_force", job, threads),
        Contender("argsort per query (AbC)", f"{SEARCH}:argsort_loop", argsort, threads),
    ]
    lists = f"nprobe {job['nprobe']} of {found['num_lists']:,}"
    sizes = {
        str(batch): f"{batch:,} queries, {_described(bench, vectors)}, {lists}, {threads} thread(s)"
        for batch in job["batches"]
    }
    return bench.compare("search", sizes, contenders)


def _described(bench: Bench, vectors: VectorSet) -> str:
    return f"{vectors.size:,} x {bench.settings.vectors.dimension} ({vectors.kind})"
