"""A recipe, parsed: one section per concern, every field documented where it is defined.

`fedloom recipes --reference` prints these fields; docs/recipes.md is generated from them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedloom.protocols.sections import Section, build_section, read_toml

Wire = Literal["fp32", "fp16", "bf16", "int8"]


class Model(Section):
    """The public base model that every device holds."""

    path: str = "embedded"
    """`embedded`, a folder, or any Hugging Face id, as `from_pretrained` takes it."""
    task: Literal["causal", "classify"] = "causal"
    """`causal` (language modelling) or `classify` (sequence classification)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The dtype that the base is held in."""
    labels: Annotated[int, Field(ge=2)] | Annotated[tuple[str, ...], Field(min_length=2)] = 2
    """For `classify`: how many classes (labels are then 0, 1, ...), or their names."""
    device: str = "auto"
    """Torch device; `auto` takes CUDA where there is one."""
    mask: str = ""
    """A file of the weights that strategies with scope `mask` tune; `fedloom mask` makes it."""
    describe: Literal["nothing", "shapes", "units"] = "nothing"
    """What a device tells the server of its model beside the adapted matrices: `shapes`, by which memory and time are
    predicted (fedpipe needs them), or also the `units` (heads and channels) that can be removed (fedspine)."""


class Data(Section):
    """The private data, and how it becomes tokens."""

    source: str = "household"
    """`household` (the embedded task), or a JSONL or CSV file."""
    max_length: int = Field(default=128, ge=8)
    """Longest sequence in tokens; prompts are cut from the left, completions never."""
    test_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of each device's examples held out for evaluation (files only; `household` has its own held-out set)."""
    limit: int = Field(default=0, ge=0)
    """Read at most this many examples of a file; 0 reads all."""
    train_scale: float = Field(default=1.0, gt=0)
    """Multiplies the amount of training data of each embedded household."""
    test_size: int = Field(default=30, ge=1)
    """Held-out requests per embedded household."""


class Fleet(Section):
    """The pretend devices of a simulation."""

    devices: int = Field(default=20, ge=1)
    """How many devices."""
    ranks: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (32, 16, 16, 8, 8, 4, 4, 2)
    """The largest adapter rank each device can train, repeated over the fleet."""
    capabilities: Annotated[tuple[Literal["backprop", "forward"], ...], Field(min_length=1)] = ("backprop",)
    """What each device can run, repeated over the fleet: `backprop`, or `forward` for forward passes alone."""
    profiles: tuple[str, ...] = ()
    """What kind each device is, repeated over the fleet (jetson-tx2, phone, ...): its seconds on a virtual clock."""
    memory_mb: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Megabytes that each device lends, repeated over the fleet: a task that needs more runs out of memory. Unset: as
    much as its profile has, or no limit."""
    drift: float = Field(default=0.0, ge=0)
    """How much devices' speed varies from round to round: the deviation of its logarithm."""
    partition: Literal["natural", "iid", "dirichlet", "key", "quantity"] = "natural"
    """How a file's examples are dealt out; `natural` keeps the embedded households as they are."""
    alpha: float = Field(default=0.5, gt=0)
    """Concentration for `dirichlet` (over labels) and `quantity` (over amounts); smaller is more unequal."""
    key: str = ""
    """The column that names an example's owner, for `key`."""


