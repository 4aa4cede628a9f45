"""The parameters of a passphrase, their bounds, and the derivation."""

import os
import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest

from minikms.api.errors import StartError
from minikms_unlock.passphrase import Parameters, derive_into, make_config, read_config
from tests import needs

LEAST = Parameters("0123456789abcdef", 64 * 1024, 3, 4)
CONFIG = """
version = 1
[passphrase]
salt = "0123456789abcdef"
memory_kib = 65536
iterations = 3
lanes = 4
"""


def derived(passphrase: bytes, parameters: Parameters) -> str:
    root = memoryview(bytearray(32))
    derive_into(memoryview(bytearray(passphrase)), parameters, root)
    return root.hex()


def config(place: Path, text: str = CONFIG) -> Path:
    path = place / "unlock.toml"
    path.write_text(text)
    path.chmod(0o644)
    return path


def test_a_known_answer() -> None:
    """Made with argon2-cffi 25.1: hash_secret_raw(b"correct horse", b"0123456789abcdef", 3, 65536, 4, 32, Type.ID)."""
    assert derived(b"correct horse", LEAST) == "2f56f5363a695288ff28810e46ad69a1fe3068bc6494cd26a8a673b7d9c2b0a2"


def test_another_salt_or_passphrase_gives_another_key() -> None:
    keys = {derived(b"correct horse", LEAST), derived(b"correct horse ", LEAST)}
    keys.add(derived(b"correct horse", Parameters("0123456789abcdeF", 64 * 1024, 3, 4)))
    assert len(keys) == 3


def test_a_new_configuration_is_read_again_and_has_its_own_salt(tmp_path: Path) -> None:
    made = [make_config(tmp_path / name) for name in ("one", "two")]
    assert [read_config(tmp_path / name) for name in ("one", "two")] == made
    assert made[0].salt != made[1].salt
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) & 0o022 == 0


def test_a_configuration_is_never_replaced(tmp_path: Path) -> None:
    """Its salt may be the only copy."""
    path = config(tmp_path)
    with pytest.raises(FileExistsError):
        make_config(path)
    assert path.read_text() == CONFIG


def test_the_parameters_are_read(tmp_path: Path) -> None:
    assert read_config(config(tmp_path)) == LEAST


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("salt", "short", "16 to 64 letters"),
        ("salt", "x" * 65, "16 to 64 letters"),
        ("salt", "0123456789abcdé?", "16 to 64 letters"),
        ("salt", 5, "16 to 64 letters"),
        ("memory_kib", 65535, "from 65536"),
        ("memory_kib", 4194305, "to 4194304"),
        ("memory_kib", "65536", "from 65536"),
        ("memory_kib", 65536.0, "from 65536"),
        ("iterations", 2, "from 3"),
        ("iterations", 65, "to 64"),
        ("lanes", 0, "from 1"),
        ("lanes", 17, "to 16"),
        ("lanes", True, "from 1"),
        ("more", 1, "exactly"),
    ],
)
def test_a_value_out_of_its_bounds_is_refused(tmp_path: Path, name: str, value: Any, match: str) -> None:
    table = tomllib.loads(CONFIG)["passphrase"] | {name: value}
    lines = [
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}" for key, value in table.items()
    ]
    path = config(tmp_path, "version = 1\n[passphrase]\n" + "\n".join(lines))
    with pytest.raises(StartError, match=match):
        read_config(path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "version = 1"),
        (CONFIG.replace("version = 1", "version = 2"), "version = 1"),
        (CONFIG.replace("version = 1", "version = true"), "version = 1"),
        (CONFIG + "[more]\n", "exactly"),
        ("version = 1\npassphrase = 3", "exactly"),
        ("version = 1\n", "exactly"),
        (CONFIG.replace("lanes = 4", ""), "exactly"),
        ("version = [", "is not TOML"),
        ("[" * 30_000, "is not TOML"),
        ("version = " + "1" * 5_000, "is not TOML"),
        ("#" * 70_000, "is larger than"),
    ],
)
def test_another_document_is_refused(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(StartError, match=match):
        read_config(config(tmp_path, text))


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_configuration_that_others_can_change_is_refused(tmp_path: Path, mode: int) -> None:
    path = config(tmp_path)
    path.chmod(mode)
    with pytest.raises(StartError, match="must belong to root"):
        read_config(path)


def test_a_configuration_of_another_user_is_refused(tmp_path: Path) -> None:
    needs.root()
    path = config(tmp_path)
    os.chown(path, 12345, -1)
    with pytest.raises(StartError, match="must belong to root"):
        read_config(path)


def test_a_link_through_the_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    """That user could let it lead to parameters under which guesses cost less."""
    needs.root()
    path, foreign = config(tmp_path), tmp_path / "foreign"
    foreign.mkdir(0o755)
    (foreign / "unlock.toml").symlink_to(path)
    (foreign / "back").symlink_to(tmp_path)
    os.chown(foreign, 12345, -1)
    for through in (foreign / "unlock.toml", foreign / "back" / "unlock.toml"):
        with pytest.raises(StartError):
            read_config(through)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StartError, match="not a regular file"):
        read_config(tmp_path / "pipe")
    with pytest.raises(StartError, match="init-passphrase"):
        read_config(tmp_path / "missing")
