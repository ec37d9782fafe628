"""Recipes: what they may say, and the line that a mistake gets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fedloom.protocols.config import (
    RunConfig,
    build_config,
    contenders,
    override,
    parse_settings,
    read_recipe,
)
from fedloom.protocols.sections import nearest

RECIPE = """
name = "two"
[strategy]
name = "flora"
stack = 3
[train]
lr = 0.01
[wire]
up = "int8"
[[compare]]
label = "a"
[[compare]]
label = "b"
set = {"strategy.name" = "fedit", "train.lr" = 0.5}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_empty_recipe_is_the_default() -> None:
    assert build_config({}) == RunConfig()


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({"train": {"learning_rat": 1}}, r"unknown recipe key 'learning_rat' in \[train\]: known: .*"),
        ({"train": {"step": 1}}, r"unknown recipe key 'step' in \[train\]: did you mean 'steps'\?"),
        ({"server": {"round": 1}}, r"unknown recipe key 'round' in \[server\]: did you mean 'rounds'\?"),
        ({"trian": {}}, r"unknown recipe key 'trian': did you mean 'train'\?"),
        ({"zzzz": 1}, "unknown recipe key 'zzzz': known: about, compare, data, "),
    ],
)
def test_an_unknown_key_names_its_section_and_the_nearest(table: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build_config(table)


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({"train": {"lr": 0}}, "recipe key 'train.lr': input should be greater than 0, got 0"),
        ({"train": {"lr": "fast"}}, "recipe key 'train.lr': input should be a valid number.*, got 'fast'"),
        ({"train": {"lr": float("inf")}}, "recipe key 'train.lr': input should be a finite number, got inf"),
        ({"wire": {"up": "fp8"}}, "recipe key 'wire.up': input should be 'fp32', 'fp16', 'bf16' or 'int8', got 'fp8'"),
        ({"data": {"test_share": 1.0}}, "recipe key 'data.test_share': input should be less than 1, got 1.0"),
        ({"server": {"rounds": 1.5}}, "recipe key 'server.rounds': .*, got 1.5"),
        ({"seed": -1}, "recipe key 'seed': .* greater than or equal to 0, got -1"),
        ({"train": 3}, "recipe key 'train': .*, got 3"),
        ({"compare": [{"set": {}}]}, "recipe key 'compare.0.label': field required"),
    ],
)
def test_a_bad_value_names_its_key_and_what_was_got(table: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        build_config(table)
    assert "\n" not in str(caught.value)


def test_a_strategy_takes_options_of_its_own() -> None:
    strategy = build_config({"strategy": {"name": "flora", "stack": 3, "deep": {"x": 1}}}).strategy
    assert (strategy.name, strategy.options) == ("flora", {"stack": 3, "deep": {"x": 1}})


def test_nearest_lists_everything_when_nothing_is_close() -> None:
    assert nearest("stpes", ["steps", "lr"]) == "did you mean 'steps'?"
    assert nearest("qqq", ["steps", "lr"]) == "known: lr, steps"


def test_override_sets_dotted_keys_in_a_copy() -> None:
    table = {"train": {"lr": 1, "steps": 2}, "seed": 1}
    changed = override(table, {"train.lr": 5, "seed": 2, "wire.up": "bf16", "strategy.deep.x": 1})
    assert changed == {
        "train": {"lr": 5, "steps": 2},
        "seed": 2,
        "wire": {"up": "bf16"},
        "strategy": {"deep": {"x": 1}},
    }
    assert table == {"train": {"lr": 1, "steps": 2}, "seed": 1}


def test_settings_are_toml_values_or_else_text() -> None:
    settings = [
        "train.lr=1e-3",
        "seed=4",
        "lora.rslora = true",
        "fleet.ranks=[8, 4]",
        "strategy.name=flora",
        "about=a=b",
    ]
    assert parse_settings(settings) == {
        "train.lr": 1e-3,
        "seed": 4,
        "lora.rslora": True,
        "fleet.ranks": [8, 4],
        "strategy.name": "flora",
        "about": "a=b",
    }
    assert parse_settings(["name="]) == {"name": ""}
    assert parse_settings(['name="5"']) == {"name": "5"}


@pytest.mark.parametrize("setting", ["train.lr", "", "=5", " =5"])
def test_a_setting_needs_a_key_and_a_value(setting: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"a setting must be key=value, got {setting!r}")):
        parse_settings([setting])


def test_a_recipe_is_read_and_overridden(tmp_path: Path) -> None:
    config = read_recipe(write(tmp_path, RECIPE), ["train.lr=0.25", "strategy.stack=4", "server.rounds=2"])
    assert (config.name, config.train.lr, config.server.rounds, config.wire.up) == ("two", 0.25, 2, "int8")
    assert config.strategy.options == {"stack": 4}


def test_contenders_differ_from_the_recipe_in_what_they_set(tmp_path: Path) -> None:
    runs = contenders(read_recipe(write(tmp_path, RECIPE)))
    assert [(label, run.strategy.name, run.train.lr) for label, run in runs] == [
        ("a", "flora", 0.01),
        ("b", "fedit", 0.5),
    ]
    assert all(run.wire.up == "int8" and run.name == "two" and not run.compare for _, run in runs)


def test_a_recipe_without_a_comparison_is_one_run() -> None:
    config = build_config({"strategy": {"name": "flora"}})
    assert contenders(config) == [("flora", config)]


def test_labels_of_a_comparison_must_differ() -> None:
    config = build_config({"compare": [{"label": "a"}, {"label": "a"}]})
    with pytest.raises(ValueError, match=r"labels of a comparison must differ, got \['a', 'a'\]"):
        contenders(config)


def test_a_contender_cannot_set_what_does_not_exist() -> None:
    config = build_config({"compare": [{"label": "a", "set": {"train.step": 3}}]})
    with pytest.raises(ValueError, match=r"unknown recipe key 'step' in \[train\]: did you mean 'steps'\?"):
        contenders(config)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"recipe .*none\.toml cannot be read: No such file or directory"):
        read_recipe(tmp_path / "none.toml")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_recipe(tmp_path)


@pytest.mark.parametrize("text", ["name = ", "[train\nlr = 1", "a = 1\na = 2"])
def test_malformed_toml_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"recipe .*recipe\.toml is not TOML: "):
        read_recipe(write(tmp_path, text))


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not TOML"):
        read_recipe(path)