class Lora(Section):
    """The adapters."""

    targets: Literal["auto"] | tuple[str, ...] = "auto"
    """Module names that get an adapter (suffixes, as in peft); `auto` finds every linear layer but the output head."""
    alpha: float | None = Field(default=None, gt=0)
    """LoRA alpha; unset means 2 x rank, so that unequal ranks share one scale."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) in place of alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""


class Train(Section):
    """What one device does in one round."""

    tuner: str = "auto"
    """The local algorithm; `fedloom tuners` lists them; `auto` leaves it to the strategy."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Local optimiser."""
    lr: float = Field(default=3e-3, gt=0)
    """Local learning rate."""
    steps: int = Field(default=8, ge=1)
    """Local optimiser steps in a round."""
    batch_size: int = Field(default=8, ge=1)
    """Examples in one forward pass."""
    accumulate: int = Field(default=1, ge=1)
    """Forward passes whose gradients add up to one optimiser step."""
    clip: float = Field(default=1.0, ge=0)
    """Largest gradient norm; 0 does not clip."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay (AdamW) or L2 (SGD)."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum of SGD."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls over the rounds, to zero after the last."""
    estimator: Literal["spsa", "fzoo"] = "spsa"
    """How `zeroth_order` estimates a gradient: `spsa`, two-sided differences; `fzoo`, one-sided ones, divided by the
    spread of the losses."""
    directions: int = Field(default=1, ge=1)
    """Directions of one zeroth-order step; `fzoo` needs at least 2."""
    eps: float = Field(default=1e-3, gt=0)
    """How far zeroth-order steps perturb the weights."""
    zo_lr: float | None = Field(default=None, gt=0)
    """Learning rate of `zeroth_order` where it differs from lr, as in fleets of both kinds."""


class StrategyTable(BaseModel):
    """How updates merge. Keys beside these are the strategy's own options: `fedloom strategies NAME` lists them."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True, allow_inf_nan=False)

    name: str = "fedloom"
    """The strategy; `fedloom strategies` lists them."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Server(Section):
    """Rounds."""

    rounds: int = Field(default=10, ge=1)
    """How many rounds."""
    cohort: int = Field(default=0, ge=0)
    """Devices drawn for each round; 0 takes all."""
    min_updates: int = Field(default=1, ge=1)
    """A round with fewer good updates, or reports of too little memory, is an error: it keeps the state and stops."""
    mode: Literal["sync", "buffered"] = "sync"
    """`sync`: a round waits for its cohort; `buffered`: a round is the first `buffer` updates, others go on."""
    buffer: int = Field(default=10, ge=1)
    """Good updates that make a round in mode `buffered`, weighted by 1 / sqrt(1 + age in versions)."""
    over_select: float = Field(default=1.0, ge=1, le=10)
    """Ask this many times the cohort; its first `cohort` good updates make the round, later ones are not waited for."""
    timeout: float = Field(default=3600.0, gt=0)
    """Seconds to wait for a device's answer; the round goes on with those that came."""
    retries: int = Field(default=0, ge=0)
    """How often a round with too few good updates is tried again before the run stops."""
    retry_seconds: float = Field(default=10.0, ge=0)
    """Seconds before a round is tried again."""
    quarantine_after: int = Field(default=0, ge=0)
    """Rounds in a row without a good answer after which a device sits out; 0: never."""
    quarantine_rounds: int = Field(default=5, ge=1)
    """How many rounds it sits out."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many of the latest checkpoints stay on disk."""


class WireTable(Section):
    """How tensors travel."""

    up: Wire = "fp32"
    """Dtype of what devices send: fp32, fp16, bf16, or int8 with stochastic rounding."""
    down: Wire = "fp32"
    """Dtype of what the server sends."""
    limit_mb: int = Field(default=512, ge=1)
    """A message larger than this is refused before it is read."""


class Evaluation(Section):
    """How the model is judged on each device's held-out examples."""

    every: int = Field(default=1, ge=0)
    """Evaluate after every n-th round, and always before the first and after the last; 0 for only those two."""
    metric: Literal["auto", "exact_match", "token_accuracy", "accuracy", "rouge_l", "loss"] = "auto"
    """What runs are compared by; `auto` is exact match for `causal` and accuracy for `classify`."""
    batch_size: int = Field(default=64, ge=1)
    """Examples in one forward pass."""
    rouge: bool = False
    """Also generate, and report Rouge-L and exact match of the generated text."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest generation, for `rouge`."""


