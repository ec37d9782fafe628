"""Files of examples, and the one line that each kind of bad file gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedloom.client.data import Example
from fedloom.client.readers import read_examples


def _file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_jsonl(tmp_path: Path) -> None:
    text = (
        '{"prompt": "a", "completion": "b", "who": 7, "label": 2}\n\n{"prompt": "c", "completion": "d", "who": "x"}\n'
    )
    path = _file(tmp_path, "data.jsonl", text)
    assert read_examples(path, task="causal", key="who") == [
        Example(prompt="a", completion="b", owner="7", label="2"),
        Example(prompt="c", completion="d", owner="x"),
    ]
    assert len(read_examples(path, task="causal", limit=1)) == 1


def test_chats(tmp_path: Path) -> None:
    line = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}'
    (one,) = read_examples(_file(tmp_path, "chat.jsonl", line), task="causal")
    assert one.messages == ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"})
    assert (one.prompt, one.completion) == ("hi", "ho")


def test_csv(tmp_path: Path) -> None:
    path = _file(tmp_path, "data.csv", '\ufefftext,label\n"one, two",pos\nthree,neg\n')
    assert read_examples(path, task="classify") == [
        Example(prompt="one, two", label="pos"),
        Example(prompt="three", label="neg"),
    ]


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no.jsonl cannot be read: No such file"):
        read_examples(tmp_path / "no.jsonl", task="causal")


def test_an_unknown_ending(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in .jsonl or .csv, got '.*data.parquet'"):
        read_examples(_file(tmp_path, "data.parquet", ""), task="causal")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold at least one example, got none"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": ', "line 2 must be a JSON object: "),
        ("[1]", "line 1 must be a JSON object, got list"),
        (
            '{"prompt": "a", "answer": "b"}',
            "line 1 must have columns 'prompt' and 'completion'.*got 'prompt', 'answer'",
        ),
        ('{"prompt": "a", "completion": 3}', "line 1 must have text in 'completion', got 3"),
        ('{"messages": "hello"}', "line 1 must have 'messages' with a 'role' and a 'content'"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "line 1 must have 'messages'.*two or more"),
        (
            '{"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]}',
            "the last from the assistant",
        ),
    ],
)
def test_bad_jsonl(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_examples(_file(tmp_path, "bad.jsonl", text), task="causal")
    assert "\n" not in str(caught.value)
    assert "bad.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,tag\nhello,1\n", "line 2 must have columns 'text' and 'label', got 'text', 'tag'"),
        ("text,label\nhello\n", "line 2 must have 2 columns"),
        ("text,label\nhello,1,2\n", "line 2 must have 2 columns"),
        ('text,label\n"hello,1\n', "must be CSV"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_examples(_file(tmp_path, "bad.csv", text), task="classify")


def test_a_missing_owner(tmp_path: Path) -> None:
    path = _file(tmp_path, "data.jsonl", '{"prompt": "a", "completion": "b"}')
    with pytest.raises(ValueError, match="must have the owner column 'who', got columns 'prompt', 'completion'"):
        read_examples(path, task="causal", key="who")


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"data.jsonl must be UTF-8 text"):
        read_examples(path, task="causal")


@pytest.mark.parametrize("label", ["1.5", "true", "null", "[]"])
def test_labels_are_names_or_whole_numbers(tmp_path: Path, label: str) -> None:
    path = _file(tmp_path, "data.jsonl", f'{{"text": "a", "label": {label}}}')
    with pytest.raises(ValueError, match="line 1 must have a name or a whole number in 'label'"):
        read_examples(path, task="classify")
