"""How long one round's aggregation takes for a 7B-shaped model: q and v adapters, 100 clients of mixed ranks.

    python benchmarks/aggregate.py                     # 32 layers, d = 4096: 64 matrices: minutes, and 11 GB
    python benchmarks/aggregate.py --layers 2 --json   # 4 matrices, the rest extrapolated

The rounds go through the real `fedloom` strategy, each with the residual of the one before. Beside them: a dense SVD
of one of the same matrices, extrapolated to all. The time that the pretend clients need to make their updates is not
counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from fedloom.protocols.messages import Array, LowRank, MatrixSpec, ModelSpec, Payload, Update
from fedloom.strategies.base import State
from fedloom.strategies.fedloom import Fedloom

RANKS = (64,) * 10 + (32,) * 10 + (16,) * 20 + (8,) * 20 + (4,) * 40  # 100 clients, total rank 1600
SHARED = 256  # directions that the clients of a decaying spectrum have in common
FULL = 64  # matrices of 32 layers


class Clients:
    """Pretend clients that answer one matrix at a time, the same for the same seed, and the seconds they took."""

    def __init__(self, layers: int, d: int, spectrum: str) -> None:
        self.d, self.spectrum, self.seconds = d, spectrum, 0.0
        names = [f"layers.{i}.{kind}" for i in range(layers) for kind in ("q", "v")]
        self.spec = ModelSpec(base_hash="7b", matrices={name: MatrixSpec(d_out=d, d_in=d) for name in names})
        self._bases: dict[int, Array] = {}

    def _rows(self, key: tuple[int, ...], rank: int, side: int) -> Array:
        rng = np.random.Generator(np.random.SFC64(key))
        noise = rng.standard_normal((rank, self.d), dtype=np.float32)
        if self.spectrum == "flat":
            return noise
        if side not in self._bases:
            basis = np.random.Generator(np.random.SFC64(side)).standard_normal((SHARED, self.d), dtype=np.float32)
            self._bases[side] = basis * np.arange(1, SHARED + 1, dtype=np.float32)[:, None] ** np.float32(-0.5)
        mix = rng.standard_normal((rank, SHARED), dtype=np.float32)
        return mix @ self._bases[side] + np.float32(0.3) * noise

    def term(self, round: int, client: int, module: int) -> LowRank:
        """One client's factors of one matrix."""
        rank = RANKS[client]
        b = self._rows((round, client, module, 0), rank, 0)
        a = self._rows((round, client, module, 1), rank, 1)
        return LowRank(b=np.ascontiguousarray(b.T) * np.float32(0.01), a=a, alpha=2.0 * rank)

    def updates(self, round: int) -> Iterator[Update]:
        """Every client's update, made when it is asked for."""
        for client in range(len(RANKS)):
            start = time.perf_counter()
            factors = {name: self.term(round, client, i) for i, name in enumerate(self.spec.matrices)}
            update = Update(device=f"c{client}", round=round, examples=10 + client, payload=Payload(factors=factors))
            self.seconds += time.perf_counter() - start
            yield update

    def dense(self, round: int, module: int) -> Array:
        """The exact mean of one matrix."""
        weights = np.arange(10, 10 + len(RANKS), dtype=np.float32)
        terms = [self.term(round, client, module) for client in range(len(RANKS))]
        b = np.concatenate([t.b for t in terms], axis=1)
        a = np.concatenate([t.a * (w * t.scale / weights.sum()) for t, w in zip(terms, weights, strict=True)])
        product: Array = b @ a
        return product


def one_round(strategy: Fedloom, clients: Clients, state: State, round: int) -> tuple[State, float]:
    """The next state, and the seconds without those of the clients."""
    before, start = clients.seconds, time.perf_counter()
    state = strategy.aggregate(state, clients.updates(round))
    return state, time.perf_counter() - start - (clients.seconds - before)


