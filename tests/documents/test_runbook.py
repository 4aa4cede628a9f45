"""The runbook's commands do what it says, section by section, on a machine where just that has happened.

As root the commands and the services run as the three users of deploy/systemd.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minikms.api import CONNECTIONS_MAX
from progressdb_server.store import epoch, places
from progressdb_server.store.local import LocalReads
from tests import needs
from tests.documents.machine import UID_MIN, UNITS, Machine, blocks, machine
from tests.harness.vaults import opened_vault
from tests.harness.waiting import wait_until

LINES_MIN = 20
"""More than a restored key service writes until the server has judged it."""
AUDITOR_TOML = "/etc/progressdb/auditor/auditor.toml"
RUNBOOK = Path(__file__).resolve().parents[2] / "docs" / "runbook.md"
ALL_SECTIONS = {
    title: re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    for title, text in re.findall(r"(?m)^## (.+)\n((?:(?!## ).*\n?)*)", RUNBOOK.read_text("utf-8"))
}
OF_PROVIDERS = (
    "Move the root key",
    "Move to a TPM",
    "Move to an HSM",
    "Move to a cloud KMS",
    "The HSM is gone",
    "The root key was taken back",
)
OF_SEVERAL_HOSTS = (
    "A host of the key service is lost",
    "Replace a host",
    "Move to other hosts",
    "The database of the key service is away",
    "The database differs from its hosts",
    "Go back to one host",
)
ELSEWHERE = {"A certificate has expired", "The SIEM is away", *OF_PROVIDERS, *OF_SEVERAL_HOSTS}
"""Sections whose commands other tests run: `test_other_hosts.py`, `tests/minikms_auditor/test_runbook_of_sinks.py`,
`test_runbook_of_root_keys.py`, `test_several_key_hosts.py`.
"""
SECTIONS = {title: listed for title, listed in ALL_SECTIONS.items() if title not in ELSEWHERE}
SECTIONS["Move to another machine"] += SECTIONS["Restore"][-2:]  # as its text says


def call_server(made: Machine, target: str, body: object = None, *, request_id: str | None = None) -> Any:
    """A request of a backend for the user Ada."""
    url = f"http://127.0.0.1:{made.port}{target}"
    headers = {"X-API-Key": made.api_key("backend"), "X-User-ID": "ada"}
    if request_id is not None:
        headers["X-Request-Id"] = request_id
    data = None if body is None else json.dumps(body).encode()
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(urllib.request.Request(url, data, headers), timeout=60) as answer:
        assert answer.status == 200
        return json.load(answer)


def store_message(made: Machine) -> None:
    call_server(made, "/v1/threads/thread-1/messages", {"body": 1})


def prepare(made: Machine, *, recommended: bool = True) -> None:
    """Installs both services; there is a message in the store, and a backup of Monday. `recommended`: with a policy
    file, and the audit log in a directory of its own."""
    made.install()
    made.export(blocks(RUNBOOK)[0])
    if recommended:
        a_policy_holds(made)
        the_log_lies_apart(made)
    made.do("install -d -m 700 -o minikms -g minikms /backup")
    store_message(made)
    made.do("runuser -u minikms -- minikms backup create /backup/monday.minikms")


def unseal_with_shares(made: Machine, block: str) -> None:
    """Two people's shares, typed on a terminal."""
    texts = [file.read_text("ascii").strip() for file in sorted(made.at("/backup/shares").iterdir())]
    with made.on_terminal(block) as terminal:
        for count, text in enumerate(texts[:2], 1):
            terminal.wait_for("Share or root key", times=count)
            terminal.type(text)
        assert terminal.wait() == 0, terminal.shown


def follow(made: Machine, title: str) -> str:
    """Runs each block of a section, as a person pastes it. It must end well. Returns what the last one has printed."""
    HAPPENED.get(title, as_it_is)(made)
    said = ""
    for block in SECTIONS[title]:
        if "minikms unseal\n" in block:
            unseal_with_shares(made, block)
        else:
            said = made.do(with_names(made, block, said))
    return said


