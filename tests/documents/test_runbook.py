"""The runbook's commands do what it says, section by section, on a machine where just that has happened.

As root the commands and the services run as the three users of deploy/systemd.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from progressdb_server.store import directory, epoch
from tests import needs
from tests.documents.machine import UNITS, Machine, blocks, machine
from tests.harness.vaults import opened_vault
from tests.harness.waiting import wait_until

LINES_MIN = 20
"""More than a restored key service writes until the server has judged it."""
RUNBOOK = Path(__file__).resolve().parents[2] / "docs" / "runbook.md"
SECTIONS = {
    title: [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    for title, text in re.findall(r"(?m)^## (.+)\n((?:(?!## ).*\n?)*)", RUNBOOK.read_text("utf-8"))
}


def call_server(made: Machine, target: str, body: object = None) -> None:
    """A request of a backend for the user Ada."""
    url = f"http://127.0.0.1:{made.port}{target}"
    headers = {"X-API-Key": made.api_key("backend"), "X-User-ID": "ada"}
    data = None if body is None else json.dumps(body).encode()
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(urllib.request.Request(url, data, headers), timeout=60) as answer:
        assert answer.status == 200


def store_message(made: Machine) -> None:
    call_server(made, "/v1/threads/thread-1/messages", {"body": 1})


def prepare(made: Machine) -> None:
    """Installs both services; there is a message in the store, and a backup of Monday."""
    made.install()
    made.export(blocks(RUNBOOK)[0])
    made.do("install -d -m 700 -o minikms -g minikms /backup")
    store_message(made)
    made.do("runuser -u minikms -- minikms backup create /backup/monday.minikms")


def unseal_with_shares(made: Machine) -> None:
    """Two people's shares, typed on a terminal."""
    texts = [file.read_text("ascii").strip() for file in sorted(made.at("/backup/shares").iterdir())]
    with made.on_terminal("minikms unseal") as terminal:
        for count, text in enumerate(texts[:2], 1):
            terminal.wait_for("Share or root key", times=count)
            terminal.type(text)
        assert terminal.wait() == 0, terminal.shown


def follow(made: Machine, title: str) -> None:
    """Runs each command of a section. It must end as the runbook says. SLOT is that of the root key added last."""
    HAPPENED.get(title, as_it_is)(made)
    slots: list[str] = []
    for line in SECTIONS[title]:
        if line == "minikms unseal":
            unseal_with_shares(made)
        else:
            said = made.do(line.replace("SLOT", slots[-1]) if "SLOT" in line else line)
            slots = re.findall(r"(?m)^(s[0-9]+) ", said) or slots


def as_it_is(made: Machine) -> None:
    """Nothing has happened."""


def a_line_was_edited(made: Machine) -> None:
    log = made.at("/var/lib/progressdb/minikms/minikms-audit.log")
    log.write_bytes(log.read_bytes().replace(b'"create_dek"', b'"create_dok"', 1))


def a_thread_was_read(made: Machine) -> None:
    store_message(made)
    call_server(made, "/v1/threads/thread-1/messages")


def the_server_has_seen_a_longer_audit_log(made: Machine) -> None:
    """So it refuses the restored key service, whose log is new, until its operator accepts that."""
    for _ in range(LINES_MIN):
        store_message(made)

    def remembered_lines() -> int:
        time.sleep(1)  # a look takes a tenth of a second of the processor
        with directory.open_reader(str(made.at("/var/lib/progressdb/db/store"))) as reader:
            known = epoch.remembered(reader)
        return known.head_seq if known else 0

    wait_until(lambda: remembered_lines() >= LINES_MIN, seconds=120)


def somebody_sealed_it(made: Machine) -> None:
    made.do("minikms seal --yes")


def the_key_file_is_lost(made: Machine) -> None:
    """The shares are there."""
    made.do("minikms root add shares:2/3 --shares-dir /backup/shares --yes")
    made.do("systemctl stop minikms.socket minikms")
    made.at("/etc/progressdb/minikms.key").unlink()


