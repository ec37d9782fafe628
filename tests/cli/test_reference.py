"""docs/recipes.md is what the schema says."""

from __future__ import annotations

from pathlib import Path

from fedloom.cli.reference import recipe_reference
from fedloom.protocols.config import RunConfig

DOCS = Path(__file__).parents[2] / "docs"


def test_the_committed_reference_is_current() -> None:
    assert (DOCS / "recipes.md").read_text(encoding="utf-8") == recipe_reference(), "run `make docs`"


def test_every_key_says_what_it_means() -> None:
    for name, field in RunConfig.model_fields.items():
        inner = getattr(field.annotation, "model_fields", {name: field})
        assert all(each.description for each in inner.values()), name