def with_names(made: Machine, block: str, said: str) -> str:
    """SLOT and LOG-KEY are those that the block before it has shown, KEY_ID that of a key file without content."""
    if "SLOT" in block:
        block = block.replace("SLOT", re.findall(r"(?m)^Slot (s[0-9]+):", said)[-1])
    if "LOG-KEY" in block:
        block = block.replace("LOG-KEY", re.findall(r"log key +(\S+)", said)[0])
    if "BACKUP" in block:
        block = block.replace("BACKUP", re.findall(r"rotation backups are damaged, first (\S+);", said)[0])
    if "KEY_ID" in block:
        [key_id] = [file.stem for file in key_files(made) if not file.read_bytes()]
        block = block.replace("KEY_ID", key_id)
    return block


def key_files(made: Machine) -> list[Path]:
    return sorted(made.at("/var/lib/progressdb/minikms/kms-deks").glob("*.json"))


def as_it_is(made: Machine) -> None:
    """Nothing has happened."""


def the_socket_is_removed(made: Machine) -> None:
    """The server is down, and the key service runs where nobody reaches it."""
    made.do("systemctl stop progressdb")
    made.at("/run/minikms/minikms.sock").unlink()


def a_key_file_is_damaged(made: Machine) -> None:
    key_files(made)[0].write_bytes(b"")


