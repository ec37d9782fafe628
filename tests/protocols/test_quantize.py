"""The dtypes of the wire, against closed forms and against torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedloom.protocols.quantize import load, store, stored_bytes


def there_and_back(x: Any, wire: str, axis: int | None = 0, seed: int = 0) -> Any:
    data = b"".join(part.tobytes() for part in store(x, wire, axis=axis, label="x", seed=seed))
    assert len(data) == stored_bytes(wire, x.shape, axis)
    return load(memoryview(data), wire, x.shape, axis=axis, label="x")


def any_floats(count: int, top: float) -> Any:
    bits = np.random.default_rng(1).integers(0, 2**32, count, dtype=np.uint32).view(np.float32)
    return bits[np.isfinite(bits) & (abs(bits) <= top)]


def test_bf16_rounds_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    x = any_floats(400_000, float.fromhex("0x1.fep127"))
    ties = np.arange(0x3F800000, 0x3F900000, 0x8000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([x, ties, -ties, np.float32([0.0, -0.0, 1e-45])])
    expected = torch.from_numpy(x).to(torch.bfloat16).to(torch.float32).numpy()
    np.testing.assert_array_equal(there_and_back(x, "bf16").view(np.uint32), expected.view(np.uint32))


def test_fp16_rounds_as_ieee_half() -> None:
    x = np.concatenate([any_floats(400_000, 65504.0), np.float32([65504.0, -65504.0, 2.0**-25])])
    np.testing.assert_array_equal(there_and_back(x, "fp16"), x.astype(np.float16).astype(np.float32))


def test_fp32_is_exact() -> None:
    x = any_floats(10_000, np.inf)
    np.testing.assert_array_equal(there_and_back(x, "fp32").view(np.uint32), x.view(np.uint32))


def test_int8_is_unbiased() -> None:
    """The mean over n seeds of a value rounded to steps of s has a standard deviation of s sqrt(p (1 - p) / n)."""
    x = np.float32([[1.0, -0.3, 0.001, 0.5, 0.9999, -1.0], [1e-4, 1e-5, -7e-5, 0.0, 3e-5, 2.3e-5]])
    n = 8_000
    mean = np.mean([there_and_back(x, "int8", seed=seed) for seed in range(n)], axis=0, dtype=np.float64)
    step = abs(x).max(axis=1, keepdims=True).astype(np.float64) / 127
    share = np.mod(x / step, 1)
    sigma = step * np.sqrt(share * (1 - share) / n)
    assert (abs(mean - x) <= 5 * sigma + 2e-7 * abs(x)).all()


@pytest.mark.parametrize(("axis", "scales"), [(0, (3, 1)), (1, (1, 4)), (None, (1, 1))])
def test_int8_error_stays_below_one_step_of_its_slice(axis: int | None, scales: tuple[int, int]) -> None:
    x = np.float32(np.random.default_rng(2).standard_normal((3, 4)) * [[1], [1e-3], [1e3]] * [1, 10, 100, 1000])
    others = tuple(place for place in range(2) if place != axis)
    step = abs(x).max(axis=others, keepdims=True).astype(np.float64) / 127
    assert step.shape == scales
    for seed in range(50):
        assert (abs(there_and_back(x, "int8", axis, seed) - x) < step * 1.000001).all()


def test_int8_keeps_multiples_of_its_step_and_extremes() -> None:
    x = np.float32([[127, 64, 1, 0, -127], [0, 0, 0, 0, 0], [1e-44, 0, 0, -1e-44, 0], [1e38, -1e38, 0, 1, 0]])
    for seed in range(20):
        back = there_and_back(x, "int8", seed=seed)
        np.testing.assert_allclose(back[0], x[0], atol=1.0001)
        np.testing.assert_allclose(back[0, [0, 4]], x[0, [0, 4]], rtol=1e-6)
        np.testing.assert_array_equal(back[1], 0)
        assert (abs(back[2] - x[2]) <= 2.0**-126).all()
        np.testing.assert_allclose(back[3, :2], x[3, :2], rtol=1e-6)


def test_int8_streams_do_not_depend_on_the_blocks_they_are_drawn_in(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedloom.protocols import quantize

    x = np.random.default_rng(3).standard_normal((64, 6)).astype(np.float32)
    whole = there_and_back(x, "int8", seed=9)
    monkeypatch.setattr(quantize, "_BLOCK", 12)
    np.testing.assert_array_equal(there_and_back(x, "int8", seed=9), whole)


@pytest.mark.parametrize(
    ("value", "wire", "match"),
    [
        (65505.0, "fp16", r"x must lie within \+-65504 to travel as fp16, got 65505; send it as bf16 or fp32"),
        (-7e4, "fp16", r"\+-65504 .* got 70000"),
        (3.4e38, "bf16", r"x must lie within \+-3.38953\d*e\+38 to travel as bf16"),
        (2e38, "int8", r"x must lie within \+-1.67\d*e\+38 to travel as int8"),
        (1e39, "fp32", r"x must lie within \+-3.4\d*e\+38 to travel as fp32, got 1e\+39"),
        (np.nan, "fp32", r"x must be finite, got nan at \[1, 1\]"),
        (np.inf, "int8", r"x must be finite, got inf at \[1, 1\]"),
        (-np.inf, "fp16", r"x must be finite, got -inf at \[1, 1\]"),
    ],
)
def test_values_that_a_wire_cannot_hold_are_refused(value: float, wire: str, match: str) -> None:
    x = np.zeros((2, 3))
    x[1, 1] = value
    with pytest.raises(ValueError, match=match):
        store(x, wire, axis=0, label="x", seed=0)


def test_only_float_arrays_travel() -> None:
    with pytest.raises(ValueError, match="x must be a float array, got int64"):
        store(np.arange(3), "fp32", axis=0, label="x", seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 0.0, 1e38])
def test_int8_scales_are_bounded(scale: float) -> None:
    data = np.float32([1.0, scale]).tobytes() + bytes(6)
    with pytest.raises(ValueError, match="int8 scales of x must lie within"):
        load(memoryview(data), "int8", (2, 3), axis=0, label="x")


@pytest.mark.parametrize(("wire", "data"), [("fp32", "0000c07f"), ("fp16", "007c0000"), ("bf16", "0000807f")])
def test_received_values_must_be_finite(wire: str, data: str) -> None:
    count = 4 // (4 if wire == "fp32" else 2)
    with pytest.raises(ValueError, match=r"x must be finite, got (nan|inf) at"):
        load(memoryview(bytes.fromhex(data)), wire, (count,), axis=None, label="x")
