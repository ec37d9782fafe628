"""The join bundle: what it takes, what it refuses, and that it keeps its secret."""

from __future__ import annotations

import base64
import os
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.protocols.bundle import (
    MAX_BUNDLE_BYTES,
    JoinBundle,
    check_host,
    check_name,
    read_bundle,
    readable_by_others,
    split_address,
    write_bundle,
    write_secret,
)
from fedloom.server.keys import Consortium


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> JoinBundle:
    consortium = Consortium(tmp_path_factory.mktemp("keys"))
    consortium.init(["fl.example.org"])
    return consortium.add_device("hospital-a", "fl.example.org:9092")


def text_of(bundle: JoinBundle, **changes: str) -> str:
    fields = bundle.model_dump() | changes
    return "".join(
        f'{name} = """\n{value}"""\n' if "\n" in value else f'{name} = "{value}"\n' for name, value in fields.items()
    )


def test_a_bundle_reads_back_as_it_was_written_and_only_its_owner_may_read_it(
    bundle: JoinBundle, tmp_path: Path
) -> None:
    path = tmp_path / "a.toml"
    old = os.umask(0)
    try:
        write_bundle(path, bundle)
    finally:
        os.umask(old)
    assert read_bundle(path) == bundle
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not readable_by_others(path)
    assert os.listdir(tmp_path) == ["a.toml"]