def a_policy_holds(made: Machine, limits: str = "") -> None:
    """As deploy/systemd/README.md says. `limits`: of the operators, who have all roles then."""
    for line in blocks(UNITS / "README.md")[1].replace("\\\n", "").splitlines():
        if line.startswith("systemctl"):
            policy = made.at("/etc/progressdb/policy/policy.toml")
            text = policy.read_text().replace('"uid:0"', f'"uid:{os.geteuid()}"')
            if limits:
                text = text.replace('["monitor", "rotate"', '["data_key", "create", "decrypt", "monitor", "rotate"')
                text = text.replace('"unseal"]\n', f'"unseal"]\nlimits = {{ {limits} }}\n')
            policy.write_text(text)
        made.do(line.replace("deploy/policy.toml", str(UNITS.parent / "policy.toml")))


def a_limit_is_used_up(made: Machine) -> None:
    a_policy_holds(made, "decrypts_per_hour = 1")
    made.do("echo text > plain")
    made.do("minikms encrypt plain")
    made.do("minikms decrypt plain.kms --output -")
    made.do("minikms decrypt plain.kms --output -  # ends with 1")


HAPPENED: dict[str, Callable[[Machine], None]] = {
    "Restore": the_server_has_seen_a_longer_audit_log,
    "The key file is lost, shares are left": the_key_file_is_lost,
    "Unseal": somebody_sealed_it,
    "The audit log was altered": a_line_was_edited,
    "Who read a thread": a_thread_was_read,
    "Change the policy": a_policy_holds,
    "A limit is used up": a_limit_is_used_up,
}


ON_ONE_MACHINE = (
    "Unseal",
    "Restore",
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


def test_every_section_of_the_runbook_has_commands() -> None:
    assert len(SECTIONS) >= 11
    assert all(SECTIONS.values())


@pytest.mark.timeout(900)
def test_the_commands_of_sections_on_one_machine_do_what_they_should() -> None:
    with machine() as made:
        prepare(made)
        for title in ON_ONE_MACHINE:
            follow(made, title)
        check_left_in_order(made)


@pytest.mark.torture
@pytest.mark.parametrize("socket_unit", [True, False], ids=["with minikms.socket", "without it"])
@pytest.mark.parametrize("title", SECTIONS)
def test_the_commands_of_a_section_do_what_they_should(title: str, socket_unit: bool) -> None:
    if any("minikms pin add" in line for line in SECTIONS[title]):
        needs.root()
    with machine(socket_unit=socket_unit) as made:
        prepare(made)
        follow(made, title)
        if title != "Seal":
            check_left_in_order(made)


def test_a_key_is_restored_from_its_newest_rotation_backup(tmp_path: Path) -> None:
    """From a batch backup, even if two have one stamp and the same keys, or a single one; else nothing changes."""
    [script] = re.findall(r"```bash\n(umask 077; id=KEY_ID\n.*?)```", RUNBOOK.read_text("utf-8"), re.DOTALL)

    def restore(directory: Path, key_id: str) -> int:
        return subprocess.run(["sh", "-c", script.replace("KEY_ID", key_id)], cwd=directory, check=False).returncode

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = await one.make(2)
            await one.rotate()
            await one.rotate()
            newest = one.on_disk(key_ids[0]).version - 1
            single, lost = await one.make(2)
            keys = one.keys([*key_ids, single])
            shutil.copy(one.file(single), one.directory / "kms-deks-backup" / f"{single}.json.20200101T000000")
        for key_id in (key_ids[0], single):
            one.file(key_id).write_bytes(b"")
            assert restore(one.directory, key_id) == 0
        assert one.file(key_ids[0]).stat().st_mode & 0o777 == 0o600
        before = one.file(lost).read_bytes()
        assert restore(one.directory, lost) != 0
        assert one.file(lost).read_bytes() == before
        async with opened_vault(tmp_path / "d") as again:
            assert again.keys(keys) == keys
            assert again.on_disk(key_ids[0]).version == newest

    asyncio.run(main())