def a_block_is_damaged(made: Machine) -> None:
    """Of a file, which a start makes of the log."""
    for number in range(10):
        call_server(made, f"/v1/threads/thread-{number}/messages", {"body": "x" * 4000})
    made.do("systemctl restart progressdb")
    made.do("systemctl stop progressdb")
    table = max(made.at("/var/lib/progressdb/db/store").glob("*.sst"), key=lambda file: file.stat().st_size)
    with table.open("r+b") as file:
        file.seek(table.stat().st_size // 2)
        file.write(b"damage")


def the_keyring_is_damaged(made: Machine) -> None:
    made.at("/var/lib/progressdb/minikms/keyring.json").write_bytes(b"{")


def the_root_key_was_changed(made: Machine) -> None:
    follow(made, "Change the root key")


def a_line_was_edited(made: Machine) -> None:
    """The server has seen more lines than the new log will have."""
    the_server_has_seen_a_longer_audit_log(made)
    log = Path(made.environ["LOG"]) / "minikms-audit.log"
    log.write_bytes(log.read_bytes().replace(b'"create_dek"', b'"create_dok"', 1))


def a_thread_was_read(made: Machine) -> None:
    """Another one was read too, by a request whose id begins with the same characters."""
    store_message(made)
    call_server(made, "/v1/threads/thread-1/messages", request_id="r")
    call_server(made, "/v1/threads/thread-2/messages", {"body": 1})
    call_server(made, "/v1/threads/thread-2/messages", request_id="r-2")


def the_server_has_seen_a_longer_audit_log(made: Machine) -> None:
    """So it refuses the restored key service, whose log is new, until its operator accepts that."""
    for _ in range(LINES_MIN):
        store_message(made)

    def remembered_lines() -> int:
        time.sleep(1)  # a look takes a tenth of a second of the processor
        with places.open_reader(str(made.at("/var/lib/progressdb/db/store"))) as reader:
            known = asyncio.run(epoch.seen_state(LocalReads(reader)))
        return known.head_seq if known else 0

    wait_until(lambda: remembered_lines() >= LINES_MIN, seconds=120)


def somebody_sealed_it(made: Machine) -> None:
    made.do("minikms seal --yes")


def the_key_file_is_lost(made: Machine) -> None:
    """The shares are there."""
    made.do("minikms root add shares:2/3 --shares-dir /backup/shares --yes")
    made.do("systemctl stop minikms.socket minikms")
    made.at("/etc/progressdb/minikms.key").unlink()


def the_log_lies_apart(made: Machine) -> None:
    if not made.environ["AUDIT"]:
        follow(made, "Give the audit log a directory of its own")
        made.export(blocks(RUNBOOK)[0])


def a_rotation_backup_is_damaged(made: Machine) -> None:
    """The status names it once the start has read all of them."""
    made.do("minikms rotate-kek --yes")
    [journal] = made.at("/var/lib/progressdb/minikms/kms-deks-backup").rglob("*.journal")
    with journal.open("r+b") as file:
        file.seek(700)
        file.write(os.urandom(400))
    made.do("systemctl restart minikms")
    wait_until(lambda: "rotation backups are damaged" in made.do("minikms status"), seconds=60)
    assert made.run("minikms kek prune --backups --yes")[0] == 1
    assert journal.exists()


def the_operator_has_too_many_connections(made: Machine) -> None:
    if os.geteuid() != 0:
        return  # then all users are one
    program = (
        "import resource, socket, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, [resource.getrlimit(resource.RLIMIT_NOFILE)[1]] * 2)\n"
        f"held = [socket.socket(socket.AF_UNIX) for _ in range({CONNECTIONS_MAX // 2})]\n"
        "for each in held:\n    each.connect(sys.argv[1])\n"
        "print(flush=True)\n"
        "sys.stdin.read()"
    )
    words = [sys.executable, "-c", program, str(made.at("/run/minikms/minikms.sock"))]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    made.beside.append(process)
    assert process.stdout is not None and process.stdout.readline() == b"\n"


def the_machine_is_lost(made: Machine) -> None:
    """This one is the new machine, too: it has what was copied from it."""
    made.do("runuser -u progressdb -- progressdb backup create monday --store-only")
    copy_what_moves(made, made)


def copy_what_moves(old: Machine, new: Machine) -> None:
    new.do("install -d -m 700 /root/from")
    for path in ("/backup/monday.minikms", "/var/lib/progressdb/db/backups/monday", "/etc/progressdb/minikms.key"):
        new.do(f"cp -r {old.at(path)} /root/from/")


def a_policy_holds(made: Machine, limits: str = "", *, runs: bool = True) -> None:
    """As deploy/systemd/README.md says. `limits`: of the operators, who have all roles then. `runs`: the key service
    does."""
    script, restart, _ = blocks(UNITS / "README.md")[2].partition("systemctl")
    made.do(script.replace("deploy/policy.toml", str(UNITS.parent / "policy.toml")))
    policy = made.at("/etc/progressdb/policy/policy.toml")
    text = policy.read_text().replace('"uid:0"', f'"uid:{os.geteuid()}"')
    if limits:
        text = text.replace('["monitor", "rotate"', '["data_key", "create", "decrypt", "monitor", "rotate"')
        text = text.replace('"unseal"]\n', f'"unseal"]\nlimits = {{ {limits} }}\n')
    policy.write_text(text)
    if runs:
        made.do(f"{restart} restart minikms")


def a_limit_is_used_up(made: Machine) -> None:
    a_policy_holds(made, "decrypts_per_hour = 1")
    made.do("echo text > plain")
    made.do("minikms encrypt plain")
    made.do("minikms decrypt plain.kms --output -")
    assert made.run("minikms decrypt plain.kms --output -")[0] == 1


def an_auditor_is_attached(made: Machine) -> None:
    """As deploy/systemd/README.md says. Its tree has the lines that there were."""
    a_policy_holds(made)
    the_log_lies_apart(made)
    [block] = [block for block in blocks(UNITS / "README.md") if "signer.key" in block]
    made.do(block)
    asked = f"runuser -u minikms-auditor -- minikms-auditor {{}} --config {AUDITOR_TOML}"
    waiting = re.compile(r"accept-log (\S{44})")
    wait_until(lambda: waiting.search(made.run(asked.format("accept-log"))[1]), seconds=120)
    [key] = waiting.findall(made.run(asked.format("accept-log"))[1])
    made.do(asked.format(f"accept-log {key}"))
    wait_until(lambda: made.run(asked.format("checkpoint"))[0] == 0, seconds=120)


HAPPENED: dict[str, Callable[[Machine], None]] = {
    "It does not answer": the_socket_is_removed,
    "A key has leaked": the_root_key_was_changed,
    "Only the keyring is damaged": the_keyring_is_damaged,
    "One key file is damaged": a_key_file_is_damaged,
    "The store is damaged": a_block_is_damaged,
    "Connections wait": the_operator_has_too_many_connections,
    "Move to another machine": the_machine_is_lost,
    "A rotation backup or the journal can't be read": a_rotation_backup_is_damaged,
    "Restore": the_server_has_seen_a_longer_audit_log,
    "The key file is lost, shares are left": the_key_file_is_lost,
    "Unseal": somebody_sealed_it,
    "The audit log was altered": a_line_was_edited,
    "Who read a thread": a_thread_was_read,
    "Change the policy": a_policy_holds,
    "A limit is used up": a_limit_is_used_up,
    "The auditor is away": an_auditor_is_attached,
    "A witness refuses": an_auditor_is_attached,
    "Prove a line": an_auditor_is_attached,
}


ON_ONE_MACHINE = (
    "Unseal",
    "Restore",
    "Only the keyring is damaged",
    "The audit log was altered",
    "The key file is lost, shares are left",
    "A key has leaked",
)
"""Sections that do most, in an order in which one machine can need them. `make torture` runs every section alone."""


def check_left_in_order(made: Machine) -> None:
    """Each file belongs to its service, and both services store messages, after a reboot too."""
    assert made.ended() == []
    made.close()
    assert made.misplaced() == []
    made.boot()
    store_message(made)


def test_a_pasted_block_ends_at_its_first_failure_and_overwrites_no_key() -> None:
    """Each is a subshell with `set -e`, one command a line, so that each can fail in the tests. Where a key is made,
    the shell also refuses to write into a file that exists (`-C`)."""
    for title, listed in [
        *SECTIONS.items(),
        *((title, ALL_SECTIONS[title]) for title in (*OF_PROVIDERS, *OF_SEVERAL_HOSTS)),
    ]:
        for block in listed:
            first, *_, last = block.splitlines()
            assert re.match(r"\(set -eC?($|; )", first) and last == ")", f"{title}: {block}"
            assert ";" not in block.replace(first, "").replace("; do", "") and "&&" not in block, f"{title}: {block}"
            if "openssl rand" in block:
                assert first.startswith("(set -eC; umask 077"), f"{title}: {block}"


def with_failing(block: str, number: int) -> str:
    """The block with a command that only fails in the place of line `number`. Its output goes where that of the line
    goes."""
    lines = block.splitlines()
    _, sign, place = lines[number].partition(" > ")
    lines[number] = f"false{sign}{place}"
    return "\n".join(lines) + "\n"


def commands_of(block: str) -> range:
    """The numbers of its lines, without the first and the last, which make it a subshell."""
    return range(1, len(block.splitlines()) - 1)


def root_keys(made: Machine) -> set[str]:
    """The text of each key file of the machine."""
    places = [made.at(place) for place in ("/etc/progressdb", "/root")]
    return {file.read_text().strip() for place in places for file in place.rglob("*.key*")}


def root_key_opens(made: Machine) -> bool:
    """Whether a root key opens the data directory, or the one that was moved away, whatever else doctor finds there."""
    doctor = "PROGRESSDB_KMS_SOCKET= runuser -u minikms -- minikms doctor"  # the files only, not the daemon
    old = f"{doctor} --data-dir /var/lib/progressdb/minikms.old"
    for command in (doctor, old, f"{old} --master-key-file /etc/progressdb/minikms.key.old"):
        ended, said = made.run(command)
        if ended != 2 and "problem: root key" not in said and "problem: keyring" not in said:
            return True
    return False


def fail_each_command(made: Machine, block: str, every: int = 1) -> None:
    """Each command of the block, or every n-th, fails in turn, always in the same state of the machine. No root key is
    lost then, and that in the daemon's file opens the data directory, or the one that was moved away; if it did before.
    """
    keys, opened, before = root_keys(made), root_key_opens(made), made.files()
    for number in commands_of(block)[::every]:
        failed = block.splitlines()[number]
        ended, said = made.run(with_failing(block, number))
        assert ended != 0, f"{failed} failed, and the block went on:\n{said}"
        assert keys <= root_keys(made), f"{failed} failed, and a root key is gone"
        assert not opened or root_key_opens(made), f"{failed} failed, and the root key opens nothing"
        made.put_back(before)


def nightly_backup(made: Machine, setting: str = "") -> tuple[int, set[str], set[str]]:
    """Runs the script of the timer, which keeps one backup. Its exit status, and the names of the backups of the store
    and of the archives that are there then.
    """
    script = made.here((UNITS / "progressdb-backup").read_text())
    made.at("/opt/progressdb/bin/progressdb-backup").write_text(script)
    time.sleep(1.1)  # the name of a backup has its second
    ended, _ = made.run(f"KEEP=1 {setting} sh /opt/progressdb/bin/progressdb-backup")
    stores = {file.name for file in made.at("/var/lib/progressdb/db/backups").glob("auto-*")}
    return ended, stores, {file.stem for file in made.at("/backup").glob("*.minikms")}


def check_nightly_backup(made: Machine, *settings: str) -> None:
    """It makes both backups, and removes the older ones that it made. When they turn out to be damaged, it removes all
    but the newest and those that were verified last.
    """
    for setting in ("", *settings):
        ended, stores, archives = nightly_backup(made, setting)
        assert (ended, len(stores), stores) == (0, 1, archives)
    [good] = stores
    listed = made.do("progressdb backup list")
    assert [line for line in listed.splitlines() if "auto-" in line and good not in line] == []
    programs = {name: made.at(f"/opt/progressdb/bin/{name}") for name in ("minikms", "progressdb")}
    scripts = {name: path.read_text() for name, path in programs.items()}
    for name, damage in (("minikms", 'echo >> "$3"'), ("progressdb", 'echo >> "$3/store/CURRENT"')):
        first, rest = scripts[name].split("\n", 1)
        programs[name].write_text(f'{first}\ncase "$1 $2" in "backup verify") {damage};; esac\n{rest}')
    before: set[str] = set()
    for _ in range(2):
        ended, stores, archives = nightly_backup(made)
        assert (ended, len(stores), stores) == (1, 2, archives)
        assert good in stores and before & stores <= {good}
        before = stores
    for name, path in programs.items():
        path.write_text(scripts[name])
    ended, stores, archives = nightly_backup(made)
    assert (ended, len(stores), stores) == (0, 1, archives)


def test_every_section_of_the_runbook_has_commands() -> None:
    assert len(SECTIONS) >= 11
    assert all(SECTIONS.values())


@pytest.mark.timeout(900)
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.torture)])
def test_a_failed_command_loses_no_root_key_when_it_is_changed(every: int) -> None:
    """Where this user may have a pin file, with one: then the new key is refused unless it is named there first."""
    with machine() as made:
        prepare(made)
        if os.geteuid() == 0:
            follow(made, "Pin the root keys")
            made.export(blocks(RUNBOOK)[0])
        made.do("systemctl stop progressdb")
        [block] = SECTIONS["Change the root key"]
        fail_each_command(made, block, every)
        [old] = root_keys(made)
        made.do(block)
        new = made.at("/etc/progressdb/minikms.key").read_text().strip()
        assert {old, new} == root_keys(made) and old != new
        [former] = made.at("/etc/progressdb").glob("minikms.key.before-*")
        made.do(f"runuser -u minikms -- minikms backup verify /backup/monday.minikms --master-key-file {former}")
        made.do("systemctl start progressdb")
        check_left_in_order(made)


