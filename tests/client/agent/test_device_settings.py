"""A device's settings: where each comes from, what goes before what, and what is wrong with them in one line."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

import pytest
from stages import make_settings

from fedloom.client.agent.home import Home
from fedloom.client.agent.link import Link, with_bundle
from fedloom.client.agent.owned import held_out, own_device, own_examples
from fedloom.client.data import Example
from fedloom.client.settings import DeviceSettings, check_ready, device_settings
from fedloom.protocols.bundle import read_bundle
from fedloom.protocols.config import RunConfig, build_config
from fedloom.server.keys import Consortium

RECIPE = build_config(
    {
        "seed": 7,
        "model": {"path": "org/model", "dtype": "bfloat16"},
        "lora": {"alpha": 32.0},
        "data": {"max_length": 96, "test_share": 0.3},
        "eval": {"batch_size": 5},
        "wire": {"limit_mb": 64},
    }
)


def recipe(name: str) -> RunConfig:
    if not name.endswith("mine.toml") and name != "demo":
        raise ValueError(f"no recipe {name!r}")
    return RECIPE


def read(folder: Path, text: str, changes: dict[str, Any] | None = None) -> DeviceSettings:
    path = folder / "device.toml"
    path.write_text(text)
    return device_settings(path, changes or {}, recipe)


def test_a_recipe_gives_what_the_file_leaves_out(tmp_path: Path) -> None:
    settings = read(
        tmp_path,
        'name = "a"\nrecipe = "demo"\n[data]\ntrain = "t.jsonl"\nmax_length = 64\n[model]\ndevice = "cpu"\n',
    )
    assert (settings.seed, settings.limit) == (7, 64 * 2**20)
    assert (settings.model.path, settings.model.dtype, settings.model.device) == ("org/model", "bfloat16", "cpu")
    assert (settings.lora.alpha, settings.eval.batch_size) == (32.0, 5)
    assert (settings.data.max_length, settings.data.test_share) == (64, 0.3)  # the file's own goes before


def test_paths_are_relative_to_the_file_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    monkeypatch.chdir(here)
    text = 'name = "a"\nstate = "s"\nrecipe = "mine.toml"\n[data]\ntrain = "t.jsonl"\ntest = "/x/y.jsonl"\n'
    settings = read(there, text + '[model]\npath = "./m"\n', {"data": {"train": "u.jsonl"}})
    assert settings.folder == there / "s"
    assert settings.recipe == str(there / "mine.toml")
    assert settings.data.train == str(here / "u.jsonl")
    assert settings.data.test == "/x/y.jsonl"
    assert settings.model.path == f"{there}/m"
    assert read(there, 'name = "a"\n[model]\npath = "org/name"\n').model.path == "org/name"
    assert read(there, 'name = "a"\n').folder == Path.home() / ".local/state/fedloom/a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nam = 'a'", "unknown device settings key 'nam': did you mean 'name'?"),
        ("[rules]\nhour = ['1']", "unknown device settings key 'hour' in [rules]: did you mean 'hours'?"),
        ("rank = 0", "device settings key 'rank': input should be greater than or equal to 1, got 0"),
        ("[accept]\nbases = ['xyz']", "device settings key 'accept.bases.0': string should match pattern"),
        ("capability = 'x'", "device settings key 'capability': input should be 'backprop' or 'forward', got 'x'"),
        ("state = 3", "device settings key 'state': input should be a valid string, got 3"),
        ("data = 3", "device settings key 'data': "),
        ("recipe = 'none'", "no recipe 'none'"),
        ("name = ", "is not TOML"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value).replace("(at line", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "device settings key 'name' must be given, or a join bundle, got neither"),
        ("name = 'A b'", "a device's name must be 1 to 63 of a-z"),
        ("name = 'a'", "device settings key 'data.train' must name a file of examples (or use --data FILE), got none"),
        (
            "name = 'a'\n[data]\ntrain = 't'\n[rules]\nhours = ['22-6']",
            "rules.hours must be spans such as '22:00-06:00', got '22-6'",
        ),
    ],
)
def test_what_an_agent_cannot_start_with(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_ready(read(tmp_path, text))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    consortium = Consortium(folder / "keys")
    consortium.init([])
    consortium.add_device("clinic", "localhost:9092", out=folder / "clinic.toml")
    return folder / "clinic.toml"


def test_a_bundle_gives_name_server_and_keys(tmp_path: Path, bundle: Path) -> None:
    settings, link = with_bundle(read(tmp_path, f"join = '{bundle}'"))
    held = read_bundle(bundle)
    assert (settings.name, settings.server) == ("clinic", "localhost:9092")
    assert link == Link(server="localhost:9092", ca=held.ca, key=held.key)
    assert "PRIVATE" not in repr(link)
    assert "CERTIFICATE" not in repr(link)


def test_what_contradicts_a_bundle(tmp_path: Path, bundle: Path) -> None:
    for line, message in (
        ("name = 'other'", "key 'name' must be the join bundle's 'clinic', got 'other'"),
        ("server = 'h:1'", "key 'server' must be the join bundle's 'localhost:9092', got 'h:1'"),
        ("insecure = true", "must be left out beside a join bundle"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            with_bundle(read(tmp_path, f"join = '{bundle}'\n{line}"))


def test_a_link_of_its_own_files(tmp_path: Path, bundle: Path) -> None:
    held = read_bundle(bundle)
    (tmp_path / "ca.crt").write_text(held.ca)
    (tmp_path / "key").write_text(held.key)
    text = "name = 'a'\nserver = 'h:9092'\n"
    _, link = with_bundle(read(tmp_path, text + "ca = 'ca.crt'\nkey = 'key'"))
    assert link == Link(server="h:9092", ca=held.ca, key=held.key)
    assert with_bundle(read(tmp_path, "name = 'a'"))[1] is None
    insecure = with_bundle(read(tmp_path, text + "insecure = true"))[1]
    assert insecure is not None
    assert insecure.insecure
    for lines, message in (
        ("", "keys 'ca' and 'key' must name files (or use a join bundle), got none"),
        ("ca = 'ca.crt'", "keys 'ca' and 'key' must name files"),
        ("ca = 'ca.crt'\nkey = 'none'", f"key 'key': {tmp_path}/none cannot be read: No such file"),
        ("ca = 'ca.crt'\nkey = 'key'\ninsecure = true", "key 'insecure' must be false where 'ca' and 'key' are given"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            with_bundle(read(tmp_path, text + lines))
    with pytest.raises(ValueError, match="a server's address must be host:port, got 'h'"):
        with_bundle(read(tmp_path, "name = 'a'\nserver = 'h'\ninsecure = true"))


def test_a_key_in_the_place_of_its_path_is_not_echoed(tmp_path: Path, bundle: Path) -> None:
    secret = read_bundle(bundle).key
    text = f"name = 'a'\nserver = 'h:1'\nca = 'x'\nkey = '''{secret}'''"
    (tmp_path / "x").write_text("ca")
    with pytest.raises(ValueError, match="must be the path of a file, not what it holds") as caught:
        with_bundle(read(tmp_path, text))
    assert secret.splitlines()[1] not in str(caught.value)


def some(count: int) -> list[Example]:
    return [Example(prompt=f"p{i}", completion=f"c{i}") for i in range(count)]


def test_what_is_held_out_stays_held_out_as_data_grows() -> None:
    train, test = held_out(some(100), 0.2)
    assert (len(train), len(test)) == (80, 20)
    assert sorted(e.prompt for e in train + test) == sorted(e.prompt for e in some(100))
    later = held_out(some(110), 0.2)[1]
    assert len({e.prompt for e in test} & {e.prompt for e in later}) >= 17
    assert held_out(some(100)[::-1], 0.2)[1][::-1] == test  # whatever their order
    assert held_out(some(3), 0.0) == (some(3), [])
    assert [len(part) for part in held_out(some(2), 0.1)] == [1, 1]
    assert [len(part) for part in held_out(some(1), 0.9)] == [1, 0]


def test_own_examples(tmp_path: Path, tiny_llama: Path, examples: list[Example]) -> None:
    settings = make_settings(tmp_path, tiny_llama, examples)
    train, test = own_examples(settings)
    assert train == test
    assert [e.prompt for e in train] == [e.prompt for e in examples]
    half = settings.model_copy(update={"data": settings.data.model_copy(update={"test": "", "test_share": 0.5})})
    assert [len(part) for part in own_examples(half)] == [2, 2]


def test_the_state_folder_is_made_for_its_owner(tmp_path: Path) -> None:
    home = Home(folder=tmp_path / "deep" / "state")
    home.open()
    assert stat.S_IMODE(home.folder.stat().st_mode) == 0o700
    for path in (home.patches, home.answers):
        path.mkdir()
    drafts = [home.patches / ".v1.x.ab12", home.answers / ".ff.k3", home.folder / ".traffic.json.q1"]
    own = [home.folder / ".gitignore", home.folder / ".env.local", home.patches / "v1-a.safetensors"]
    for path in drafts + own:
        path.write_text("x")
    home.tidy()
    assert not any(path.exists() for path in drafts)  # what a killed agent left half-written
    assert all(path.exists() for path in own)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"the state folder .*file cannot be used: "):
        Home(folder=tmp_path / "file").open()


def test_a_socket_path_that_is_too_long_lies_elsewhere(tmp_path: Path) -> None:
    near = Home(folder=Path("/tmp/x"))
    assert near.socket == Path("/tmp/x/agent.sock")
    for folder in (tmp_path / ("d" * 120), tmp_path / "it's"):
        home = Home(folder=folder)
        assert home.socket == Home(folder=folder).socket
        assert len(str(home.socket)) < 100
        home.open()
        assert stat.S_IMODE(home.socket.parent.stat().st_mode) == 0o700
        home.socket.parent.rmdir()


def test_what_servers_that_fit_tasks_to_devices_are_told(
    tmp_path: Path, tiny_llama: Path, examples: list[Example]
) -> None:
    """`model.describe`, from device.toml or the recipe, and what the owner's limit leaves for tensors."""
    settings = read(tmp_path, 'name = "a"\n[model]\ndescribe = "units"\n[rules]\nmax_memory_mb = 4000\n')
    assert settings.model.describe == "units"
    told = build_config({"model": {"describe": "shapes"}})
    assert device_settings(None, {"name": "a", "recipe": "demo"}, lambda _: told).model.describe == "shapes"
    model = {"path": str(tiny_llama), "device": "cpu", "describe": "units"}
    for limit in (0, 4000):
        changes = {"model": model, "rules": {"threads": 1, "max_memory_mb": limit}}
        made = make_settings(tmp_path, tiny_llama, examples, changes)
        device, _ = own_device(made, Home(folder=made.folder))
        hello = device.hello()
        assert hello.spec.groups
        assert hello.spec.shapes is not None
        assert (0 < hello.report.memory < limit * 10**6) if limit else hello.report.memory == 0
