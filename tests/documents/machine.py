"""A machine with both services, and an auditor where a test enables one, as deploy/systemd/README.md and the units say.

Owns: what the service manager does with the units (users, groups, directories, environment, the socket that root passes
on, the notification that a service is ready), and the programs `runuser` and `journalctl` for users without a passwd
entry. Every path of the documents is below one directory, and every name of a user is a number. As root the machine has
three users: the operator (root) and one for each service. Another user is all three, and has no socket unit.
"""

import contextlib
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests import needs
from tests.deploy import restricted, service_manager
from tests.harness import forked
from tests.harness.ports import free_port
from tests.harness.terminal import OnTerminal

PROJECT = Path(__file__).resolve().parents[2]
UNITS = restricted.UNITS
USERS = ("minikms", "progressdb", "minikms-auditor", "minikms-unlock")
UID_MIN = 54_321
"""Of the users. Neither it nor the numbers after it belong to anybody on the machine."""
CHANGES_THE_SYSTEM = ("usr/bin/apt-get", "usr/bin/useradd", "usr/bin/userdel", "usr/bin/usermod")
"""What does nothing here: the programs are there, and no user has a passwd entry."""
READY_S_MAX = 60.0
RUN_S_MAX = 120.0

_PATH = re.compile(
    r"(?<![\w/.])/(?=(?:run|etc/progressdb|etc/systemd/system|var/lib/progressdb|backup|opt/progressdb|root)\b)"
)
_ONE_WORD = re.compile(r"\$\{(\w+)\}")
_BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)


def _is_ready(notified: socket.socket) -> bool:
    """Whether a service has said so within a short time."""
    readable, _, _ = select.select([notified], [], [], 0.1)
    return bool(readable) and b"READY=1" in notified.recv(4096)


def blocks(page: Path) -> list[str]:
    """The shell commands of a page, by block."""
    return _BLOCK.findall(page.read_text("utf-8"))


def _is_on_demand(name: str) -> bool:
    """Whether a service ends after each connection to its socket. It is running as long as its socket is."""
    return name.partition("@")[0] == "minikms-unlock"


class ServiceError(AssertionError):
    """A service did not start."""