@pytest.mark.torture
def test_only_the_readers_of_the_thread_are_shown() -> None:
    with machine() as made:
        prepare(made)
        shown = follow(made, "Who read a thread")
        assert "request_id=r " in shown and "r-2" not in shown


@pytest.mark.torture
@pytest.mark.timeout(900)
@pytest.mark.parametrize("title", SECTIONS)
def test_no_failed_command_of_a_section_loses_a_root_key(title: str) -> None:
    if title == "Pin the root keys":
        needs.root()
    with machine() as made:
        prepare(made, recommended=title != "Give the audit log a directory of its own")
        HAPPENED.get(title, as_it_is)(made)
        said = ""
        for pasted in SECTIONS[title]:
            if "minikms unseal\n" in pasted:
                unseal_with_shares(made, pasted)
                continue
            block = with_names(made, pasted, said)
            fail_each_command(made, block)
            said = made.do(block)


@pytest.mark.timeout(900)
def test_the_commands_of_sections_on_one_machine_do_what_they_should() -> None:
    with machine() as made:
        prepare(made)
        for title in ON_ONE_MACHINE:
            follow(made, title)
        former = made.at("/var/lib/progressdb/audit.old/minikms-audit.log")  # a restore has not overwritten it
        assert len(former.read_bytes().splitlines()) > LINES_MIN
        made.do("install -D -m 400 /etc/progressdb/minikms.key /root/credentials/root.key")
        credential = "PROGRESSDB_MINIKMS_ROOT=systemd-credential:root.key"
        check_nightly_backup(made, f"CREDENTIALS_DIRECTORY=/root/credentials {credential}")
        check_left_in_order(made)


