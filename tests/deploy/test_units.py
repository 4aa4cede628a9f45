"""The shipped systemd units: correct, tight, and not tighter than the programs can live with."""

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from minikms.commands.usage import EXIT_FAILED, EXIT_GOOD, EXIT_MISSING
from minikms.platform.directory_lock import DataDirLock
from progressdb_server.store import keyspace, local
from progressdb_server.store.epoch import SeenState
from progressdb_server.store.rocks.engine import RocksEngine
from tests import needs
from tests.deploy import restricted
from tests.harness import forked
from tests.harness.certificates import SERVER, Authority
from tests.harness.gateways import DAEMON, GATEWAY, POLICY, Pair
from tests.harness.live_daemon import LiveDaemon
from tests.harness.ports import free_port
from tests.harness.waiting import wait_for_start, wait_until

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
EXPOSURE_MAX = {
    "minikms.service": 0.5,
    "minikms-auditor.service": 1.5,
    "minikms-gateway.service": 1.5,
    "minikms-replicator.service": 1.5,
    "minikms-unlock.service": 1.0,
    "progressdb.service": 1.5,
}
RUNNING = sorted(EXPOSURE_MAX.keys() - {"minikms-unlock.service"})
"""Units whose service does not end by itself."""
TEMPLATES = sorted(path.name for path in UNITS.glob("*@.*") if path.is_file())
_NAME = "(minikms(-unlock|-metrics)?|progressdb)"
NAME_OF_TENANT = re.compile(rf"(?<=/run/){_NAME}|(?<=/(etc|lib)/)progressdb|^{_NAME}\b(?!\.)")
LISTS = {
    "EnvironmentFile", "ExecStart", "ExecStopPost", "ListenStream", "ReadWritePaths", "RuntimeDirectory",
    "StateDirectory", "SupplementaryGroups", "Symlinks",
}  # fmt: skip
"""Directives of which a drop-in adds a value, unless it removes those before it."""
GROUPS_OF_SYSTEMD_252 = {"@system-service", "@privileged", "@resources"}
"""Those that the units name. A group that systemd does not know is ignored, and its calls are then denied."""
GATEWAY_TOML = """
version = 1
listen = "127.0.0.1:PORT"
kms_socket = "/s"
tls = { cert = "server.pem", key = "server.key" }
[[client_ca]]
file = "clients.pem"
trust_domains = ["prod"]
"""
SELF_RESTRICTION = {"landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self", "seccomp"}


def analyze(*arguments: str) -> str:
    program = needs.program("systemd-analyze")
    needs.systemd_directory()
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_units_are_valid(tmp_path: Path) -> None:
    """With executables in the place of /opt/progressdb/bin, which this machine need not have."""
    programs = ("minikms", "minikms-auditor", "minikms-gateway", "minikms-replicator", "minikms-unlock", "progressdb",
                "progressdb-backup")  # fmt: skip
    for name in programs:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    units = [path for path in UNITS.rglob("*.*") if path.suffix in (".service", ".socket", ".timer", ".conf")]
    for unit in units:
        copy = tmp_path / unit.relative_to(UNITS)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(unit.read_text().replace("/opt/progressdb/bin/", f"{tmp_path}/"))
    assert analyze("verify", *(str(tmp_path / unit.name) for unit in units if unit.parent == UNITS)) == ""


def test_the_units_run_what_the_package_has_or_depends_on() -> None:
    """Essential programs, and one of systemd. The package of the program kill(1) is not essential."""
    lines = [line for path in UNITS.glob("*.service") for line in restricted.directives(str(path))]
    programs = {value.lstrip("+-").split()[0] for name, value in lines if name.startswith("Exec")}
    others = {program for program in programs if not program.startswith("/opt/progressdb/bin/")}
    assert others == {"/bin/sh", "/bin/rm", "/lib/systemd/systemd-socket-proxyd"}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_tenants_unit_is_the_plain_one_with_other_names(template: str) -> None:
    """Its drop-in replaces each line that has a name of the plain unit's, and nothing else."""
    section = "[Socket]" if template.endswith(".socket") else "[Service]"
    assert (UNITS / template).readlink() == Path(template.replace("@", ""))
    plain = restricted.directives(str(UNITS / template), section)
    named = [(name, NAME_OF_TENANT.sub(r"\g<0>-%i", value).replace("8080", "${PORT}")) for name, value in plain]
    drop_in = restricted.directives(str(UNITS / f"{template}.d" / "tenant.conf"), section)
    removed = {name for name, value in drop_in if not value}
    modes = {line for line in plain if line[0] in {f"{name}Mode" for name in removed}}  # systemd resets these too
    replaced = {line for line in named if line[0] != "Symlinks"} - set(plain)
    assert {line for line in drop_in if line[1]} == replaced | modes
    assert removed == LISTS & {name for name, value in named if "%i" in value}
    assert removed & {name for name, value in named if "%i" not in value} == set()


