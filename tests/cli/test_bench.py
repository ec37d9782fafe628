"""`fedloom bench` and `fedloom mask`, as a person or a script meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from fedloom.simulations.fleet import EMBEDDED_MODEL

Fedloom = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("family", ["sketch", "rademacher", "gaussian"])
def test_rebuild_prints_what_a_script_reads(fedloom: Fedloom, family: str) -> None:
    size = ("--params", 300_000, "--k", 8, "--threads", 1, "--repeats", 1)
    code, out, _ = fedloom("bench", "rebuild", *size, "--family", family, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["params"], found["k"], found["threads"], found["family"]) == (300_000, 8, 1, family)
    assert min(found[key] for key in ("seconds", "floor_seconds", "reference_seconds_per_seed")) > 0


def test_step_measures_all_sides_on_one_model(fedloom: Fedloom) -> None:
    size = ("--batch", 2, "--length", 16, "--threads", 1, "--repeats", 1, "--k", 256)
    code, out, _ = fedloom("bench", "step", "--model", EMBEDDED_MODEL, *size, "--no-memory", "--json")
    found = json.loads(out)
    assert code == 0
    assert set(found["seconds"]) == {"inference", "zeroth_order", "mezo", "backward", "subspace", "adamw"}
    assert found["optimizer_and_gradient_bytes"] < found["adamw_optimizer_and_gradient_bytes"]


@pytest.mark.parametrize(("strategy", "bits"), [("fedkseed", 2), ("decomfl", 2), ("fedkseed_pro", 1), ("sketch", 0)])
def test_a_round_of_200_steps_fits_two_kilobytes(fedloom: Fedloom, strategy: str, bits: int) -> None:
    """The goal: K = 4096, 200 local steps, up and down together; the published exchange takes 17,984 bytes."""
    code, out, _ = fedloom("bench", "wire", "--strategy", strategy, "--downlink-bits", bits, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["total"] == found["up"] + found["down"] < 2000
    assert found["published_total"] == 17_984
    assert found["step_error"] < 0.02


def test_a_list_of_directions_costs_its_bits_alone(fedloom: Fedloom) -> None:
    """FedKSeed-Pro's server lists each device's directions: 200 indices of 12 bits, and one weight for all."""
    down = [
        json.loads(fedloom("bench", "wire", "--strategy", name, "--json")[1])["down"]
        for name in ("fedkseed", "fedkseed_pro")
    ]
    assert 300 + 4 < down[1] - down[0] < 300 + 4 + 60


def test_figures_also_come_as_a_table(fedloom: Fedloom) -> None:
    code, out, _ = fedloom("bench", "wire")
    assert code == 0
    assert "published_total" in out
    assert "17,984" in out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("rebuild", "--k", 1000), "a sketch must have a power of two of buckets, got 1000"),
        (("rebuild", "--family", "gausian"), "must be one of gaussian, rademacher, sketch, got 'gausian'"),
        (("step", "--model", "nowhere/at/all"), "model.path must be a folder or a Hugging Face id"),
        (("wire", "--wire", "int4"), "wire must be one of fp32, fp16, bf16, int8, got 'int4'"),
        (("wire", "--strategy", "fedkseeed"), "unknown strategy 'fedkseeed': did you mean 'fedkseed'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(fedloom: Fedloom, arguments: tuple[object, ...], why: str) -> None:
    code, _, err = fedloom("bench", *arguments)
    assert code == 2
    assert why in err
    assert err.count("\n") == 1


def test_a_mask_is_made_and_a_run_tunes_it(fedloom: Fedloom, tmp_path: Path) -> None:
    mask = tmp_path / "mask.safetensors"
    small = ("--set", "data.train_scale=0.1", "--set", "train.batch_size=4")
    code, out, _ = fedloom("mask", "quick", "--out", mask, "--share", 0.002, *small, "--json")
    made = json.loads(out)
    assert code == 0
    assert made["weights"] == sum(len(index) for index in load_file(mask).values()) == round(0.002 * made["of"])
    recipe = ("strategy.name=sketch", "strategy.scope=mask", "strategy.k=256", f"model.mask={mask}", "server.rounds=1")
    settings = [part for setting in (*recipe, "train.steps=1", "data.test_size=2") for part in ("--set", setting)]
    code, _, err = fedloom("run", "quick", "--out", tmp_path / "run", *small, *settings)
    assert (code, err) == (0, "")
    code, out, _ = fedloom("export", tmp_path / "run", "--format", "merged", "--to", tmp_path / "merged")
    assert code == 0
    changed = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(EMBEDDED_MODEL / "model.safetensors")
    moved = sum(int((changed[name] != base[name]).sum()) for name in base)
    assert 0 < moved <= made["weights"]
    code, _, err = fedloom("export", tmp_path / "run", "--to", tmp_path / "adapter")
    assert code == 2
    assert "must be exported whole (format merged), got format peft" in err