def test_lines_that_end_as_on_windows_read_the_same(bundle: JoinBundle, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(text_of(bundle).replace("\n", "\r\n").encode())
    assert read_bundle(path) == bundle


def test_a_file_that_is_there_is_kept_unless_it_may_be_replaced(bundle: JoinBundle, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("mine")
    path.chmod(0o644)
    with pytest.raises(ValueError, match=r"a\.toml exists already; .*--force"):
        write_bundle(path, bundle)
    assert path.read_text() == "mine"
    write_bundle(path, bundle, replace=True)
    assert read_bundle(path) == bundle
    assert not readable_by_others(path)


def test_a_folder_that_is_not_there_is_one_line(bundle: JoinBundle, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bundle .*a\.toml cannot be written: No such file"):
        write_bundle(tmp_path / "none" / "a.toml", bundle)
    with pytest.raises(ValueError, match=r"bundle .*b\.toml cannot be read: No such file"):
        read_bundle(tmp_path / "b.toml")


def test_of_many_who_take_one_name_exactly_one_gets_it(tmp_path: Path) -> None:
    won = []

    def write(number: int) -> None:
        try:
            write_secret(tmp_path / "x", b"%d" % number * 1000, replace=False)
            won.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "x").read_bytes() == b"%d" % won[0] * 1000
    assert len(won) == 1
    assert os.listdir(tmp_path) == ["x"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    for replace in (True, False):
        with pytest.raises(TypeError):
            write_secret(tmp_path / "x", "text is not bytes", replace=replace)  # type: ignore[arg-type]
        assert os.listdir(tmp_path) == []


def test_what_a_bundle_holds_is_in_no_error_and_no_repr(bundle: JoinBundle, tmp_path: Path) -> None:
    """Every way to break the file, and none quotes the key (an error ends up in a log)."""
    whole = text_of(bundle)
    secret = bundle.key.split("\n")[3]
    assert secret in whole
    broken = {
        "no ca": whole.replace("ca = ", "# ca = ", 1).replace(bundle.ca, ""),
        "no name": whole.replace('name = "hospital-a"\n', ""),
        "a misspelt key": whole.replace("key = ", "keys = "),
        "one key too many": whole + 'extra = "x"\n',
        "a list": whole.replace('key = """', 'key = ["""').replace('KEY-----\n"""', 'KEY-----\n"""]'),
        "torn": whole[:-40],
        "another head": text_of(bundle, key=bundle.key.replace("OPENSSH", "RSA")),
        "a letter changed": text_of(bundle, key=bundle.key.replace("b3BlbnNzaC1", "b3BlbnNzaC0")),
        "a letter lost": text_of(bundle, key=bundle.key.replace(secret, secret[1:])),
        "not base64": text_of(bundle, key=bundle.key.replace(secret, "!" + secret)),
        "key for ca": text_of(bundle, ca=bundle.key),
        "ca for key": text_of(bundle, key=bundle.ca),
        "a bad name": text_of(bundle, name="../a"),
        "a bad address": text_of(bundle, server="fl.example.org"),
        "not TOML": whole.replace('name = "', "name = "),
        "not text": "\0" + whole,
    }
    path = tmp_path / "a.toml"
    for how, text in broken.items():
        path.write_text(text)
        with pytest.raises(ValueError, match="join bundle") as caught:
            read_bundle(path)
        said = str(caught.value)
        assert "\n" not in said, how
        assert secret not in said, how
        assert secret[1:30] not in said, how
        assert len(said) < 300 + len(str(path)), how
    assert secret not in repr(bundle)


def test_a_certificate_that_does_not_decode_is_refused(bundle: JoinBundle, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text_of(bundle, ca=bundle.ca.replace("MII", "AAA", 1)))
    with pytest.raises(ValueError, match="'ca' must be a certificate in PEM, and does not decode as one"):
        read_bundle(path)


def test_a_key_with_a_passphrase_is_refused(bundle: JoinBundle) -> None:
    """SuperNode could not open it."""
    head = b"openssh-key-v1\0\0\0\0\x0aaes256-ctr\0\0\0\x06bcrypt\0\0\0\x18" + bytes(24) + b"ecdsa-sha2-nistp384"
    text = base64.b64encode(head).decode()
    locked = f"-----BEGIN OPENSSH PRIVATE KEY-----\n{text}\n-----END OPENSSH PRIVATE KEY-----\n"
    with pytest.raises(ValueError, match="without a passphrase"):
        write_bundle(Path("never-written.toml"), bundle.model_copy(update={"key": locked}))
    assert not Path("never-written.toml").exists()


def test_a_bundle_is_not_read_past_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a sparse terabyte
    with pytest.raises(ValueError, match=f"at most {MAX_BUNDLE_BYTES} bytes, got {1 << 40}"):
        read_bundle(path)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="join bundle"):
        read_bundle(path)


@given(st.binary(max_size=200))
def test_any_key_is_refused_without_being_quoted(bundle: JoinBundle, data: bytes) -> None:
    text = base64.b64encode(b"openssh-key-v1\0" + data).decode()
    key = f"-----BEGIN OPENSSH PRIVATE KEY-----\n{text}\n-----END OPENSSH PRIVATE KEY-----\n"
    with pytest.raises(ValueError, match="'key' must be an ECDSA private key") as caught:
        write_bundle(Path("never-written.toml"), bundle.model_copy(update={"key": key}))
    assert text not in str(caught.value)


@pytest.mark.parametrize("name", ["a", "hospital-a", "box_17", "0", "a" * 63])
def test_names_of_devices(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "A",
        "-a",
        "_a",
        "a" * 64,
        "a.b",
        "a/b",
        "../a",
        "a b",
        "a\n",
        "ä",
        "a\0",
        ".hidden",
        "--force",
        "a;rm -rf",
        '"',
    ],
)
def test_names_that_could_not_be_files_or_words_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a device's name must be 1 to 63 of a-z"):
        check_name(name)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("fl.example.org:9092", ("fl.example.org", 9092)),
        ("FL.Example.org:1", ("fl.example.org", 1)),
        ("127.0.0.1:65535", ("127.0.0.1", 65535)),
        ("[::1]:9092", ("::1", 9092)),
        ("[2001:DB8:0::1]:80", ("2001:db8::1", 80)),
        ("fed_server:9092", ("fed_server", 9092)),
    ],
)
def test_addresses(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize(
    "address",
    [
        "",
        "a",
        "a:",
        ":1",
        "a:0",
        "a:65536",
        "a:-1",
        "a:1x",
        "a: 1",
        "a:٣",
        "a:" + "9" * 9999,
        "https://a:1",
        "::1:90",
        "[a]:1",
        "a..b:1",
        "a b:1",
        "*.a:1",
        "a/b:1",
        "-a:1",
        "a" * 300 + ":1",
        "10.0.0.256:1",
        'a":1',
        "a\n:1",
        "[::1:90",
    ],
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ValueError, match="a server's address must be host:port"):
        split_address(address)


def test_a_host_comes_without_a_port() -> None:
    assert check_host("10.0.0.5") == "10.0.0.5"
    with pytest.raises(ValueError, match=r"without a port, got 'fl\.example\.org:9092'"):
        check_host("fl.example.org:9092")
