"""Commands of root, of the service's own user, and of an administrator in the socket's group, with real users."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import needs
from tests.harness import forked
from tests.harness.forked import Forked
from tests.harness.terminal import OnTerminal
from tests.harness.unix_http import answers
from tests.harness.waiting import wait_until

SERVICE_UID = 45_679
ADMIN_UID = 54_322
OTHER_UID = 54_323
GROUP_ID = 46_001
"""Of the socket; none of them belongs to anybody on the machine."""


class Place:
    """A key service of SERVICE_UID, whose socket belongs to GROUP_ID with mode 0660."""

    def __init__(self, base: Path) -> None:
        self.socket = base / "run" / "s"
        self.data_dir = base / "service" / "data"
        self.key_file = base / "service" / "key"

    def run(
        self, *words: str, uid: int, groups: tuple[int, ...] = (), **variables: str
    ) -> subprocess.CompletedProcess[str]:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("PROGRESSDB_")}
        return forked.run("minikms", *words, env=environ | variables, user=(uid, uid, groups))

    def status(self, *flags: str, uid: int, groups: tuple[int, ...] = (), **variables: str) -> tuple[int, str]:
        done = self.run("status", "--socket", str(self.socket), *flags, uid=uid, groups=groups, **variables)
        return done.returncode, done.stdout + done.stderr

    def doctor(self, *flags: str, uid: int, groups: tuple[int, ...] = ()) -> tuple[int, str]:
        places = (
            "--data-dir",
            str(self.data_dir),
            "--socket",
            str(self.socket),
            "--master-key-file",
            str(self.key_file),
        )
        done = self.run("doctor", *places, *flags, uid=uid, groups=groups)
        return done.returncode, done.stdout + done.stderr

    def backup(self, target: Path, *, uid: int, groups: tuple[int, ...] = ()) -> tuple[int, str]:
        flags = ("--data-dir", str(self.data_dir), "--master-key-file", str(self.key_file))
        done = self.run("backup", "create", str(target), *flags, uid=uid, groups=groups)
        return done.returncode, done.stdout + done.stderr


def owned(path: Path, uid: int, mode: int = 0o700) -> Path:
    path.mkdir(mode=mode)
    path.chmod(mode)
    os.chown(path, uid, uid)
    return path


@contextmanager
def serving(base: Path, *, allowed: tuple[int, ...], admins: tuple[int, ...]) -> Iterator[Place]:
    place = Place(base)
    owned(place.socket.parent, SERVICE_UID, 0o755)
    owned(place.data_dir.parent, SERVICE_UID)
    made = place.run(
        "init", "--data-dir", str(place.data_dir), "--master-key-file", str(place.key_file), uid=SERVICE_UID
    )
    assert made.returncode == 0, made.stderr
    flags = ["--socket", str(place.socket), "--data-dir", str(place.data_dir)]
    flags += ["--master-key-file", str(place.key_file), "--socket-mode", "0660", "--socket-group", str(GROUP_ID)]
    flags += ["--allowed-uids", ",".join(map(str, allowed)), "--admin-uids", ",".join(map(str, admins))]
    with (base / "log").open("wb") as log:
        daemon = Forked(
            ["minikms", *flags], None, log.fileno(), log.fileno(), user=(SERVICE_UID, SERVICE_UID, [GROUP_ID])
        )
    try:
        wait_until(lambda: answers(place.socket) or daemon.poll() is not None)
        assert daemon.poll() is None, (base / "log").read_text()
        yield place
    finally:
        daemon.terminate()
        daemon.wait(60)


@contextmanager
def place_of_users() -> Iterator[Path]:
    needs.root()
    for uid in (SERVICE_UID, ADMIN_UID, OTHER_UID):
        needs.interpreter_for(uid)
    # Another run of the tests may close pytest's own directory to other users meanwhile.
    with tempfile.TemporaryDirectory(prefix="minikms-users-") as name:
        base = Path(name)
        base.chmod(0o755)
        yield base


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with (
        place_of_users() as base,
        serving(base, allowed=(SERVICE_UID, ADMIN_UID), admins=(SERVICE_UID, ADMIN_UID)) as found,
    ):
        yield found


@pytest.fixture
def with_server() -> Iterator[Place]:
    """As deploy/systemd has it: OTHER_UID is the message server, and only ADMIN_UID an administrator."""
    with place_of_users() as base, serving(base, allowed=(OTHER_UID, ADMIN_UID), admins=(ADMIN_UID,)) as found:
        yield found


AS_SERVICE = f'`runuser -u "$(id -nu {SERVICE_UID})" --`'
SERVED_BY = ("--server-uid", str(SERVICE_UID))


def target(place: Place, name: str) -> Path:
    """A new file in a directory of all users."""
    directory = place.socket.parent.parent / "targets"
    if not directory.exists():
        owned(directory, 0, 0o1777)
    return directory / name


def test_the_services_own_user_uses_every_command(place: Place) -> None:
    """It serves the socket itself, so no flag is needed."""
    assert place.status(uid=SERVICE_UID)[0] == 0
    status, text = place.doctor(uid=SERVICE_UID)
    assert status == 0, text
    status, text = place.backup(target(place, "service"), uid=SERVICE_UID)
    assert status == 0, text


def test_an_administrator_in_the_sockets_group_names_the_server(place: Place) -> None:
    """The group is a supplementary one. The flag or the variable names the user who may serve the socket."""
    status, text = place.status(uid=ADMIN_UID, groups=(GROUP_ID,))
    assert status == 1
    assert "--server-uid" in text and "PROGRESSDB_KMS_SERVER_UIDS" in text
    assert place.status(*SERVED_BY, uid=ADMIN_UID, groups=(GROUP_ID,))[0] == 0
    variables = {"PROGRESSDB_KMS_SERVER_UIDS": str(SERVICE_UID)}
    assert place.status(uid=ADMIN_UID, groups=(GROUP_ID,), **variables)[0] == 0
    done = place.run("doctor", "--socket", str(place.socket), *SERVED_BY, uid=ADMIN_UID, groups=(GROUP_ID,))
    assert done.returncode == 0, done.stderr


MAKE_RETIRED = """
import sys
from minikms import Client
with Client(sys.argv[1], server_uids={int(sys.argv[2])}) as kms:
    for _ in range(int(sys.argv[3])):
        key_id = kms.create_dek_for_thread("destroyed").key_id
        kms.retire_key(key_id)
        print(key_id)
