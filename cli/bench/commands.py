"""The commands of `fedloom bench`: one table or one JSON object each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, help="Measure what tuning in a subspace costs on this machine.")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")]
K = Annotated[int, typer.Option(help="Directions of the pool, or buckets of the sketch (a power of two).")]
Threads = Annotated[int, typer.Option(min=1, max=256, help="Threads.")]


@app.command()
def rebuild(
    params: Annotated[int, typer.Option(min=1, help="Weights, float32.")] = 22_000_000,
    k: K = 4096,
    threads: Threads = 2,
    family: Annotated[str, typer.Option(help="sketch, rademacher or gaussian.")] = "sketch",
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats, of which the median counts.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Rebuild a model from its coefficients, beside one pass over its memory and beside FedKSeed's way."""
    from fedloom.cli.bench.rebuild import rebuild as measure
    from fedloom.protocols.directions import check_k, known_family

    check_k(k, known_family(family))
    _show(measure(params=params, k=k, threads=threads, family=family, repeats=repeats), as_json)


@app.command()
def step(
    model: Annotated[str, typer.Option(help="A folder or Hugging Face id, or `synthetic` (22M random weights).")] = (
        "synthetic"
    ),
    family: Annotated[str, typer.Option(help="sketch, rademacher or gaussian.")] = "sketch",
    k: K = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Examples of a forward pass.")] = 16,
    length: Annotated[int, typer.Option(min=8, help="Tokens of an example.")] = 64,
    threads: Threads = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats, of which the median counts.")] = 7,
    memory: Annotated[bool, typer.Option(help="Also measure peak memory, in processes of their own.")] = True,
    as_json: AsJson = False,
) -> None:
    """One local step: zeroth order beside two forward passes, first order beside a full backward."""
    from fedloom.cli.bench.step import step as measure
    from fedloom.protocols.directions import check_k, known_family

    check_k(k, known_family(family))
    _show(
        measure(
            model=model, family=family, k=k, batch=batch, length=length, threads=threads, repeats=repeats, memory=memory
        ),
        as_json,
    )


@app.command()
def wire(
    strategy: Annotated[str, typer.Option(help="fedkseed, fedkseed_pro, decomfl or sketch.")] = "fedkseed",
    k: K = 4096,
    steps: Annotated[int, typer.Option(min=1, help="Local steps of a round.")] = 200,
    cohort: Annotated[int, typer.Option(min=1, help="Devices of a round.")] = 5,
    dtype: Annotated[str, typer.Option("--wire", help="Dtype of the scalars: fp32, fp16, bf16 or int8.")] = "int8",
    downlink_bits: Annotated[int, typer.Option(min=0, max=40, help="As the strategies' option.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Bytes of one device and round, counted on real frames, beside the published exchange."""
    from fedloom.cli.bench.wire import wire as measure

    _show(measure(strategy=strategy, k=k, steps=steps, cohort=cohort, wire=dtype, downlink_bits=downlink_bits), as_json)


def _show(figures: Mapping[str, Any], as_json: bool) -> None:
    from fedloom.cli.tables import show

    if as_json:
        print(json.dumps(dict(figures), indent=1))
        return
    show(Console(), "", ("figure", "value"), [(name, _text(value)) for name, value in _flat(figures).items()])


def _flat(figures: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, value in figures.items():
        rows |= _flat(value, f"{prefix}{name} ") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return rows


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
