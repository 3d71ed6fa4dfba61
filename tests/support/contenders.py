"""Benchmark contenders with known measurements."""

import os
import time

import numpy as np

MIB = 1 << 20


def sleeper(job: dict, clock) -> dict:
    with clock.lap("nap"):
        time.sleep(job["seconds"])
    with clock.lap("part", scale=10):
        time.sleep(job["seconds"] / 10)
    with open(job["log"], "a", encoding="ascii") as file:
        file.write(job["name"])
    threads = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    return {"environment": threads, "answers": job["answers"] or str(os.getpid())}


def filler(job: dict, clock) -> dict:
    with clock.lap("small"):
        np.ones(16 * MIB, np.uint8)
    with clock.lap("large"):
        block = np.ones(job["mib"] * MIB, np.uint8)
        time.sleep(0.3)  # long enough for the harness to measure memory
    return {"sum": int(block[:10].sum())}


def refuser(job: dict, clock) -> dict:
    raise RuntimeError("no such library here")


def thread_changer(job: dict, clock) -> dict:
    import faiss

    faiss.omp_set_num_threads(2)
    return {}