"""


@pytest.mark.parametrize("count", [1, 3])
def test_an_administrator_destroys_keys_of_a_server_of_another_user(place: Place, count: int) -> None:
    """One key and several go through different clients. Flag and variable name the server to both."""
    for flags, variables in ((SERVED_BY, {}), ((), {"PROGRESSDB_KMS_SERVER_UIDS": f"0,{SERVICE_UID}"})):
        made = subprocess.run(
            (sys.executable, "-c", MAKE_RETIRED, str(place.socket), str(SERVICE_UID), str(count)),
            user=SERVICE_UID,
            group=SERVICE_UID,
            extra_groups=[],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        words = ("keys", "destroy", *made.stdout.split(), "--yes", "--socket", str(place.socket))
        unnamed = place.run(*words, uid=ADMIN_UID, groups=(GROUP_ID,))
        assert unnamed.returncode == 1
        assert "--server-uid" in unnamed.stderr, unnamed.stderr
        done = place.run(*words, *flags, uid=ADMIN_UID, groups=(GROUP_ID,), **variables)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("none known") == count


def test_an_administrator_without_the_group_reads_which_one_it_is(place: Place) -> None:
    status, text = place.status(*SERVED_BY, uid=ADMIN_UID)
    assert status == 2
    assert "--socket-group" in text, text


def test_a_member_of_the_group_who_is_not_allowed_reads_the_flag(place: Place) -> None:
    status, text = place.status(*SERVED_BY, uid=OTHER_UID, groups=(GROUP_ID,))
    assert status == 1
    assert "--allowed-uids" in text, text


def test_an_administrator_reads_whose_files_the_data_directory_has(place: Place) -> None:
    for status, text in (
        place.doctor(*SERVED_BY, uid=ADMIN_UID, groups=(GROUP_ID,)),
        place.backup(target(place, "administrator"), uid=ADMIN_UID, groups=(GROUP_ID,)),
    ):
        assert status == 2
        assert "run this as that user, or as root" in text, text


def test_root_names_the_server_and_is_allowed_by_its_uid(place: Place) -> None:
    status, text = place.status(uid=0)
    assert status == 1
    assert "--server-uid" in text, text
    status, text = place.status(*SERVED_BY, uid=0)
    assert status == 1
    assert "--allowed-uids" in text, text


def test_root_reads_as_whom_to_use_the_services_key_file(place: Place) -> None:
    """Another user's key file is not trusted, so the command is to be run as that user."""
    status, text = place.backup(target(place, "root"), uid=0)
    assert status == 2
    assert AS_SERVICE in text, text


def test_root_with_a_key_file_of_its_own_makes_a_backup_for_the_service(place: Place) -> None:
    """What it registers in the data directory belongs to the service, which goes on making backups."""
    services, place.key_file = place.key_file, target(place, "key")
    try:
        place.key_file.touch(0o600)
        place.key_file.write_text(services.read_text())
        status, text = place.backup(target(place, "by-root"), uid=0)
        assert status == 0, text
    finally:
        place.key_file = services
    registered = list((place.data_dir / "kms-archives").iterdir())
    assert {entry.stat().st_uid for entry in registered} == {SERVICE_UID}
    status, text = place.backup(target(place, "after-root"), uid=SERVICE_UID)
    assert status == 0, text