@pytest.mark.parametrize("unit", EXPOSURE_MAX)
def test_the_units_leave_little_exposed(unit: str) -> None:
    told = analyze("security", "--offline=true", "--no-pager", str(UNITS / unit))
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)
    assert exposure is not None and float(exposure[1]) <= EXPOSURE_MAX[unit], told


@pytest.mark.parametrize("unit", EXPOSURE_MAX)
def test_the_filters_name_only_groups_that_systemd_252_knows(unit: str) -> None:
    """Debian 12 and RHEL 9 have systemd 252, which lacks @sandbox."""
    filters = [value for name, value in restricted.directives(str(UNITS / unit)) if name == "SystemCallFilter"]
    assert {word for value in filters for word in value.lstrip("~").split() if "@" in word} <= GROUPS_OF_SYSTEMD_252


@pytest.mark.parametrize("unit", RUNNING)
def test_no_unit_starts_again_what_a_person_must_correct(unit: str) -> None:
    """Neither a client of the socket nor the message server's own start starts the key service without an end."""
    assert ("RestartPreventExitStatus", str(EXIT_MISSING)) in restricted.directives(str(UNITS / unit))
    assert re.search("^TriggerLimitBurst=[1-9]$", (UNITS / "minikms.socket").read_text(), re.MULTILINE)
    assert not re.search("^(Wants|Requires)=", (UNITS / unit).read_text(), re.MULTILINE)


@pytest.mark.parametrize("unit", RUNNING)
def test_no_start_is_ended_because_it_takes_long(unit: str) -> None:
    """It would be repeated without an end."""
    assert ("TimeoutStartSec", "infinity") in restricted.directives(str(UNITS / unit))


def test_no_limit_of_starts_ends_the_unlock_service() -> None:
    """A provider may be away for days, and each question starts it. It listens as root, for the key service's group."""
    service = restricted.directives(str(UNITS / "minikms-unlock.service"), "[Unit]")
    listener = restricted.directives(str(UNITS / "minikms-unlock.socket"), "[Socket]")
    assert ("StartLimitIntervalSec", "0") in service and ("TriggerLimitIntervalSec", "0") in listener
    assert dict(listener).items() >= {"SocketGroup": "minikms", "SocketMode": "0660"}.items()
    assert "SocketUser" not in dict(listener)
    assert ("Requires", "%N.socket") in service  # it ends with its socket


def test_a_start_of_the_unlock_service_that_fails_is_not_repeated_at_once() -> None:
    """Its question waits at the socket, which would start it again some fifty times a second."""
    service = restricted.directives(str(UNITS / "minikms-unlock.service"))
    assert dict(service).items() >= {"Restart": "on-failure", "RestartSec": "1s"}.items()
    assert "RestartPreventExitStatus" not in dict(service)


def test_the_memory_of_the_unlock_service_is_bounded() -> None:
    """Not every library of a provider bounds the answer that it reads."""
    assert ("MemoryMax", "512M") in restricted.directives(str(UNITS / "minikms-unlock.service"))


def make_store(path: Path) -> RocksEngine:
    path.mkdir(parents=True)
    engine = RocksEngine(str(path))
    local.claim(engine)
    return engine


