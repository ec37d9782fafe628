"""The committed protobuf code is what the .proto files say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from fedloom.protocols import generate

needs_tools = pytest.mark.skipif(
    importlib.util.find_spec("grpc_tools") is None, reason="grpcio-tools (a development dependency) is not installed"
)


@needs_tools
def test_committed_code_is_current() -> None:
    assert generate.main(["--check"]) == 0


@needs_tools
def test_a_stale_file_of_either_proto_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = generate.generate()
    assert set(fresh) == set(generate.OUTPUTS)
    other = fresh | {"fedloom_pb2.py": "other", "agent_pb2_grpc.py": "other"}
    monkeypatch.setattr(generate, "generate", lambda: other)
    assert generate.main(["--check"]) == 1
    message = "fedloom_pb2.py, agent_pb2_grpc.py: not current; run `python -m fedloom.protocols.generate`\n"
    assert capsys.readouterr().err == message


@needs_tools
def test_a_proto_that_protoc_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "SERVICE", "absent.proto")
    with pytest.raises(RuntimeError, match=r"protoc must accept fedloom.proto and absent.proto, got: .*absent.proto"):
        generate.generate()


def test_missing_files_are_stale(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x")
    assert generate.stale({"a.py": "x", "b.py": "x"}, tmp_path) == ["b.py"]


def test_without_grpcio_tools_the_error_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert generate.main(["--check"]) == 1
    assert "generating protobuf code needs grpcio-tools: pip install -e '.[dev]'" in capsys.readouterr().err
