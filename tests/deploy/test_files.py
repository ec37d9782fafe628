"""The files of deploy/ and the commands of its guides, held against the real command line and the real settings.

No container engine is needed. Linters that are installed (hadolint, systemd-analyze) are asked too.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from fedloom.cli.main import app
from fedloom.client.agent.link import Link, with_bundle
from fedloom.client.readers import read_examples
from fedloom.client.settings import check_ready, device_settings
from fedloom.protocols.bundle import JoinBundle
from fedloom.protocols.config import read_recipe
from fedloom.server.settings import read_settings
from fedloom.simulations.cookbook import find_recipe

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted(DEPLOY.glob("systemd/*.service"))
GUIDES = [ROOT / "docs" / f"{name}.md" for name in ("deploy", "operations", "security")]
BIN = Path(sys.executable).parent
DEVICES = ("home-a", "home-b", "home-c")


def check_command(words: list[str], where: str) -> None:
    """Raise AssertionError unless the command line takes these words after `fedloom`, down to types of options."""
    command: click.Command = typer.main.get_command(app)
    context, rest = click.Context(command, info_name="fedloom"), words
    try:
        while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
            _, found, rest = command.resolve_command(context, rest)
            assert found is not None
            command = found
            context = command.make_context(command.name, list(rest), parent=context)
            rest = [*context.protected_args, *context.args]
        assert not rest or "--help" in words, f"{where}: {words}: unexpected {rest}"
    except click.exceptions.Exit:
        assert "--help" in words, f"{where}: {words}"  # help was asked for
    except click.ClickException as error:
        raise AssertionError(f"{where}: fedloom {shlex.join(words)}: {error.format_message()}") from None


def in_shell(script: str) -> Iterator[list[str]]:
    """The arguments of each `fedloom` command of a shell script."""
    for line in re.sub(r"\\\n", " ", script).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>()")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not word.strip(";|&<>()"):
                yield from _command(words)
                words = []
            else:
                words.append(word)


def _command(words: list[str]) -> Iterator[list[str]]:
    """What follows `fedloom` in one command, before which may stand sudo, env, a shell's keyword or a variable."""
    at = [at for at, word in enumerate(words) if Path(word).name == "fedloom" and _may_stand_before(words[:at])]
    if at:
        yield words[at[-1] + 1 :]


def _may_stand_before(words: list[str]) -> bool:
    if words[:2] == ["docker", "compose"]:
        return True
    known = ("sudo", "-u", "fedloom", "env", "do", "then", "nohup")
    return all(word in known or "=" in word for word in words)


# The Dockerfile


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, (name, arguments), continued lines joined; those before the first under ""."""
    found: dict[str, list[tuple[str, str]]] = {"": []}
    name = ""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            name = rest.split()[-1]
            found[name] = []
        if instruction:
            found[name].append((instruction, " ".join(rest.split())))
    return found


def instructions(stage: str, name: str) -> list[str]:
    """The arguments of a stage's instructions of that name, those of the stages it is made from first."""
    found = stages()
    base = next(rest for instruction, rest in found[stage] if instruction == "FROM").split()[0]
    own = [rest for instruction, rest in found[stage] if instruction == name]
    return (instructions(base, name) if base in found else []) + own


def test_the_image_is_made_in_stages_and_its_base_is_pinned() -> None:
    found = stages()
    assert list(found) == ["", "dependencies", "wheel", "runtime", "device", "server"]
    bases = {rest.split()[0] for lines in found.values() for instruction, rest in lines if instruction == "FROM"}
    assert bases == {"${PYTHON_IMAGE}", "dependencies", "runtime"}
    [image] = [rest for instruction, rest in found[""] if instruction == "ARG"]
    assert re.fullmatch(r"PYTHON_IMAGE=python:3\.\d+\.\d+-slim-\w+(@sha256:[0-9a-f]{64})?", image)


@pytest.mark.parametrize("stage", ["server", "device"])
def test_a_container_runs_without_rights_and_without_a_shell(stage: str) -> None:
    assert instructions(stage, "USER")[-1] == "10001:10001"
    [entry] = instructions(stage, "ENTRYPOINT")
    assert entry == '["fedloom"]'
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts["fedloom"] == "fedloom.cli.main:main"
    [command] = instructions(stage, "CMD")
    check_command(yaml.safe_load(command), f"CMD of {stage}")
    assert instructions(stage, "VOLUME") == ["/var/lib/fedloom"]