class Machine:
    """`base` is a directory that every user can enter. `uids`: of the users. `own`: they are used, which needs root;
    without it, this user is all of them. `socket_unit`: socket units are installed."""

    def __init__(self, base: Path, uids: dict[str, int], *, own: bool, socket_unit: bool) -> None:
        self.base = base
        self.port = free_port()
        self._three_users = three_users = own
        self._passes_socket = three_users and socket_unit
        self._uids = uids if own else dict.fromkeys(uids, os.geteuid())
        self.beside: list[subprocess.Popen[bytes]] = []
        """Programs of the operator, until `close`."""
        self._services: dict[str, subprocess.Popen[bytes]] = {}
        self._enabled: list[str] = []
        self._ran: list[str] = []  # when `files` was called
        self._sockets: set[str] = set()  # the names of started socket units
        for directory in ("run", "etc", "var/lib", "opt/progressdb/bin", "usr/bin", "journal", "tmp", "root"):
            (base / directory).mkdir(parents=True)
        (base / "tmp").chmod(0o1777)
        (base / "root").chmod(0o700)
        become = 'setpriv --reuid="$uid" --regid="$uid" $groups' if three_users else ""
        groups = f'[ "$3" = -g ] && groups=--groups={self._uids["minikms"]} || groups=--clear-groups'
        command = 'while [ "$1" != -- ]; do shift; done; shift'
        numbers = " ".join(f"{name}) uid={uid};;" for name, uid in self._uids.items())
        for name, script in {
            "opt/progressdb/bin/minikms": forked.script("minikms"),
            "opt/progressdb/bin/progressdb": forked.script("progressdb_server"),
            "opt/progressdb/bin/minikms-auditor": forked.script("minikms_auditor"),
            "opt/progressdb/bin/minikms-unlock": forked.script("minikms_unlock"),
            "opt/progressdb/bin/minikms-replicator": forked.script("minikms_replicator"),
            **dict.fromkeys(CHANGES_THE_SYSTEM, ":"),
            # -u USER [-g USER -G minikms] -- COMMAND …
            "usr/bin/runuser": f'case "$2" in {numbers} esac; {groups}; {command}; exec {become} "$@"',
            "usr/bin/journalctl": f'exec cat {base}/journal/"$2"',  # -u UNIT …
            "usr/bin/systemctl": f'echo "$*" > {base}/asked; read -r status < {base}/answered; exit "$status"',
        }.items():
            (base / name).write_text(f"#!/bin/sh\n{script}\n")
            (base / name).chmod(0o755)
        for pipe in ("asked", "answered"):
            os.mkfifo(base / pipe)
        path = f"{base}/opt/progressdb/bin:{base}/usr/bin:{os.environ.get('PATH', os.defpath)}"
        self.environ = {"PATH": path, "NO_COLOR": "1"}
        self.environ["TMPDIR"] = str(base / "tmp")

    # --- the operator ----------------------------------------------------------------------------------------------

    def here(self, text: str) -> str:
        """Commands of a document with the paths and the numbers of the users of this machine."""
        text = _PATH.sub(f"{self.base}/", text).replace("127.0.0.1:8080", f"127.0.0.1:{self.port}")
        text = text.replace("ADMIN_UIDS=0", f"ADMIN_UIDS={os.geteuid()}")
        minikms, gid = self._uids["minikms"], self._uids["minikms-auditor"] if self._three_users else os.getegid()
        text = text.replace("-o minikms -g minikms-auditor", f"-o {minikms} -g {gid}")
        text = text.replace("chown minikms:minikms-auditor", f"chown {minikms}:{gid}")
        for name, uid in self._uids.items():
            text = text.replace(f"$(id -u {name})", str(uid))
            text = text.replace(f"-o {name} -g {name}", f"-o {uid} -g {uid}")
            text = re.sub(f"chown (-R )?{name}: ", rf"chown \g<1>{uid}:{uid} ", text)
            text = text.replace(f'user = "{name}"', f"user = {uid}")
        return text

    def at(self, path: str) -> Path:
        """The place of a path that the documents name."""
        return Path(self.here(path))

    def run(self, script: str) -> tuple[int, str]:
        """The exit status and all output of the operator's commands."""
        end = time.monotonic() + RUN_S_MAX
        variables, inherited = forked.for_shells()
        # RDWR: each pipe always has a writer, so that no reader sees its end, and no opening waits.
        asked, answered = (os.open(self.base / pipe, os.O_RDWR | os.O_NONBLOCK) for pipe in ("asked", "answered"))
        try:
            with (
                tempfile.TemporaryFile("w+") as said,
                subprocess.Popen(
                    ["bash", "-c", self.here(script)],
                    cwd=self.base / "tmp",
                    env=self.environ | variables,
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    pass_fds=inherited,
                    start_new_session=True,
                ) as process,
            ):
                try:
                    while process.poll() is None:
                        said.flush()
                        assert time.monotonic() < end, f"{script}\ntook too long"
                        if select.select([asked], [], [], 0.02)[0]:
                            status = self._systemctl(os.read(asked, 4096).decode().split())
                            os.write(answered, b"%d\n" % status)
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                said.seek(0)
                return process.returncode, said.read()
        finally:
            os.close(asked)
            os.close(answered)

    def do(self, script: str) -> str:
        """The output of commands. They must end well."""
        ended, said = self.run(script)
        assert ended == 0, f"{script}\nended with {ended}: {said}"
        return said

    def _systemctl(self, words: list[str]) -> int:
        """Does what a script has asked of the service manager: 0 if that was possible, 1 if not."""
        try:
            getattr(self, f"_{words[0].replace('-', '_')}_units")(words[1:])
        except ServiceError as error:
            print(error, file=sys.stderr)  # pytest shows it if the test fails
            return 1
        return 0

    def export(self, script: str) -> None:
        """Runs commands that set variables for all later ones."""
        ended, said = self.run(f"{script}\nenv -0")
        assert ended == 0, said
        environ = dict(line.split("=", 1) for line in said.split("\0") if line)
        self.environ = {name: value for name, value in environ.items() if name not in forked.for_shells()[0]}

    def on_terminal(self, command: str) -> OnTerminal:
        """Commands that ask on their terminal. The caller types."""
        return OnTerminal(["bash", "-c", self.here(command)], env=self.environ)

    def install(self) -> None:
        """What deploy/systemd/README.md does after the programs and the units are in their places."""
        self._enabled = self.configure()
        self.boot()

    def configure(self) -> list[str]:
        """The same without the start of the units, whose names it returns."""
        script = blocks(UNITS / "README.md")[1]  # the first one installs the package
        begin, end = script.index("install -d -m 755 /etc/progressdb"), script.index("systemctl daemon-reload")
        self.do(script[begin:end])
        with self.at("/etc/progressdb/progressdb.env").open("a") as environment:
            environment.write(f"PROGRESSDB_ADDR=127.0.0.1:{self.port}\n")
        enabled = re.search(r"systemctl enable --now (.*)", script[end:])
        assert enabled is not None
        return enabled[1].split()

    def boot(self) -> None:
        """Starts what is enabled, with an empty /run."""
        shutil.rmtree(self.base / "run")
        (self.base / "run").mkdir()
        self._start_units(self._enabled)

    def files(self) -> Path:
        """A copy of all files of the machine but those in /run. The services may run if nobody writes."""
        self._ran = self._running()
        copy = self.base / "copy"
        self.do(f"rm -rf {copy}\nmkdir {copy}\ncp -a {' '.join(map(str, self._places()))} {copy}")
        return copy

    def put_back(self, copy: Path) -> None:
        """Restores what `files` has copied, and starts what ran then, if it can start in that state.

        Services whose keyring is unchanged go on. Files keep their inodes, to which Landlock rules are bound.
        """
        keyring = "var/lib/progressdb/minikms/keyring.json"
        same = self._running() == self._ran and (self.base / keyring).read_bytes() == (copy / keyring).read_bytes()
        if not same:
            self.close()
        for place in self._places():
            if same and place.name == "var":
                continue
            for path in sorted(place.rglob("*"), reverse=True):  # what a directory holds comes before it
                if not os.path.lexists(copy / path.relative_to(self.base)):
                    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            self.do(f"cp -af {copy / place.name} {self.base}")
        if not same:
            with contextlib.suppress(ServiceError):
                self._start_units(self._ran)

    def _running(self) -> list[str]:
        return [*sorted(self._sockets), *(name for name, process in self._services.items() if process.poll() is None)]

    def _places(self) -> list[Path]:
        return [place for place in (self.base / name for name in ("etc", "var", "root", "backup")) if place.exists()]

    def ended(self) -> list[str]:
        """The enabled services that don't run."""
        enabled = [unit.removesuffix(".service") for unit in self._enabled if not unit.endswith(".socket")]
        return [name for name in enabled if name not in self._running()]

    def misplaced(self) -> list[str]:
        """The files that do not belong to their service, and the flags of a start that were left. Nothing runs."""
        kept = {"/var/lib/progressdb/minikms": "minikms", "/var/lib/progressdb/db": "progressdb"}
        return [
            str(path)
            for place, name in {**kept, "/etc/progressdb/minikms.key": "minikms"}.items()
            for path in (self.at(place), *self.at(place).rglob("*"))
            if path.lstat().st_uid != self._uids[name]
        ] + [str(path) for path in self.at("/run").glob("*.once")]

    def api_key(self, role: str) -> str:
        """The key of a role, such as `backend`, in progressdb.env."""
        text = self.at("/etc/progressdb/progressdb.env").read_text()
        found = re.search(rf"^PROGRESSDB_API_{role.upper()}_KEYS=(.+)$", text, re.MULTILINE)
        assert found is not None
        return found[1]

    def uid(self, user: str) -> int:
        return self._uids[user]

    def pid(self, service: str) -> int:
        return self._services[service].pid

    # --- the service manager ---------------------------------------------------------------------------------------

    def _start_units(self, units: list[str]) -> None:
        for unit in units:
            name, _, kind = unit.partition(".")
            if kind == "socket":
                assert unit in self._sockets or name not in self._services, "systemd starts no socket of what runs"
                self._sockets.add(unit)
                if _is_on_demand(name) and name not in self._services:
                    self._start(name)
            elif name not in self._services:
                self._start(name)

    def _daemon_reload_units(self, units: list[str]) -> None:
        """The units are read at each start."""

    def _enable_units(self, units: list[str]) -> None:
        assert units[0] == "--now"
        self._enabled += units[1:]
        self._start_units(units[1:])

    def _reload_units(self, units: list[str]) -> None:
        for unit in units:
            self._services[unit.removesuffix(".service")].send_signal(signal.SIGHUP)

    def _disable_units(self, units: list[str]) -> None:
        assert units[0] == "--now"
        self._enabled = [unit for unit in self._enabled if unit not in units]
        self._stop_units(units[1:])

    def _stop_units(self, units: list[str]) -> None:
        self._sockets -= set(units)
        for name, _, kind in [unit.partition(".") for unit in units]:
            if kind == "socket" and not _is_on_demand(name):
                continue
            assert f"{name}.socket" not in self._sockets, f"the next client of {name}.socket starts it again"
            self._stop(name)

    def _restart_units(self, units: list[str]) -> None:
        for name in [unit.removesuffix(".service") for unit in units]:
            self._stop(name)
            self._start(name)

    def _start(self, name: str) -> None:
        lines = restricted.loaded(f"{name}.service", etc=self.at("/etc/systemd/system"))
        unit = {key: self.here(value) for key, value in lines}
        uid = self._uids[unit["User"]]
        for kind, place in (("Runtime", "/run"), ("State", "/var/lib")):
            if f"{kind}Directory" in unit:
                directory = self.base / place[1:] / unit[f"{kind}Directory"]
                directory.mkdir(parents=True, exist_ok=True)
                directory.chmod(int(unit.get(f"{kind}DirectoryMode", "0755"), 8))
                if self._three_users:
                    os.chown(directory, uid, uid)
        environ = self._environment(lines)
        words = [
            word
            for listed in shlex.split(_ONE_WORD.sub(lambda found: environ[found[1]], unit["ExecStart"]))
            for word in (environ[listed[1:]].split() if listed.startswith("$") else [listed])
        ]
        user: dict[str, Any] = {}
        if f"{name}.socket" in self._sockets and self._passes_socket:
            group = self._uids[dict(restricted.loaded(f"{name}.socket", "[Socket]"))["SocketGroup"]]
            flags = ["--each", str(group)] if _is_on_demand(name) else []
            self._listens_at(name).parent.mkdir(parents=True, exist_ok=True)
            words = [sys.executable, service_manager.__file__, *flags, str(self._listens_at(name)), str(uid), *words]
        elif self._three_users:
            groups = [self._uids[group] for group in unit.get("SupplementaryGroups", "").split()]
            user = {"user": uid, "group": uid, "extra_groups": groups}
        notify = self.base / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
            notified.bind(str(notify))
            notify.chmod(0o666)
            environ["NOTIFY_SOCKET"] = str(notify)
            with self._journal(name).open("ab") as log:
                self._services[name] = subprocess.Popen(
                    words,
                    cwd="/",
                    env=environ,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    umask=int(unit["UMask"], 8),
                    **user,
                )
            try:
                if unit.get("Type") == "notify":
                    self._wait(name, lambda: _is_ready(notified))
                elif _is_on_demand(name):
                    self._wait(name, self._listens_at(name).exists)
            except ServiceError:
                self._stop(name)
                raise
            finally:
                notify.unlink()

    def _listens_at(self, name: str) -> Path:
        """The socket of its socket unit."""
        return self.at(dict(restricted.loaded(f"{name}.socket", "[Socket]"))["ListenStream"])

    def _journal(self, name: str) -> Path:
        return self.base / "journal" / name

    def _wait(self, name: str, holds: Callable[[], bool]) -> None:
        end = time.monotonic() + READY_S_MAX
        while not holds():
            if self._services[name].poll() is not None or time.monotonic() > end:
                raise ServiceError(self._journal(name).read_text())
            time.sleep(0.02)

    def _environment(self, lines: list[tuple[str, str]]) -> dict[str, str]:
        environ = {"PATH": os.defpath}
        environ |= dict(self.here(value).split("=", 1) for key, value in lines if key == "Environment")
        for key, value in lines:
            if key == "EnvironmentFile":
                file = self.at(value.removeprefix("-"))
                if file.exists() or not value.startswith("-"):
                    environ |= dict(word.split("=", 1) for word in shlex.split(file.read_text()))
        return environ

    def _stop(self, name: str) -> None:
        process = self._services.pop(name, None)
        if process is None:
            return
        process.terminate()
        try:
            process.wait(READY_S_MAX)
        finally:
            process.kill()
        unit = dict(restricted.loaded(f"{name}.service"))
        last = self.here(unit.get("ExecStopPost", "+true"))
        assert last.startswith("+"), "the service's own user can't remove files in /run"
        subprocess.run(shlex.split(last[1:]), check=True)
        if (UNITS / f"{name.partition('@')[0]}.socket").exists():
            self._listens_at(name).unlink(missing_ok=True)  # a daemon leaves one that it was passed
        if unit.get("RuntimeDirectoryPreserve") != "yes":
            shutil.rmtree(self.at("/run") / name, ignore_errors=True)

    def close(self) -> None:
        """Stops the services, the last one first."""
        while self.beside:
            with self.beside.pop() as process:
                process.kill()
        self._sockets.clear()
        for name in reversed(list(self._services)):
            self._stop(name)


@contextmanager
def machine(*, socket_unit: bool = True, uid_min: int = UID_MIN, users: Sequence[str] = ()) -> Iterator[Machine]:
    """A machine that is removed at the end, with those `users` too, from `uid_min` on, where this user may."""
    needs.program("openssl")
    uids = {name: uid_min + number for number, name in enumerate((*USERS, *users))}
    three_users = os.geteuid() == 0 and all(needs.runs_as(uid) for uid in uids.values())
    if three_users:
        needs.program("setpriv")
    base = Path(tempfile.mkdtemp(prefix="runbook-", dir="/tmp"))
    try:
        base.chmod(0o711)
        made = Machine(base, uids, own=three_users, socket_unit=socket_unit)
        try:
            yield made
        finally:
            made.close()
    finally:
        shutil.rmtree(base)
