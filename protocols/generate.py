"""Generate the protobuf code from the .proto files, with its stubs, or check that the committed files are current.

    python -m fedloom.protocols.generate [--check]

Needs grpcio-tools, at the version that pyproject.toml names for development: a newer one would write code that the
protobuf runtime we run on refuses.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
MESSAGES = "fedloom.proto"  # what a server and its devices say to each other
SERVICE = "agent.proto"  # what a device's agent answers on its socket
OUTPUTS = ("fedloom_pb2.py", "fedloom_pb2.pyi", "agent_pb2.py", "agent_pb2.pyi", "agent_pb2_grpc.py")
_STUB_HEADER = '# mypy: disable-error-code="type-arg"\n'  # protoc writes a bare Mapping


def generate() -> dict[str, str]:
    """The text of each generated file.

    Raises:
        RuntimeError: where grpcio-tools is absent or refuses a .proto file.
    """
    if importlib.util.find_spec("grpc_tools") is None:
        raise RuntimeError("generating protobuf code needs grpcio-tools: pip install -e '.[dev]'")
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"--python_out={folder}", f"--pyi_out={folder}"]
        _protoc(*outputs, f"fedloom/protocols/{MESSAGES}", f"fedloom/protocols/{SERVICE}")
        _protoc(f"--grpc_python_out={folder}", f"fedloom/protocols/{SERVICE}")
        made = Path(folder, "fedloom", "protocols")
        texts = {name: (made / name).read_text(encoding="utf-8") for name in OUTPUTS}
    return {name: _STUB_HEADER + text if name.endswith(".pyi") else text for name, text in texts.items()}


def _protoc(*arguments: str) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-Ifedloom/protocols={HERE}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"protoc must accept {MESSAGES} and {SERVICE}, got: {done.stderr.strip()}")


def stale(fresh: dict[str, str], folder: Path = HERE) -> list[str]:
    """Names of the files in `folder` that are missing or differ from `fresh`."""
    paths = {name: folder / name for name in fresh}
    return [name for name, path in paths.items() if not path.is_file() or path.read_text("utf-8") != fresh[name]]


def main(arguments: list[str] | None = None) -> int:
    """Write the generated files, or with --check only compare them; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fedloom.protocols.generate", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a committed file is not current")
    options = parser.parse_args(arguments)
    try:
        fresh = generate()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    if not options.check:
        for name, text in fresh.items():
            (HERE / name).write_text(text, encoding="utf-8")
        return 0
    names = stale(fresh)
    if names:
        print(f"{', '.join(names)}: not current; run `python -m fedloom.protocols.generate`", file=sys.stderr)
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main())
