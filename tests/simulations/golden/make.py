"""Write the golden values of a three-round run: python tests/simulations/golden/make.py

Bytes are exact on every machine. Losses and the patch's norm are not, since CPUs round differently: the test holds them
to a tolerance.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from fedloom.protocols.config import read_recipe
from fedloom.server.app import build_strategy
from fedloom.server.checkpoint import latest_checkpoint
from fedloom.simulations.cookbook import find_recipe
from fedloom.simulations.runs import run_recipe
from fedloom.strategies.lowrank import payload_norm

GOLDEN = Path(__file__).parent / "quick.json"


def measure(out: Path) -> dict[str, Any]:
    """The values of the recipe `quick`."""
    config = read_recipe(find_recipe("quick"), ["track.tensorboard=false"])
    run_recipe(config, out)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    checkpoint, _ = latest_checkpoint(out / "checkpoints")
    if checkpoint is None:
        raise ValueError("the run left no checkpoint")
    return {
        "rounds": [
            {
                "loss": record["evaluation"]["loss"],
                "exact_match": record["evaluation"]["exact_match"],
                "train_loss": record.get("train_loss", 0.0),
                "bytes_up": record["bytes_up"],
                "bytes_down": record["bytes_down"],
            }
            for record in records
        ],
        "patch_norm": payload_norm(build_strategy(config).adapter(checkpoint.state)),
        "base_hash": checkpoint.spec.base_hash,
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(measure(Path(folder) / "run"), indent=1) + "\n", encoding="utf-8")
    print(GOLDEN)