@pytest.mark.parametrize(
    ("program", "words", "status"),
    [
        ("minikms", "--data-dir DIR/kms --socket DIR/s --master-key-file DIR/missing", EXIT_MISSING),
        ("minikms", "--data-dir DIR/kms --socket DIR/s --master-key-file DIR/wrong", EXIT_MISSING),
        ("minikms", "--data-dir DIR/kms --socket DIR/s --audit-keep-days Z", EXIT_MISSING),
        ("minikms", "--data-dir DIR/locked --socket DIR/s --master-key-file DIR/wrong", EXIT_FAILED),
        ("minikms_auditor", "--config DIR/missing", EXIT_MISSING),
        ("minikms_gateway", "--config DIR/missing", EXIT_MISSING),
        ("minikms_gateway", "--config DIR/gateway.toml", EXIT_FAILED),
        ("minikms_replicator", "--config DIR/missing", EXIT_MISSING),
        ("progressdb_server", "--config DIR/missing", EXIT_MISSING),
        ("progressdb_server", "--db DIR/db --dev --addr 127.0.0.1:PORT", EXIT_FAILED),
        ("progressdb_server", "--db DIR/newer --dev --addr 127.0.0.1:0", EXIT_MISSING),
        ("progressdb_server", "--db DIR/damaged --dev --addr 127.0.0.1:0", EXIT_MISSING),
        ("progressdb_server", "--db DIR/restored --dev --addr 127.0.0.1:0", EXIT_MISSING),
        ("progressdb_server", "--db DIR/open --dev --addr 127.0.0.1:0", EXIT_FAILED),
    ],
)
def test_a_start_that_may_succeed_later_has_another_status(
    tmp_path: Path, program: str, words: str, status: int
) -> None:
    """The data directory, the store or the port is in use."""
    stores = {name: make_store(tmp_path / name / "store") for name in ("newer", "restored", "damaged", "open")}
    stores["newer"].write([(keyspace.FORMAT, b'{"format": 99}')])
    stores["restored"].write([(keyspace.EPOCH, msgspec.json.encode(SeenState(9, "another", 0, "")))])
    for name in ("newer", "restored", "damaged"):
        stores[name].close()
    (tmp_path / "damaged" / "store" / "CURRENT").write_text("MANIFEST-999999\n")
    for name, digit in ("right", "a"), ("wrong", "b"):
        (tmp_path / name).touch(0o600)
        (tmp_path / name).write_text(digit * 64)
    make = ("minikms", "init", "--data-dir", tmp_path / "kms", "--master-key-file", tmp_path / "right")
    if "wrong" in words:
        assert forked.run(*make).returncode == EXIT_GOOD
    Authority("root").issue(dns=["gateway.internal"], extended=[SERVER]).write(tmp_path, "server")
    (tmp_path / "clients.pem").write_bytes(Authority("clients").pem)
    with DataDirLock(str(tmp_path / "locked")), socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        (tmp_path / "gateway.toml").write_text(GATEWAY_TOML.replace("PORT", port))
        ended = forked.run(program, *words.replace("DIR", str(tmp_path)).replace("PORT", port).split())
    stores["open"].close()
    assert ended.returncode == status and "Traceback" not in ended.stderr, ended.stderr


def test_the_key_service_may_restrict_itself_further() -> None:
    needs.program("systemd-analyze")
    allowed = restricted.allowed_calls(restricted.directives(str(UNITS / "minikms.service")))
    assert allowed >= SELF_RESTRICTION | {"memfd_secret"}


@pytest.mark.parametrize("unit", EXPOSURE_MAX)
def test_no_unit_makes_peers_appear_as_the_overflow_uid(unit: str) -> None:
    assert "PrivateUsers" not in dict(restricted.directives(str(UNITS / unit)))


def test_the_services_are_two_users_and_the_server_spawns_no_key_service() -> None:
    key_service = dict(restricted.directives(str(UNITS / "minikms.service")))
    server = restricted.directives(str(UNITS / "progressdb.service"))
    assert key_service["User"] != dict(server)["User"]
    assert ("Environment", "PROGRESSDB_KMS_SPAWN=0") in server
    declared = (UNITS / "progressdb.sysusers").read_text()
    for user in (key_service["User"], dict(server)["User"]):
        assert re.search(rf"^u {user} ", declared, re.MULTILINE)