def test_health_is_what_the_server_and_the_agent_say() -> None:
    [server], [device] = instructions("server", "HEALTHCHECK"), instructions("device", "HEALTHCHECK")
    port = read_settings(DEPLOY / "compose" / "server.toml").dashboard.port
    assert f"http://127.0.0.1:{port}/healthz" in server
    program = yaml.safe_load(server.partition("CMD ")[2])
    compile(program[-1], "HEALTHCHECK", "exec")
    asked = yaml.safe_load(device.partition("CMD ")[2])
    assert asked[0] == "fedloom"
    check_command(asked[1:], "HEALTHCHECK of device")


def test_nothing_but_the_package_goes_into_the_image() -> None:
    copied = {word for stage in stages() for copy in _copies(stage) for word in copy.split()[:-1]}
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
    assert copied == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} | {
        Path(folder).parts[0] for folder in packages.values()
    }
    assert all((ROOT / name).exists() for name in copied)
    ignored = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert {"**/*.key", "**/*.pem", "**/.*"} <= set(ignored)
    assert "ADD" not in {instruction for lines in stages().values() for instruction, _ in lines}


def _copies(stage: str) -> list[str]:
    """COPY instructions from the build context."""
    return [rest for name, rest in stages()[stage] if name == "COPY" and not rest.startswith("--from=")]


