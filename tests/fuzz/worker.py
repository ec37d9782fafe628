"""One target in a process of its own, for run.py: atheris ends the process it runs in, and memory is bounded by it.

    python worker.py TARGET ENGINE INPUTS SECONDS SEED FOLDER

Engines: atheris (libFuzzer, led by the branches of Fedloom's modules), hypothesis (inputs built from their structure)
and random (the same changes as atheris makes, led by nothing: for machines that atheris does not run on).
"""

from __future__ import annotations

import logging
import os
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Final, NoReturn

from meter import Meter, bound_memory
from mutation import havoc
from targets import Target, load

_TELL: Final = 1000  # inputs between two tallies on disk
_AFRESH: Final = 0.4  # of the inputs that atheris changes along their structure, begin with a good one
_KEPT: Final = 400  # inputs that the random engine goes on from, beside the seeds
_SHARED_MEMORY: Final = Path("/dev/shm")


class Job:
    """Inputs for a target, until there were enough of them or the time is over."""

    def __init__(self, meter: Meter, inputs: int, seconds: float) -> None:
        self._meter, self._inputs = meter, inputs
        self._until = time.monotonic() + seconds

    @property
    def over(self) -> bool:
        return self._meter.tally.inputs >= self._inputs or time.monotonic() >= self._until

    def __call__(self, data: bytes) -> None:
        self._meter(data)
        if self._meter.tally.inputs % _TELL == 0:
            self._meter.write(done=False)

    def end(self) -> NoReturn:
        """Tell what came of it and leave at once, whatever runs in this process."""
        self._meter.look()
        self._meter.write(done=True)
        sys.stdout.flush()
        os._exit(0)


def run_atheris(target: Target, job: Job, seeds: list[bytes], seed: int, folder: Path) -> None:
    """Never returns."""
    import atheris

    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(data)

    def one(data: bytes) -> None:
        job(data)
        if job.over:
            job.end()

    def changed(data: bytes, most: int, number: int) -> bytes:
        rng = random.Random(number)
        if target.mutate is None:
            return bytes(atheris.Mutate(data, most))
        if rng.random() < _AFRESH:  # what libFuzzer goes on from was refused more often than not
            data = rng.choice(seeds)
        made = target.mutate(data, rng, lambda part: bytes(atheris.Mutate(part, len(part) + 64)))
        return made if len(made) <= most else data

    arguments = [
        sys.argv[0],
        f"-seed={seed}",
        f"-max_len={target.max_len}",
        f"-artifact_prefix={folder}/stopped-",
        "-rss_limit_mb=0",
        "-timeout=60",
        "-verbosity=0",
        "-len_control=0",
        "-mutate_depth=2",
        str(corpus),
    ]
    atheris.Setup(arguments, one, custom_mutator=changed)
    atheris.Fuzz()


def run_hypothesis(target: Target, job: Job, seed: int) -> None:
    """Until the strategy has no more inputs, or the job is over."""
    import hypothesis

    if target.inputs is None:
        raise ValueError(f"{target.name} has no inputs that hypothesis can build")
    options: Any = {
        "max_examples": 1 << 30,
        "deadline": None,
        "database": None,
        "phases": [hypothesis.Phase.generate],
        "suppress_health_check": list(hypothesis.HealthCheck),
    }

    @hypothesis.seed(seed)
    @hypothesis.settings(**options)
    @hypothesis.given(target.inputs())
    def one(data: bytes) -> None:
        job(data)
        if job.over:
            job.end()

    one()


def run_random(target: Target, job: Job, seeds: list[bytes], seed: int) -> None:
    """The same changes, piled up on inputs that were not refused at once."""
    rng = random.Random(seed)
    pool = list(seeds)

    def any_change(data: bytes) -> bytes:
        return havoc(data, rng)

    while not job.over:
        data = rng.choice(pool)
        data = any_change(data) if target.mutate is None else target.mutate(data, rng, any_change)
        if len(data) > target.max_len:
            continue
        accepted = job._meter.tally.accepted
        job(data)
        if job._meter.tally.accepted > accepted and rng.random() < 0.1:
            pool.append(data)
            if len(pool) > len(seeds) + _KEPT:
                del pool[rng.randrange(len(seeds), len(pool))]


def prepare(name: str, engine: str, folder: Path) -> Target:
    """The target, its modules instrumented where the engine is led by their branches."""
    files = Path(tempfile.mkdtemp(prefix="fuzz-", dir=_SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None))
    if engine != "atheris":
        return load(name, files)
    import atheris

    with atheris.instrument_imports(include=["fedloom"], enable_loader_override=False):
        return load(name, files)


def main(name: str, engine: str, inputs: str, seconds: str, seed: str, where: str) -> None:
    """Run one target; its tally and failing inputs are left in the folder."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    folder = Path(where)
    folder.mkdir(parents=True, exist_ok=True)
    target = prepare(name, engine, folder)
    seeds = list(target.seeds())
    meter = Meter(target, engine, folder)
    job = Job(meter, int(inputs), float(seconds))
    bound_memory()
    if engine == "atheris":
        run_atheris(target, job, seeds, int(seed), folder)
    elif engine == "hypothesis":
        run_hypothesis(target, job, int(seed))
    else:
        for data in seeds:
            job(data)
        run_random(target, job, seeds, int(seed))
    job.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
