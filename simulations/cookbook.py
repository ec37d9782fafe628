"""The recipes that ship with the package."""

from __future__ import annotations

from pathlib import Path

from fedloom.protocols.config import read_recipe
from fedloom.protocols.sections import nearest

RECIPES = Path(__file__).parent / "recipes"


def recipes() -> list[tuple[str, str]]:
    """(name, what it shows) of each embedded recipe."""
    return [(path.stem, read_recipe(path).about) for path in sorted(RECIPES.glob("*.toml"))]


def find_recipe(name: str) -> Path:
    """A recipe file: a path that exists, or the name of an embedded one.

    Raises:
        ValueError: naming the nearest embedded recipe.
    """
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():
        return path
    embedded = RECIPES / f"{name}.toml"
    if not embedded.exists():
        known = [path.stem for path in RECIPES.glob("*.toml")]
        raise ValueError(f"no recipe {name!r}: {nearest(name, known)} (a file of your own ends in .toml)")
    return embedded
