"""Pretend devices by what their makers publish: operations a second, memory, and a link.

Peak figures are float16 ones. Of the Jetsons, cores, clocks and memory were read in what is published: the data sheet
of the Xavier NX (DA-09366-001: 384 cores, 1100 MHz, 8 GB), public lists of hardware of the others (TX2: 1.33 TFLOPS,
8 GB; AGX Xavier: 512 cores, 1.3 TFLOPS in float32). Those of servers are quoted from memory. A training step of a
language model reaches a fraction of that: `EFFICIENCY`, assumed and the same for all, so that ratios between devices
are the vendors'. What an operating system and other programs take of shared memory is `RESERVED`, assumed too. Links
are assumptions, all of them: 802.11ac indoors for what has an antenna, and two home and office lines.

    jetson-tx2         1.33 TFLOPS fp16, 8 GB      NVIDIA, Jetson TX2 data sheet (256 Pascal cores)
    jetson-xavier-nx   0.845 x 2 TFLOPS fp16, 8 GB NVIDIA, Jetson Xavier NX data sheet (384 Volta cores, 1.1 GHz)
    jetson-agx-xavier  1.41 x 2 TFLOPS fp16, 32 GB NVIDIA, Jetson AGX Xavier data sheet (512 Volta cores, 1.377 GHz)
    server-t4          65 TFLOPS fp16, 16 GB       NVIDIA, T4 data sheet (tensor cores)
    server-a100        312 TFLOPS fp16, 80 GB      NVIDIA, A100 data sheet (tensor cores)

Of the Xaviers, twice cores x clock x 2 (fused multiply-adds in packed half precision), tensor cores left out: with them
the Xaviers are several times as fast, and a fleet less alike than this one. `phone` and `laptop` are no product: round
numbers of 2023's middle class, to have something slower and something plain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from fedloom.protocols.sections import nearest
from fedloom.protocols.seeds import derive_seed
from fedloom.strategies.cost import Speed

EFFICIENCY: Final = 0.25  # of the peak, in a training step
RESERVED: Final = 1.5e9  # bytes of the system and of the process itself
GB: Final = 10**9
MBIT: Final = 1e6


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One kind of device, or one device at one moment.

    peak: flop/s; memory: bytes, all of it; down, up: bits a second; overhead: seconds of a step, whatever its size.
    """

    name: str
    peak: float
    memory: int
    down: float
    up: float
    overhead: float = 0.02
    efficiency: float = EFFICIENCY

    def __post_init__(self) -> None:
        for key in ("peak", "memory", "down", "up", "efficiency"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key} of {self.name} must be > 0, got {getattr(self, key)}")

    @property
    def speed(self) -> Speed:
        """What strategies/cost.py computes seconds with."""
        return Speed(rate=self.peak * self.efficiency, overhead=self.overhead)

    @property
    def available(self) -> int:
        """Bytes for the model and its training."""
        return max(0, int(self.memory - RESERVED))

    def transfer(self, down_bytes: float, up_bytes: float) -> tuple[float, float]:
        """Seconds to receive and to send so many bytes."""
        return 8 * down_bytes / self.down, 8 * up_bytes / self.up


_WIFI: Final = {"down": 100 * MBIT, "up": 50 * MBIT}
PROFILES: Final[Mapping[str, Profile]] = {
    profile.name: profile
    for profile in (
        Profile(name="jetson-tx2", peak=1.33e12, memory=8 * GB, **_WIFI),
        Profile(name="jetson-xavier-nx", peak=1.69e12, memory=8 * GB, **_WIFI),
        Profile(name="jetson-agx-xavier", peak=2.82e12, memory=32 * GB, **_WIFI),
        Profile(name="phone", peak=1e12, memory=6 * GB, down=50 * MBIT, up=10 * MBIT),
        Profile(name="laptop", peak=4e12, memory=16 * GB, down=100 * MBIT, up=20 * MBIT),
        Profile(name="server-t4", peak=65e12, memory=16 * GB, down=1000 * MBIT, up=1000 * MBIT, overhead=0.01),
        Profile(name="server-a100", peak=312e12, memory=80 * GB, down=1000 * MBIT, up=1000 * MBIT, overhead=0.01),
    )
}


def profile(name: str) -> Profile:
    """The profile of that name.

    Raises:
        ValueError: for a name that nobody knows.
    """
    if name not in PROFILES:
        raise ValueError(f"unknown device profile {name!r}: {nearest(name, PROFILES)}")
    return PROFILES[name]


def drifted(device: Profile, *, seed: int, index: int, round: int, compute: float = 0.0, link: float = 0.0) -> Profile:
    """A device as it is in one round: other programs, heat and neighbours slow it down or let it go faster.

    Its speed and its link are multiplied by exp(s z - s^2 / 2), z normal, of mean 1: drawn from (seed, index, round)
    alone, so that no draw depends on another and any round can be asked for.

    Args:
        compute, link: the standard deviations s of the logarithms; 0 leaves them alone.

    Raises:
        ValueError: for a negative deviation.
    """
    if compute < 0 or link < 0:
        raise ValueError(f"drift must be >= 0, got compute {compute} and link {link}")
    generator = np.random.Generator(np.random.Philox(key=derive_seed(seed, "drift", index, round)))
    factors = [
        float(np.exp(s * z - s**2 / 2)) for s, z in zip((compute, link), generator.standard_normal(2), strict=True)
    ]
    return replace(
        device, efficiency=device.efficiency * factors[0], down=device.down * factors[1], up=device.up * factors[1]
    )