def test_what_the_units_forbid_is_not_needed_by_the_key_service(tmp_path: Path) -> None:
    """The daemon under its unit's restrictions, put on by restricted.py: it serves, and hardens itself further."""
    needs.root()
    needs.program("systemd-analyze")
    needs.program("mount")
    unshare = needs.namespaces("mount", "net", "ipc")
    launcher = Path(restricted.__file__)
    wrapped = (unshare, "--mount", "--net", "--ipc", sys.executable, str(launcher), str(UNITS / "minikms.service"))
    with LiveDaemon(tmp_path, "file", program=(*wrapped, str(tmp_path))) as daemon, daemon.client() as client:
        key = client.create_dek_for_thread("thread")
        sealed = client.encrypt(key.key_id, b"text")
        assert client.rotate_kek().rewrapped == 1
        assert client.prune_kek(backups=True).destroyed == [1]
        assert client.decrypt(key.key_id, sealed) == b"text"
        status = client.status()
        kernel = Path(f"/proc/{daemon.pid}/status").read_text()
        daemon.process.terminate()
        assert daemon.process.wait(60) == 0
    assert status.memory.arena == "memfd_secret"
    missing = {measure.measure: measure.why for measure in status.hardening if not measure.in_force}
    assert missing.keys() <= {"memory_locked"}, missing
    assert int(re.search(r"Seccomp_filters:\t(\d+)", kernel)[1]) >= 2  # type: ignore[index]  # the line is always there


def test_what_the_units_forbid_is_not_needed_by_the_message_server(tmp_path: Path) -> None:
    """The server under its unit's restrictions, with a key service that it did not start: it stores and reads back."""
    needs.root()
    needs.program("systemd-analyze")
    needs.program("mount")
    unshare = needs.namespaces("mount", "net", "ipc")
    database = tmp_path / "db"
    database.mkdir(0o700)
    port = free_port()
    with LiveDaemon(tmp_path, "file") as daemon, (tmp_path / "server-log").open("wb") as log:
        environ = {
            **os.environ,
            "PROGRESSDB_KMS_SOCKET": str(daemon.socket),
            "PROGRESSDB_KMS_SPAWN": "0",
            "PROGRESSDB_API_BACKEND_KEYS": "key",
        }
        command = [unshare, "--mount", "--ipc", sys.executable, restricted.__file__, str(UNITS / "progressdb.service")]
        command += [str(database), sys.executable, "-m", "progressdb_server", "--addr", f"127.0.0.1:{port}"]
        process = subprocess.Popen([*command, "--db", str(database)], env=environ, stdout=log, stderr=log)
        try:
            wait_for_start(process, lambda: ask(port, "GET", "/healthz") is not None, tmp_path / "server-log")
            answer = ask(port, "POST", "/v1/threads", {"title": "t", "author": "a"})
            assert answer is not None
            thread = answer["id"]
            for number in range(50):
                message = {"thread": thread, "author": "a", "role": "user", "body": {"text": str(number)}}
                assert ask(port, "POST", "/v1/messages", message) is not None
            listed = ask(port, "GET", f"/v1/messages?thread={thread}")
        finally:
            process.terminate()
            status = process.wait(60)
    assert listed is not None
    assert [message["body"]["text"] for message in listed["messages"]] == [str(number) for number in range(50)]
    assert status == 0, (tmp_path / "server-log").read_text()


def test_what_the_units_forbid_is_not_needed_by_the_gateway(tmp_path: Path) -> None:
    """The gateway under its unit's restrictions, which run it as root: it takes up changed files, and serves."""
    needs.interpreter_for(DAEMON)
    needs.program("systemd-analyze")
    needs.program("mount")
    launcher = [needs.namespaces("mount", "ipc"), "--mount", "--ipc", sys.executable, restricted.__file__]
    launcher += [str(UNITS / "minikms-gateway.service"), str(tmp_path)]
    policy = POLICY.replace('"uid:0"', '"uid:1"').replace(f"uid:{GATEWAY}", "uid:0")
    with Pair(policy=policy, daemon_uid=DAEMON, crl=True, under=launcher) as pair:
        gateway, shown = pair.gateway, pair.client()
        assert gateway.process is not None
        with gateway.caller(shown) as caller:
            assert caller.post("/create_dek_for_thread", {"thread_id": "thread"}).status == 200
            gateway.revoke(shown)
            wait_until(lambda: gateway.refused("revoked") > 0)
        kernel = Path(f"/proc/{gateway.process.pid}/status").read_text()
        gateway.stop()
        missing = set(re.findall(r"measure=(\w+)", gateway.log.read_text()))
    assert missing <= {"memory_locked"}, missing
    assert int(re.search(r"Seccomp_filters:\t(\d+)", kernel)[1]) >= 2  # type: ignore[index]  # the line is always there


