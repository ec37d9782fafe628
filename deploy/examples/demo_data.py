"""Write the demo's private data as files, one household for each name: what a device of your own would have already.

    python deploy/examples/demo_data.py data home-a home-b home-c

makes data/home-a.jsonl to train on, data/home-a-test.jsonl to be judged by, and so on. A file that is there stays.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedloom.simulations.household.households import household


def main(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        home = household(index, seed=0)
        for path, requests in ((f"{name}.jsonl", home.train), (f"{name}-test.jsonl", home.test)):
            if not (folder / path).exists():
                lines = [json.dumps({"prompt": each.prompt, "completion": each.completion}) for each in requests]
                (folder / path).write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(folder / path)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit("usage: python demo_data.py FOLDER NAME ...")
    main(Path(sys.argv[1]), sys.argv[2:])