def dense_svd(clients: Clients, sent: LowRank) -> dict[str, float]:
    """Seconds of a dense SVD of the first matrix, and how far the strategy's answer is from it."""
    m = clients.dense(0, 0)
    start = time.perf_counter()
    u, s, v = np.linalg.svd(m, full_matrices=False)
    seconds = time.perf_counter() - start
    best = (u[:, : sent.rank] * s[: sent.rank]) @ v[: sent.rank]
    optimum = float(np.linalg.norm(m - best))
    return {
        "seconds": seconds,
        "relative_difference": float(np.linalg.norm(sent.dense() - best) / np.linalg.norm(best)),
        "error_above_best": float(np.linalg.norm(m - sent.dense())) / optimum - 1.0,
        "largest_value_difference": float(np.max(np.abs(np.linalg.norm(sent.b, axis=0) - s[: sent.rank])) / s[0]),
        "value_at_cap_over_largest": float(s[sent.rank - 1] / s[0]),
        "energy_kept": float(1 - optimum**2 / np.sum(s.astype(np.float64) ** 2)),
    }


def machine() -> dict[str, Any]:
    """The machine's facts."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "load_before": os.getloadavg()[0],
        "numpy": np.__version__,
    }


def measure(layers: int, d: int, cap: int, spectrum: str, *, rounds: int, svd: bool) -> dict[str, Any]:
    """The rounds, and the dense SVD beside them."""
    result: dict[str, Any] = {"machine": machine(), "layers": layers, "d": d, "cap": cap, "spectrum": spectrum}
    clients, strategy = Clients(layers, d, spectrum), Fedloom(rank_cap=cap)
    np.ones((256, 256), np.float32) @ np.ones((256, 256), np.float32)  # wakes the BLAS threads
    state, result["rounds"] = strategy.init(clients.spec, 0), []
    sent: LowRank | None = None
    for round in range(rounds):
        state, seconds = one_round(strategy, clients, state, round)
        result["rounds"].append({"seconds": seconds, "peak_rss_gb": peak_gb()})
        sent = sent or strategy.adapter(state).factors[next(iter(clients.spec.matrices))]
    matrices = 2 * layers
    for entry in result["rounds"]:
        entry["per_matrix"] = entry["seconds"] / matrices
        entry["all_64"] = entry["per_matrix"] * FULL
    if svd and sent is not None:
        result["dense_svd"] = dense_svd(clients, sent)
        result["dense_svd"]["all_64"] = result["dense_svd"]["seconds"] * FULL
        result["times_faster"] = [result["dense_svd"]["seconds"] / entry["per_matrix"] for entry in result["rounds"]]
    return result


def peak_gb() -> float:
    """Peak resident memory of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def show(result: dict[str, Any]) -> None:
    """The result as lines."""
    facts = result["machine"]
    print(f"{facts['cpu']}, {facts['cores']} cores, threads {facts['threads']}, load {facts['load_before']:.1f} before")
    print(
        f"{2 * result['layers']} matrices of {result['d']} x {result['d']}, {len(RANKS)} clients, "
        f"total rank {sum(RANKS)} capped to {result['cap']}, {result['spectrum']} spectrum"
    )
    for i, entry in enumerate(result["rounds"]):
        what = f"round {i + 1}" + (" (with a residual)" if i else "")
        made = "" if 2 * result["layers"] == FULL else f", {entry['all_64']:.0f} s for {FULL} (extrapolated)"
        print(
            f"{what}: {entry['seconds']:.1f} s, {entry['per_matrix']:.2f} s a matrix{made}, "
            f"peak RSS {entry['peak_rss_gb']:.1f} GB"
        )
    if "dense_svd" in result:
        svd = result["dense_svd"]
        print(f"dense SVD: {svd['seconds']:.1f} s a matrix, {svd['all_64']:.0f} s for {FULL} (extrapolated)")
        print(f"times faster: {', '.join(f'{x:.0f}' for x in result['times_faster'])}")
        print(
            f"against the dense SVD: relative difference {svd['relative_difference']:.1e}, error above the best "
            f"{svd['error_above_best']:.1e}, energy kept {svd['energy_kept']:.3f}"
        )


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=32, help="transformer layers, two matrices each")
    parser.add_argument("--d", type=int, default=4096, help="width of a matrix")
    parser.add_argument("--cap", type=int, default=64, help="rank cap of the delta")
    parser.add_argument("--rounds", type=int, default=2, help="rounds; from the second on there is a residual")
    parser.add_argument("--spectrum", choices=("decaying", "flat"), default="decaying", help="flat is the hardest case")
    parser.add_argument("--no-svd", action="store_true", help="leave out the dense SVD (a minute)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    result = measure(args.layers, args.d, args.cap, args.spectrum, rounds=args.rounds, svd=not args.no_svd)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)


if __name__ == "__main__":
    main()