def test_what_the_unit_forbids_is_not_needed_by_the_port_of_the_metrics(tmp_path: Path) -> None:
    """The proxy under its unit's restrictions, started by the first connection to its port."""
    needs.root()
    needs.program("systemd-analyze")
    needs.program("mount")
    unit = str(UNITS / "minikms-metrics.service")
    *program, _ = dict(restricted.directives(unit))["ExecStart"].split()
    port, unshare = free_port(), needs.namespaces("mount", "net", "ipc")
    with LiveDaemon(tmp_path, "file") as daemon:
        command = [needs.program("systemd-socket-activate"), f"--listen=127.0.0.1:{port}", unshare, "--mount", "--net"]
        command += ["--ipc", sys.executable, restricted.__file__, unit, str(tmp_path), *program, str(daemon.socket)]
        with subprocess.Popen(command) as process:
            try:
                wait_until(lambda: ask(port, "GET", "/status"))
            finally:
                process.kill()


def ask(port: int, method: str, path: str, body: object = None) -> dict[str, Any] | None:
    """The answer's object; None when there is no good one."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        try:
            headers = {"X-API-Key": "key", "X-User-ID": "a"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            content: dict[str, Any] = json.loads(answer.read())
        except (OSError, ValueError):
            return None
    return content if answer.status < 300 else None


def test_the_restrictions_of_that_test_do_restrict(tmp_path: Path) -> None:
    """A program under them can neither write elsewhere nor open a network socket nor map code that it wrote."""
    needs.root()
    needs.program("systemd-analyze")
    needs.program("mount")
    unshare = needs.namespaces("mount", "net", "ipc")
    attempts = """
import mmap, os, socket
def attempt(action):
    try:
        action()
    except OSError as error:
        return type(error).__name__ + str(error.errno)
    return "allowed"
print(
    attempt(lambda: open("/etc/new", "w")),
    attempt(lambda: socket.socket(socket.AF_INET)),
    attempt(lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)),
    attempt(lambda: os.chown("/", 0, 0)),
    attempt(lambda: open("/proc/sys/kernel/overflowuid")),
    attempt(lambda: os.open("/dev/kmsg", os.O_RDONLY)),
    attempt(lambda: os.setpriority(os.PRIO_PROCESS, 0, 19)),
    attempt(lambda: os.sched_setaffinity(0, os.sched_getaffinity(0))),
)
"""
    launcher = [unshare, "--mount", "--net", "--ipc", sys.executable, restricted.__file__]
    done = subprocess.run(
        [*launcher, str(UNITS / "minikms.service"), str(tmp_path), sys.executable, "-c", attempts],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    read_only, denied, missing = f"OSError{30}", "PermissionError1", "FileNotFoundError2"
    kept = [read_only, denied, "PermissionError13", denied, missing, missing, denied]
    assert done.stdout.split() == [*kept, "allowed"], done.stderr


def test_the_commands_of_the_units_take_the_flags_that_they_are_given() -> None:
    """Parsed by the real commands: they get as far as looking for the files that the unit names."""
    for unit, program in (("minikms.service", "minikms"), ("progressdb.service", "progressdb_server")):
        words = dict(restricted.directives(str(UNITS / unit)))["ExecStart"].split()[1:]
        shown = subprocess.run(
            [sys.executable, "-m", program, "--help"], capture_output=True, text=True, timeout=60, check=False
        ).stdout
        for flag in (word for word in words if word.startswith("--")):
            assert flag in shown, f"{program} {flag}"
