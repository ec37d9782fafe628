"""Profiles and drift."""

from __future__ import annotations

import numpy as np
import pytest

from fedloom.simulations.devices import EFFICIENCY, PROFILES, Profile, drifted, profile


def test_the_vendors_order_is_kept() -> None:
    tx2, nx, agx = (PROFILES[name] for name in ("jetson-tx2", "jetson-xavier-nx", "jetson-agx-xavier"))
    assert tx2.speed.rate < nx.speed.rate < agx.speed.rate
    assert tx2.speed.rate == pytest.approx(1.33e12 * EFFICIENCY)
    assert tx2.available == 6_500_000_000
    assert agx.memory == 4 * nx.memory


def test_transfer_counts_bits() -> None:
    device = Profile(name="d", peak=1, memory=1, down=8e6, up=4e6)
    assert device.transfer(1e6, 1e6) == (1.0, 2.0)
    assert device.available == 0


def test_drift_has_mean_one_and_hangs_on_no_other_draw() -> None:
    base = profile("phone")
    rates = [drifted(base, seed=1, index=i, round=5, compute=0.5).speed.rate / base.speed.rate for i in range(4000)]
    assert np.mean(rates) == pytest.approx(1.0, abs=0.03)
    assert np.std(np.log(rates)) == pytest.approx(0.5, abs=0.02)
    again = drifted(base, seed=1, index=7, round=5, compute=0.5)
    assert again.speed.rate / base.speed.rate == rates[7]
    assert again.down == base.down
    assert drifted(base, seed=1, index=7, round=6, compute=0.5) != again
    assert drifted(base, seed=1, index=7, round=5) == base


def test_bad_profiles() -> None:
    with pytest.raises(ValueError, match=r"unknown device profile 'jetson-tx3': did you mean 'jetson-tx2'\?"):
        profile("jetson-tx3")
    with pytest.raises(ValueError, match="memory of d must be > 0, got 0"):
        Profile(name="d", peak=1, memory=0, down=1, up=1)
    with pytest.raises(ValueError, match="drift must be >= 0"):
        drifted(profile("phone"), seed=0, index=0, round=0, link=-1)