@pytest.mark.torture
@pytest.mark.parametrize("recommended", [True, False], ids=["as recommended", "without any option"])
@pytest.mark.parametrize("title", SECTIONS)
def test_the_commands_of_a_section_do_what_they_should(title: str, recommended: bool) -> None:
    """With minikms.socket, a policy file and a directory of the audit log, or without all of these."""
    if title == "Pin the root keys":
        needs.root()
    with machine(socket_unit=recommended) as made:
        prepare(made, recommended=recommended and title != "Give the audit log a directory of its own")
        follow(made, title)
        if title != "Seal":
            check_left_in_order(made)


@pytest.mark.timeout(900)
def test_a_lost_machine_goes_on_elsewhere_from_backups_and_root_key() -> None:
    """The services of the new machine have run, under other uids."""
    with machine(uid_min=UID_MIN + 100) as new:
        with machine() as old:
            prepare(old)
            call_server(old, "/v1/threads/thread-1/messages", {"body": "of the lost machine"})
            old.do("runuser -u minikms -- minikms backup create /backup/later.minikms")
            old.do("mv /backup/later.minikms /backup/monday.minikms")
            old.do("runuser -u progressdb -- progressdb backup create monday --store-only")
            prepare(new)
            copy_what_moves(old, new)
        said = "".join(new.do(block) for block in SECTIONS["Move to another machine"])
        assert "all is right" in said
        listed = call_server(new, "/v1/threads/thread-1/messages")["messages"]
        assert [each["body"] for each in listed] == [1, "of the lost machine"]
        check_left_in_order(new)