def test_doctor_examines_the_files_also_when_the_daemon_refuses(place: Place) -> None:
    """A refusal of the daemon is one finding among those about the files."""
    places = ("--data-dir", str(place.data_dir), "--socket", str(place.socket))
    done = place.run("doctor", *places, uid=0)
    assert done.returncode == 1
    assert "problem: daemon: " in done.stdout and "--server-uid" in done.stdout, done


def test_doctor_of_a_user_who_is_not_allowed_says_how_to_ask_the_daemon(with_server: Place) -> None:
    """It runs as the user of the files, so it can't just run as another one."""
    status, text = with_server.doctor(uid=SERVICE_UID)
    assert status == 1
    assert "name this user in the daemon's --allowed-uids" in text and "minikms status" in text, text


def test_only_an_administrator_seals_unseals_and_changes_root_keys(with_server: Place) -> None:
    """The message server may see that the service is sealed, and which root keys there are."""
    base = with_server.socket.parent.parent
    spare = owned(base / "admin", ADMIN_UID) / "spare.key"
    spare.write_text("5a" * 32)
    spare.chmod(0o600)
    os.chown(spare, ADMIN_UID, ADMIN_UID)

    def run(uid: int, *words: str) -> tuple[int, str]:
        to = ("--socket", str(with_server.socket), *SERVED_BY)
        done = with_server.run(*words, *to, uid=uid, groups=(GROUP_ID,))
        return done.returncode, done.stdout + done.stderr

    for words in (("seal", "--yes"), ("root", "remove", "s1", "--yes")):
        status, text = run(OTHER_UID, *words)
        assert (status, "--admin-uids" in text) == (1, True), text
    added = run(ADMIN_UID, "root", "add", f"file:{spare}", "--yes")
    assert added[0] == 0, added
    assert run(OTHER_UID, "root", "list")[1].count("active") == 2
    sealed = run(ADMIN_UID, "seal", "--yes")
    assert sealed[0] == 0, sealed
    assert run(OTHER_UID, "unseal", "--status")[1].startswith("sealed since")
    status, text = run(OTHER_UID, "unseal", "--from-source")
    assert (status, "--admin-uids" in text) == (1, True), text
    unsealed = run(ADMIN_UID, "unseal", "--from-source")
    assert unsealed[0] == 0, unsealed
    assert run(OTHER_UID, "status")[0] == 0


def test_an_administrator_uses_a_passphrase_and_root_writes_the_pins(with_server: Place) -> None:
    """minikms-unlock and the daemon run under two users; the variable names the one who serves the socket."""
    base = with_server.socket.parent.parent
    config = base / "unlock.toml"
    config.write_text(
        'version = 1\n[passphrase]\nsalt = "0123456789abcdef"\nmemory_kib = 65536\niterations = 3\nlanes = 4\n'
    )
    config.chmod(0o644)
    passphrase = "seven wise mice eat cheese"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PROGRESSDB_")}
    ends = ("passphrase:", "--config", str(config), "--socket", str(with_server.socket))

    def as_administrator(verb: str, **variables: str) -> OnTerminal:
        user = ("setpriv", "--reuid", str(ADMIN_UID), "--regid", str(ADMIN_UID), "--groups", str(GROUP_ID))
        return OnTerminal((*user, sys.executable, "-m", "minikms_unlock", verb, *ends), env=environ | variables)

    with as_administrator("unseal") as program:  # nothing is typed to a server that is not trusted
        assert program.wait() == 1
    assert b"--server-uid" in program.shown and b"Passphrase" not in program.shown
    named = {"PROGRESSDB_KMS_SERVER_UIDS": str(SERVICE_UID)}
    with as_administrator("add", **named) as program:
        for asked in ("Passphrase: ", "The same again: "):
            program.wait_for(asked)
            program.type(passphrase)
        assert program.wait() == 0, program.shown
    to = ("--socket", str(with_server.socket), *SERVED_BY)
    assert with_server.run("seal", "--yes", *to, uid=ADMIN_UID, groups=(GROUP_ID,)).returncode == 0
    with as_administrator("unseal", **named) as program:
        program.wait_for("Passphrase: ")
        program.type(passphrase)
        assert program.wait() == 0, program.shown
    pins = base / "pins"
    pins.mkdir()
    pins.chmod(0o755)
    to = ("--pin", str(pins / "pin"), "--data-dir", str(with_server.data_dir))
    pin = ("pin", "add", f"file:{with_server.key_file}", *to)
    assert with_server.run(*pin, uid=SERVICE_UID).returncode == 2, "only root"
    done = with_server.run(*pin, uid=0)  # a key file of the service's user, whom root vouches for
    assert done.returncode == 0, done.stderr
    assert (pins / "pin").stat().st_mode & 0o777 == 0o644