def test_hadolint_has_no_complaint() -> None:
    hadolint = shutil.which("hadolint", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, str(DEPLOY / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# The compose file


def compose() -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return table


def test_compose_has_one_server_three_devices_and_an_init_service() -> None:
    services = compose()["services"]
    assert set(services) == {"permissions", "keys", "server", *DEVICES}
    for name, service in services.items():
        target = (service.get("build") or {}).get("target", "server")
        assert service["image"] == f"fedloom-{target}", name
        assert target in stages(), name
        for needed in service.get("depends_on", {}):
            assert needed in services, name
    build = services["server"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "Dockerfile"


def test_every_container_is_locked_down() -> None:
    for name, service in compose()["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service.get("cap_add", []) == (["CHOWN"] if name == "permissions" else []), name
        assert service.get("user", "") == ("0:0" if name == "permissions" else ""), name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"] is True, name
        assert service["init"] is True, name
        assert not {"privileged", "pid", "ipc", "devices"} & set(service), name
        if name in ("server", *DEVICES):
            assert service["mem_limit"], name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name


def test_a_device_sees_its_own_volume_and_the_server_alone() -> None:
    table = compose()
    services, declared = table["services"], set(table["volumes"])
    for service in services.values():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert source in declared or (DEPLOY / source).is_file(), mount
    for name in DEVICES:
        named = {mount.split(":")[0] for mount in services[name]["volumes"]} & declared
        assert named == {name}
        assert services[name]["networks"] == ["fleet"]
    assert table["networks"]["fleet"]["internal"] is True
    assert "keys:/etc/fedloom/keys:ro" in services["server"]["volumes"]


def test_compose_runs_commands_that_exist() -> None:
    services = compose()["services"]
    check_command(services["server"]["command"], "compose, server")
    assert "command" not in services["home-a"]  # the image's own
    [script] = services["keys"]["command"]
    commands = list(in_shell(script.replace("$$", "$")))
    assert [words[:2] for words in commands] == [["keys", "init"], ["keys", "add-device"]]
    for words in commands:
        check_command(words, "compose, keys")
    assert subprocess.run(["sh", "-n", "-c", script.replace("$$", "$")], check=False).returncode == 0


def test_compose_settings_fit_its_volumes() -> None:
    settings = read_settings(DEPLOY / "compose" / "server.toml")
    assert settings.fleet.wait_for == len(DEVICES)
    assert settings.dashboard.enabled
    device = device_settings(DEPLOY / "compose" / "device.toml", {}, lambda name: read_recipe(find_recipe(name)))
    [script] = compose()["services"]["keys"]["command"]
    for path in (device.data.train, device.data.test, device.join):
        assert f"/devices/$$name/{Path(path).name}" in script
    recipe = read_recipe(find_recipe(compose()["services"]["server"]["command"][1]))
    assert recipe.strategy.name in device.accept.strategies
    assert device.model == recipe.model


def test_the_demos_data_is_a_file_for_each_device(tmp_path: Path) -> None:
    command = [sys.executable, str(DEPLOY / "examples" / "demo_data.py"), str(tmp_path / "data"), *DEVICES]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [str(path) for name in DEVICES for path in _files(tmp_path, name)]
    train = [read_examples(_files(tmp_path, name)[0], task="causal") for name in DEVICES]
    test = [read_examples(_files(tmp_path, name)[1], task="causal") for name in DEVICES]
    assert len({example for examples in train for example in examples[:5]}) == 15  # each device has its own
    assert [len(examples) for examples in test] == [30, 30, 30]
    for seen, asked in zip(train, test, strict=True):
        assert not {example.prompt for example in seen} & {example.prompt for example in asked}


def _files(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / "data" / f"{name}.jsonl", folder / "data" / f"{name}-test.jsonl"


# Settings


def test_the_example_of_a_server_is_what_its_reader_takes() -> None:
    settings = read_settings(DEPLOY / "examples" / "server.toml")
    assert settings.dashboard.host == "127.0.0.1"
    assert settings.keys.folder == DEPLOY / "examples" / "keys"
    assert not settings.link.insecure


def test_the_example_of_a_device_is_what_its_reader_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = device_settings(DEPLOY / "examples" / "device.toml", {}, lambda name: read_recipe(find_recipe(name)))
    bundle = JoinBundle(name="hospital-a", server="fl.example.org:9092", ca="-", key="-")
    monkeypatch.setattr("fedloom.client.agent.link.read_bundle", lambda path: bundle)  # the example names no real one
    joined, link = with_bundle(settings)
    assert joined.name == "hospital-a"
    assert link == Link(server="fl.example.org:9092", ca="-", key="-")
    check_ready(joined)


# Units


def unit(path: Path) -> dict[str, list[str]]:
    """The keys of a unit file, each with its values."""
    found: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_there_is_a_unit_for_each_side() -> None:
    assert [path.name for path in UNITS] == ["fedloom-client.service", "fedloom-server.service"]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_is_hardened_and_comes_back(path: Path) -> None:
    keys = unit(path)
    wanted = {
        "User": "fedloom",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "PrivateTmp": "yes",
        "CapabilityBoundingSet": "",
        "Restart": "on-failure",
        "StartLimitIntervalSec": "0",
        "UMask": "0077",
        "StateDirectoryMode": "0700",
    }
    assert {key: keys[key] for key in wanted} == {key: [value] for key, value in wanted.items()}
    assert int(keys["RestartSec"][0]) >= 5
    assert keys["MemoryMax"]
    [state] = keys["StateDirectory"]
    assert keys["WorkingDirectory"] == [f"/var/lib/{state}"]
    assert keys["ProtectHome"][0] in ("yes", "tmpfs")


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_runs_a_command_that_exists(path: Path) -> None:
    keys = unit(path)
    [command] = keys["ExecStart"]
    program, *words = shlex.split(command)
    assert program == "/opt/fedloom/bin/fedloom"
    assert f"Environment=PATH={Path(program).parent}:" in path.read_text(encoding="utf-8")
    check_command(words, path.name)
    [state] = keys["StateDirectory"]
    written = [word for word in words if word.startswith("/var/")]
    assert all(word.startswith(f"/var/lib/{state}/") for word in written)
    if path.stem == "fedloom-client":
        settings = device_settings(DEPLOY / "examples" / "device.toml", {}, lambda name: read_recipe(find_recipe(name)))
        assert settings.state.startswith(f"/var/lib/{state}")


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_takes_the_unit_and_finds_it_well_closed(path: Path, tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd is not installed")
    copy = tmp_path / path.name  # verify wants a program that is there
    copy.write_text(path.read_text(encoding="utf-8").replace("/opt/fedloom/bin/fedloom ", f"{sys.executable} "))
    done = subprocess.run([analyze, "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False)
    newer = ("RestartSteps", "RestartMaxDelaySec")  # than this systemd, perhaps
    complaints = [line for line in done.stderr.splitlines() if copy.name in line and not any(k in line for k in newer)]
    assert (done.returncode, complaints) == (0, [])
    command = [analyze, "security", "--offline=true", "--threshold=20", str(copy)]  # tenths, of 100
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


# Guides


def blocks(path: Path, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [str(block) for block in found]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_a_guides_commands_exist(guide: Path) -> None:
    commands = [words for block in blocks(guide, "sh") for words in in_shell(block)]
    inline = re.findall(r"`(fedloom [^`\n]+)`", guide.read_text(encoding="utf-8"))
    bare = ("fedloom server", "fedloom client", "fedloom keys")  # the command as such, in a sentence
    commands += [words for text in inline if text not in bare for words in in_shell(text)]
    assert commands
    for words in commands:
        check_command(words, guide.name)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_a_guides_links_and_paths_lead_somewhere(guide: Path) -> None:
    text = guide.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (guide.parent / target).exists(), target
    for name in re.findall(r"(?<!/)\b(?:deploy|docs|tests)/[\w./-]+\.(?:toml|yaml|service|py|md)\b", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_a_guides_settings_are_known(guide: Path, tmp_path: Path) -> None:
    for block in blocks(guide, "toml"):
        path = tmp_path / block.partition("\n")[0].removeprefix("# ")
        path.write_text(block, encoding="utf-8")
        assert path.name == "device.toml", "a block of settings must say in its first line what it is of"
        assert device_settings(path, {}, lambda _: read_recipe(find_recipe("demo"))).data.train