def test_systemd_and_the_first_block_read_the_flags_of_an_auditor_alike(tmp_path: Path) -> None:
    """`AUDIT` has two of them, and a space."""
    needs.program("systemd-analyze")  # of the same package
    reader = Path("/usr/lib/systemd/user-environment-generators/30-systemd-environment-d-generator")
    [line] = re.findall(r"`(AUDIT=[^`]+)`", (UNITS / "README.md").read_text("utf-8"))
    (tmp_path / "environment.d").mkdir()
    file = tmp_path / "environment.d" / "minikms.conf"
    file.write_text(line + "\n")
    environ = {"XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    by_systemd = subprocess.run([reader], env=environ, capture_output=True, text=True, check=True).stdout
    shown = subprocess.run(
        ["bash", "-c", f'{by_systemd}\nprintf \'%s\\n\' "$AUDIT"; . {file}; printf %s "$AUDIT"'],
        capture_output=True,
        text=True,
        check=True,
    )
    read, sourced = shown.stdout.split("\n")
    assert read == sourced and len(sourced.split()) == 2


async def test_a_key_is_restored_from_its_newest_rotation_backup(tmp_path: Path) -> None:
    """Even if two have one stamp and the same keys; without one nothing changes."""
    [script] = re.findall(r"```bash\n(umask 077; id=KEY_ID\n.*?)```", RUNBOOK.read_text("utf-8"), re.DOTALL)

    def restore(directory: Path, key_id: str) -> int:
        return subprocess.run(["sh", "-c", script.replace("KEY_ID", key_id)], cwd=directory, check=False).returncode

    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(2)
        await one.rotate()
        await one.rotate()
        newest = one.on_disk(key_ids[0]).version
        [lost] = await one.make(1)
        keys = one.keys(key_ids)
    one.file(key_ids[0]).write_bytes(b"")
    assert restore(one.directory, key_ids[0]) == 0
    assert one.file(key_ids[0]).stat().st_mode & 0o777 == 0o600
    before = one.file(lost).read_bytes()
    assert restore(one.directory, lost) != 0
    assert one.file(lost).read_bytes() == before
    async with opened_vault(tmp_path / "d") as again:
        assert again.keys(keys) == keys
        assert again.on_disk(key_ids[0]).version == newest