class Track(Section):
    """Where metrics go, beside metrics.jsonl, which is always written."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb_project: str = ""
    """Log to this Weights & Biases project (needs `wandb` installed)."""
    mlflow_uri: str = ""
    """Log to this MLflow tracking URI (needs `mlflow` installed)."""


class Simulation(Section):
    """How pretend devices run on this machine."""

    workers: int = Field(default=0, ge=0)
    """Worker processes that each hold the model once; 0 runs the devices in this process."""
    threads: int = Field(default=1, ge=1)
    """Torch threads in each process."""
    keep_devices: bool = True
    """Keep the models that devices hold after the last round, so that a run with more rounds goes on to the same bytes;
    false frees the disk, and devices then start again from the base."""


class Contender(Section):
    """One line of a comparison: a label and the settings that differ from the recipe."""

    label: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._+-]{0,63}$")
    """Its name in tables and plots, and its folder."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys to override, for example {"strategy.name" = "flora"}."""


class RunConfig(Section):
    """A whole recipe."""

    name: str = "run"
    """What the run is called."""
    about: str = ""
    """One line on what the recipe shows, for `fedloom recipes`."""
    seed: int = Field(default=0, ge=0)
    """The seed that every random choice derives from."""
    model: Model = Model()
    data: Data = Data()
    fleet: Fleet = Fleet()
    lora: Lora = Lora()
    train: Train = Train()
    strategy: StrategyTable = StrategyTable()
    server: Server = Server()
    wire: WireTable = WireTable()
    eval: Evaluation = Evaluation()
    track: Track = Track()
    simulation: Simulation = Simulation()
    compare: tuple[Contender, ...] = ()
    """Run the recipe once for each of these, on the same devices, and report them side by side."""


def build_config(table: Mapping[str, Any]) -> RunConfig:
    """Validate a parsed recipe.

    Raises:
        ValueError: one line that names the key, what it must be and what was got.
    """
    return build_section(RunConfig, table, "recipe")


def _literal(text: str) -> Any:
    """The TOML value that `text` spells, or the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def override(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested table with dotted keys set; a table as a value is merged key by key.

    Raises:
        ValueError: for a dotted key whose section is no table.
    """
    result: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in table.items()}
    for dotted, value in _flat(changes):
        *sections, leaf = dotted.split(".")
        inner = result
        for section in sections:
            if not isinstance(inner.get(section, {}), Mapping):
                raise ValueError(f"recipe key {dotted!r}: {section!r} must be a section, got {inner[section]!r}")
            inner[section] = dict(inner.get(section, {}))
            inner = inner[section]
        inner[leaf] = value
    return result


def _flat(changes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested changes as dotted ones."""
    for key, value in changes.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """`["train.lr=0.01"]` as {"train.lr": 0.01}.

    Raises:
        ValueError: for a setting without `=`.
    """
    changes: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"a setting must be key=value, got {setting!r}")
        changes[key.strip()] = _literal(text.strip())
    return changes


def read_recipe(path: Path, settings: Iterable[str] = ()) -> RunConfig:
    """Read a TOML recipe and apply `key=value` settings to it.

    Raises:
        ValueError: for a missing file, malformed TOML, an unknown key or a bad value.
    """
    return build_config(override(read_toml(path, "recipe"), parse_settings(settings)))


def contenders(config: RunConfig) -> list[tuple[str, RunConfig]]:
    """The runs that a recipe stands for: one, or one for each line of its comparison."""
    if not config.compare:
        return [(config.strategy.name, config)]
    labels = [contender.label for contender in config.compare]
    if len(set(labels)) != len(labels):
        raise ValueError(f"labels of a comparison must differ, got {labels}")
    base = config.model_dump(exclude={"compare"}, exclude_unset=True)
    runs = [(contender.label, build_config(override(base, contender.set))) for contender in config.compare]
    if any(run.eval.metric != config.eval.metric or run.model.task != config.model.task for _, run in runs):
        raise ValueError("every line of a comparison must have the same eval.metric and model.task")
    return runs
