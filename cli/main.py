"""`fedloom ...`: parses, wires the rooms together, prints. A mistake in the input is one line and exit code 2."""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedloom.cli.bench.commands import app as bench
from fedloom.cli.client import app as client
from fedloom.cli.keys import app as keys
from fedloom.cli.plan import plan
from fedloom.cli.server import server

app = typer.Typer(
    name="fedloom",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Fine-tune one language model across many devices whose data never leaves them.\n\n"
        "Start with `fedloom run quick` (a minute), then `fedloom recipes` and `fedloom strategies`."
    ),
)

app.add_typer(bench, name="bench")
app.add_typer(keys, name="keys")
app.add_typer(client, name="client")
app.command()(plan)
app.command()(server)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")]


class ExportFormat(StrEnum):
    """What `export` writes."""

    PEFT = "peft"
    MERGED = "merged"
    PRUNED = "pruned"


def _console() -> Console:
    return Console(stderr=False)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file (.toml), or the name of an embedded one.")],
    out: Annotated[Path | None, typer.Option(help="Folder for results. [default: runs/RECIPE]")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. train.lr=0.01.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Start the run in the folder over.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe on pretend devices, all on this machine.

    Ends with a table, an HTML report and, for the strategy the recipe names, a PEFT adapter. A run that was cut short
    goes on with `--resume` from its last finished round, to the same result.

    Examples: `fedloom run quick`, `fedloom run demo --out runs/demo`,
    `fedloom run my.toml --set strategy.name=flora --set server.rounds=20`.
    """
    from fedloom.cli.finish import finish
    from fedloom.cli.progress import Board
    from fedloom.cli.tables import show_ending
    from fedloom.protocols.config import read_recipe
    from fedloom.simulations.cookbook import find_recipe
    from fedloom.simulations.runs import run_recipe

    path = find_recipe(recipe)
    config = read_recipe(path, set_ or [])
    folder = out or Path("runs") / path.stem
    console = Console(stderr=True) if as_json else _console()
    with Board(console) as board:
        summary = run_recipe(config, folder, resume=resume, force=force, watch=board.watch)
    written = finish(config, folder)
    show_ending(console, summary, written, as_json=as_json)


@app.command()
def strategies(
    name: Annotated[str | None, typer.Argument(help="Show this strategy's options.")] = None, as_json: AsJson = False
) -> None:
    """How updates can merge: one line each, or one strategy's options."""
    from fedloom.cli.tables import show_or_json
    from fedloom.strategies import registry

    if name is None:
        show_or_json(_console(), as_json, "Strategies", ("name", "what it does"), registry.describe())
    else:
        rows = [(option, str(default), doc) for option, default, doc in registry.options(name)]
        show_or_json(_console(), as_json, f"[strategy] name = {name!r}", ("option", "default", "meaning"), rows)


@app.command()
def tuners(as_json: AsJson = False) -> None:
    """How a device can learn: one line each."""
    from fedloom.cli.tables import show_or_json
    from fedloom.client import tuners as registry

    show_or_json(_console(), as_json, "Tuners", ("name", "what it does"), registry.describe())


@app.command()
def recipes(
    reference: Annotated[bool, typer.Option("--reference", help="Print every recipe key, as Markdown.")] = False,
    as_json: AsJson = False,
) -> None:
    """The embedded recipes: one line each. With --reference, every key a recipe can set."""
    from fedloom.cli.reference import recipe_reference
    from fedloom.cli.tables import show_or_json
    from fedloom.simulations.cookbook import recipes as embedded

    if reference:
        print(recipe_reference(), end="")
    else:
        show_or_json(_console(), as_json, "Recipes", ("name", "what it shows"), embedded())


@app.command()
def mask(
    recipe: Annotated[str, typer.Argument(help="A recipe: its model, and as data the public text to measure on.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("mask.safetensors"),
    share: Annotated[float, typer.Option(help="Share of the weights to tune, 0 to 1.")] = 0.001,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. data.source=public.csv."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose the weights that matter most on public text, for strategies with `scope = "mask"`.

    Hand the file to every device with the base (recipe key `model.mask`): all must hold the same one.
    """
    from fedloom.cli.finish import write_public_mask
    from fedloom.protocols.config import read_recipe
    from fedloom.simulations.cookbook import find_recipe

    made = write_public_mask(read_recipe(find_recipe(recipe), set_ or []), out, share)
    if as_json:
        print(json.dumps(made))
    else:
        _console().print(f"{made['file']}: {made['weights']:,} of {made['of']:,} weights, sha256 {made['sha256'][:12]}")


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    format: Annotated[
        ExportFormat, typer.Option(help="A PEFT adapter, the whole model with it merged, or that model cut down.")
    ] = ExportFormat.PEFT,
    to: Annotated[
        Path | None, typer.Option(help="Folder to write. [default: RUN_DIR/adapter, /merged or /pruned]")
    ] = None,
    member: Annotated[str, typer.Option(help="Which line of a comparison. [default: the recipe's strategy]")] = "",
    keep: Annotated[
        Path | None, typer.Option(help="For pruned: JSON with each group's kept units, or such a model's manifest.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="For pruned: the share of heads and channels to remove, without training.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what the folder holds.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a run's global model in a form that `peft` or `transformers` loads.

    A pruned model has layers of unequal widths: `fedloom.client.pruning.saved.load_pruned(FOLDER)` loads it.
    """
    from fedloom.cli.finish import Pruning, export_run

    if format != ExportFormat.PRUNED and (keep is not None or ratio is not None):
        raise ValueError(f"--keep and --ratio go with --format pruned, got format {format.value}")
    pruning = Pruning(keep=keep, ratio=ratio)
    folder = export_run(run_dir, form=format.value, to=to, label=member, force=force, pruning=pruning)
    print(json.dumps({"format": format.value, "folder": str(folder)}) if as_json else folder)


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="The folder of a finished run.")]) -> None:
    """Draw a run's report.html and plots again."""
    from fedloom.simulations.report import write_report

    print(write_report(run_dir))


def main() -> None:
    """The console script."""
    # Before NumPy loads: BLAS rounds differently with another number of threads, and one is also the fastest here.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    try:
        app()
    except ValueError as error:
        print(f"fedloom: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("fedloom: interrupted; `fedloom run ... --resume` goes on from the last finished round", file=sys.stderr)
        raise SystemExit(130) from None
