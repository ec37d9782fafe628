"""Inputs made by hand to cost as much as they can: what a stranger gets for a message, in time and memory.

    python bombs.py          runs each in a process of its own and prints what it cost

Each must be decoded or refused within its bounds: memory is what the process grew by, protobuf's own included.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_LIMIT: Final = 64 << 20  # bytes of a frame
_NEEDS: Final = {"Task": ("start",), "Update": ("cost", "payload"), "Hello": ("report", "spec")}


@dataclass(frozen=True, kw_only=True)
class Bomb:
    """A frame, and the most that it may cost: seconds of processor time and MB."""

    make: Callable[[], bytes]
    expect: str
    seconds: float
    memory: int


def _varint(number: int) -> bytes:
    made = b""
    while number > 127:
        made, number = made + bytes([number & 127 | 128]), number >> 7
    return made + bytes([number])


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _body(kind: str, field: str, piece: bytes) -> bytes:
    """A frame whose body is one small piece again and again, and what must be there beside it, empty."""
    from fedloom.protocols import fedloom_pb2 as pb
    from fedloom.protocols.framing import BODY_LIMIT, pack

    descriptor = getattr(pb, kind).DESCRIPTOR
    holder, _, name = field.rpartition(".")
    inner = descriptor.fields_by_name[holder].message_type if holder else descriptor
    one = _field(inner.fields_by_name[name].number, piece)
    many = one * ((BODY_LIMIT - 64) // len(one))
    parts = {descriptor.fields_by_name[need].number: b"" for need in _NEEDS[kind]}
    if holder:
        parts[descriptor.fields_by_name[holder].number] = many
    fields = {number: _field(number, value) for number, value in parts.items()}
    if not holder:
        fields[descriptor.fields_by_name[name].number] = many
    body = b"".join(value for _, value in sorted(fields.items()))
    return pack(["Task", "Update", "Hello", "Refusal"].index(kind) + 1, body, [])


def _coefficients(steps: str) -> bytes:
    """2^20 steps in start and in patch: all zero, or of every size there is."""
    import numpy as np

    from fedloom.protocols.codec import encode
    from fedloom.protocols.messages import Coefficients, Patch, Payload, Start, Subspace, Task

    k, rng = 2**20, np.random.default_rng(0)
    drawn = np.zeros(k, np.int64) if steps == "zero" else rng.integers(-(2**52), 2**52, k) >> rng.integers(0, 53, k)
    subspace = Subspace(family="rademacher", k=k, seed=1)
    payload = Payload(coefficients=Coefficients(subspace=subspace, exponent=-60, steps=drawn))
    patch = Patch(base_hash="h", since=0, version=1, payload=payload)
    task = Task(device="d", round=1, rank=1, alpha=1.0, start_from=Start.GIVEN, start=payload, patch=patch)
    return encode(task)


def _scalars(count: int, k: int, *, equal: bool) -> bytes:
    import numpy as np

    from fedloom.protocols.codec import encode
    from fedloom.protocols.messages import Over, Payload, Scalars, Update

    indices = np.arange(count) % k
    values = np.ones(count, np.float32) if equal else np.linspace(-1, 1, count).astype(np.float32)
    payload = Payload(scalars=Scalars(over=Over.POOL, k=k, values=values, indices=indices))
    return encode(Update(device="d", round=1, examples=1, payload=payload), wire="fp32" if equal else "int8")


def _dense(wire: str) -> bytes:
    import numpy as np

    from fedloom.protocols.codec import encode
    from fedloom.protocols.messages import Payload, Update

    values = np.ones((1, 8_000_000), np.float32)
    return encode(Update(device="d", round=1, examples=1, payload=Payload(dense={"w": values})), wire=wire)


def _tensors() -> bytes:
    """As many tensors as there may be, one number each."""
    import numpy as np

    from fedloom.protocols.codec import encode
    from fedloom.protocols.messages import Payload, Update

    one = np.ones(1, np.float32)
    payload = Payload(dense={f"{number:05x}": one for number in range(100_000)})
    return encode(Update(device="d", round=1, examples=1, payload=payload))


def _names() -> bytes:
    from fedloom.protocols.codec import encode
    from fedloom.protocols.messages import DeviceReport, Hello, MatrixSpec, ModelSpec

    matrices = {f"{number:060x}": MatrixSpec(d_out=1, d_in=1) for number in range(100_000)}
    spec = ModelSpec(base_hash="h", matrices=matrices)
    return encode(Hello(report=DeviceReport(device="d", examples=1, rank=1), spec=spec))


def _noise() -> bytes:
    return random.Random(0).randbytes(_LIMIT)


BOMBS: Final[dict[str, Bomb]] = {
    "noise": Bomb(make=_noise, expect="Update", seconds=1, memory=8),
    "metrics without names": Bomb(make=lambda: _body("Update", "metrics", b""), expect="Update", seconds=5, memory=500),
    "factors without tensors": Bomb(
        make=lambda: _body("Update", "payload.factors", b""), expect="Update", seconds=5, memory=500
    ),
    "factors with tensors": Bomb(
        make=lambda: _body("Update", "payload.factors", b"\x2a\0\x32\0"), expect="Update", seconds=5, memory=500
    ),
    "shapes": Bomb(
        make=lambda: _body("Update", "payload.dense", b"\x12\x03\x12\x01\x01"), expect="Update", seconds=5, memory=500
    ),
    "knobs": Bomb(make=lambda: _body("Task", "knobs", b""), expect="Task", seconds=5, memory=500),
    "capabilities": Bomb(
        make=lambda: _body("Hello", "report.capabilities", b""), expect="Hello", seconds=5, memory=500
    ),
    "names": Bomb(make=_names, expect="Hello", seconds=5, memory=300),
    "tensors": Bomb(make=_tensors, expect="Update", seconds=10, memory=500),
    "int8": Bomb(make=lambda: _dense("int8"), expect="Update", seconds=1, memory=100),
    "bf16": Bomb(make=lambda: _dense("bf16"), expect="Update", seconds=1, memory=100),
    "equal scalars": Bomb(make=lambda: _scalars(2**22, 2, equal=True), expect="Update", seconds=3, memory=200),
    "scalars": Bomb(make=lambda: _scalars(2**22, 2**20, equal=False), expect="Update", seconds=3, memory=200),
    "2 x 2^20 zeros": Bomb(make=lambda: _coefficients("zero"), expect="Task", seconds=6, memory=280),
    "2 x 2^20 steps": Bomb(make=lambda: _coefficients("any"), expect="Task", seconds=10, memory=320),
}


def measure(name: str) -> dict[str, Any]:
    """What a bomb costs this process."""
    from fedloom.protocols import messages
    from fedloom.protocols.codec import decode

    bomb = BOMBS[name]
    frame = Path(sys.argv[2]).read_bytes()
    expect: Any = getattr(messages, bomb.expect)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _peak()
    began = time.thread_time()
    try:
        decode(frame, expect, limit=_LIMIT)
        said = "accepted"
    except ValueError as error:
        said = str(error)
    taken = time.thread_time() - began
    return {"bytes": len(frame), "seconds": taken, "memory": _peak() - before, "said": said}


def _peak() -> float:
    """The most memory that this process has had, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def explode(name: str, folder: Path) -> dict[str, Any]:
    """Run one bomb in a process of its own; `problem` says what it broke."""
    path = folder / "bomb.bin"
    path.write_bytes(BOMBS[name].make())
    command = [sys.executable, str(Path(__file__).resolve()), name, str(path)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if process.returncode:
        return {"bytes": 0, "seconds": 0.0, "memory": 0.0, "said": "", "problem": process.stderr.strip()[-500:]}
    cost: dict[str, Any] = json.loads(process.stdout)
    bomb = BOMBS[name]
    over = cost["seconds"] > bomb.seconds or cost["memory"] > bomb.memory or "\n" in cost["said"]
    return cost | {"problem": f"it must take <= {bomb.seconds:g} s and {bomb.memory} MB" if over else ""}


def report(folder: Path) -> bool:
    """Print a table of all; whether each kept its bounds."""
    form = "{:<24} {:>10} {:>9} {:>8} {:>7}  {}"
    print(form.format("bomb", "bytes", "ms", "MB", "x", "outcome"))
    good = True
    for name in BOMBS:
        cost = explode(name, folder)
        times = cost["memory"] * 2**20 / max(cost["bytes"], 1)
        said = (f"FAILED: {cost['problem']}; " if cost["problem"] else "") + cost["said"][:70]
        good &= not cost["problem"]
        print(
            form.format(
                name, cost["bytes"], f"{1000 * cost['seconds']:.0f}", f"{cost['memory']:.0f}", f"{times:.1f}", said
            )
        )
    return good


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        import tempfile

        with tempfile.TemporaryDirectory() as made:
            sys.exit(0 if report(Path(made)) else 1)
