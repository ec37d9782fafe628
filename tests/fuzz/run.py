"""Fuzz every decoder: `make fuzz`.

    python tests/fuzz/run.py --inputs 1000000 [--minutes 60] [--targets update,task] [--engine random] [--seed 1]
    python tests/fuzz/run.py --targets update --input build/fuzz/update-atheris/update-0123456789ab.bin

Divides the inputs over the targets, runs each in a process of its own, one after another, and prints what came of them:

    accepted, refused   inputs that a decoder took, and that it refused with one line
    slowest             processor time of one input, in milliseconds
    peak                memory of one input in MB, traced for one input in 64 and for slow ones
    x                   the most memory in bytes for a byte of input, of inputs that took more than 2 MiB

At last it prints what inputs made by hand to be costly cost (bombs.py). Exits with 1 when anything failed; the inputs
that did it and what they raised are left in --out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from bombs import report  # noqa: E402
from meter import Tally  # noqa: E402
from targets import Target, divide, load, names  # noqa: E402

_BUILT: Final = ("task", "update", "hello", "refusal", "coefficients", "bits", "overrides")  # by hypothesis as well
_BUILT_SHARE: Final = 0.1  # of a target's inputs
_HEAD: Final = ("target", "engine", "inputs", "accepted", "refused", "inputs/s", "slowest", "peak", "x", "failures")
_FORM: Final = "{:<16} {:<10} {:>9} {:>9} {:>9} {:>8} {:>8} {:>7} {:>8} {:>8}"


def jobs(inputs: int, chosen: list[str], engine: str) -> list[tuple[str, str, int]]:
    """(target, engine, inputs), in the order of the targets."""
    made = []
    for name, count in divide(inputs, chosen).items():
        built = round(count * _BUILT_SHARE) if name in _BUILT else 0
        made.append((name, engine, count - built))
        if built:
            made.append((name, "hypothesis", built))
    return made


def run_job(name: str, engine: str, inputs: int, seconds: float, seed: int, out: Path) -> Tally:
    """Start a worker and wait for it; one that does not come back by itself has failed."""
    folder = out / f"{name}-{engine}"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if old.is_file():
            old.unlink()
    command = [sys.executable, str(HERE / "worker.py"), name, engine, str(inputs), str(seconds), str(seed), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    with (folder / "worker.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            status = process.wait(timeout=min(seconds, 1e6) + 600)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
    tally = _read(folder, name, engine)
    if not tally.done:
        stopped = [str(path) for path in sorted(folder.glob("stopped-*"))]
        tally.failures[f"ended with status {status}"] = (stopped or [str(folder / "worker.log")])[0]
    return tally


def _read(folder: Path, name: str, engine: str) -> Tally:
    try:
        table: dict[str, Any] = json.loads((folder / "tally.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Tally(target=name, engine=engine)
    return Tally(**{each.name: table[each.name] for each in fields(Tally)})


def row(tally: Tally) -> str:
    """A tally as a line of the table."""
    rate = tally.inputs / tally.wall if tally.wall else 0.0
    return _FORM.format(
        tally.target,
        tally.engine,
        tally.inputs,
        tally.accepted,
        tally.refused,
        f"{rate:.0f}",
        f"{1000 * tally.slowest:.1f}",
        f"{tally.peak / 2**20:.2f}",
        f"{tally.amplification:.0f}",
        len(tally.failures),
    )


def whole(tallies: list[Tally]) -> Tally:
    """The sum, or the largest."""
    total = Tally(target="all", engine="")
    for tally in tallies:
        total.inputs += tally.inputs
        total.accepted += tally.accepted
        total.refused += tally.refused
        total.wall += tally.wall
        total.slowest = max(total.slowest, tally.slowest)
        total.peak = max(total.peak, tally.peak)
        total.amplification = max(total.amplification, tally.amplification)
        total.failures |= {f"{tally.target}: {kind}": path for kind, path in tally.failures.items()}
    return total


def repeat(name: str, path: Path) -> None:
    """Run one input by itself; what it raises is shown whole."""
    with tempfile.TemporaryDirectory() as folder:
        target: Target = load(name, Path(folder))
        began = time.thread_time()
        try:
            target.check(path.read_bytes())
            print("accepted", end="")
        except ValueError as error:
            print(f"refused: {error}", end="")
        print(f", {1000 * (time.thread_time() - began):.1f} ms")


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fuzz every decoder.")
    parser.add_argument("--inputs", type=int, default=1_000_000, help="in all")
    parser.add_argument("--minutes", type=float, default=0.0, help="at most, in all; 0: as long as it takes")
    parser.add_argument("--targets", default="", help=f"some of {','.join(names())}")
    parser.add_argument("--engine", choices=["atheris", "random"], default="", help="what changes inputs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--input", type=Path, help="run this one input of one target")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """The exit status."""
    chosen = options(arguments)
    targets = [name for name in chosen.targets.split(",") if name] or names()
    if unknown := set(targets) - set(names()):
        print(f"targets must be some of {', '.join(names())}, got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    if chosen.input:
        repeat(targets[0], chosen.input)
        return 0
    engine = chosen.engine or ("atheris" if importlib.util.find_spec("atheris") else "random")
    if engine == "random" and not chosen.engine:
        print("atheris is not installed (pip install '.[fuzz]'): inputs change at random", file=sys.stderr)
    planned = jobs(chosen.inputs, targets, engine)
    print(_FORM.format(*_HEAD), flush=True)
    tallies = []
    for name, own, inputs in planned:
        share = inputs / sum(count for *_, count in planned)
        seconds = chosen.minutes * 60 * share if chosen.minutes else 1e9
        tallies.append(run_job(name, own, inputs, seconds, chosen.seed, chosen.out.absolute()))
        print(row(tallies[-1]), flush=True)
    total = whole(tallies)
    print(row(total), flush=True)
    kept = True
    if not chosen.targets and Path("/proc/self/clear_refs").exists():
        print()
        kept = report(chosen.out.absolute())
    for kind, path in total.failures.items():
        print(f"FAILED {kind}\n       {path}")
    return 0 if kept and not total.failures else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
