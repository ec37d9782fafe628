"""server.toml: its defaults, and its mistakes in one line each."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedloom.server.settings import ServerSettings, is_loopback, read_settings


def test_without_a_file_the_defaults_hold() -> None:
    settings = read_settings()
    assert settings == ServerSettings()
    assert (settings.link.host, settings.link.port, settings.link.insecure) == ("0.0.0.0", 9092, False)
    assert (settings.fleet.wait_for, settings.dashboard.host) == (1, "127.0.0.1")


def test_a_file_is_read_and_its_keys_folder_lies_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "server.toml"
    path.write_text('[link]\nport = 7000\n[keys]\nfolder = "consortium"\n[fleet]\nwait_for = 3\n')
    settings = read_settings(path)
    assert (settings.link.port, settings.fleet.wait_for) == (7000, 3)
    assert settings.keys.folder == tmp_path / "consortium"
    path.write_text('[keys]\nfolder = "/srv/keys"\n')
    assert read_settings(path).keys.folder == Path("/srv/keys")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[link]\nprot = 1\n", r"unknown server settings key 'prot' in \[link\]: did you mean 'port'\?"),
        ("[link]\nport = 0\n", "'link.port': input should be greater than or equal to 1, got 0"),
        ("[link]\ninsecure = true\n", "must have a loopback host when it is insecure.*got '0.0.0.0'"),
        ("[fleet]\nwait_for = 0\n", "'fleet.wait_for': input should be greater than or equal to 1"),
        ("[fleet]\nwait_seconds = inf\n", "'fleet.wait_seconds': input should be a finite number"),
        ("[lnk]\n", "unknown server settings key 'lnk': did you mean 'link'"),
        ("[link\n", "is not TOML"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "server.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=why) as caught:
        read_settings(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"server settings .*server.toml cannot be read: No such file"):
        read_settings(tmp_path / "server.toml")


def test_every_key_says_what_it_means() -> None:
    for table in ServerSettings.model_fields.values():
        fields = getattr(table.annotation, "model_fields", {})
        assert fields
        assert all(field.description for field in fields.values())


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.example.org", ""])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)
