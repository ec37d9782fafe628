"""The server side: a stock ServerApp whose strategy is one of Fedloom's."""

from pathlib import Path

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedloom.server.flower import FlowerStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds; leave the final arrays in a file."""
    config = context.run_config
    strategy = FlowerStrategy(
        str(config["strategy"]),
        recipe={"train": {"steps": 4, "lr": 0.003}},
        min_available_nodes=int(config["min-nodes"]),
    )
    result = strategy.start(grid=grid, num_rounds=int(config["num-rounds"]))
    out = Path(str(config["out"])).expanduser()
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(out, **{name: array.numpy() for name, array in result.arrays.items()})
