"""The runbook's sections about a root key that a device or a cloud opens, pasted where that has happened."""

import json
from collections.abc import Iterator

import pytest

from tests import needs
from tests.documents.machine import Machine, blocks, machine
from tests.documents.test_runbook import ALL_SECTIONS, RUNBOOK, nightly_backup, prepare, store_message
from tests.harness.aws_kms import aws_kms
from tests.harness.hsm import PIN, run
from tests.harness.tpm import Tpm
from tests.harness.waiting import wait_until

PROVIDER = "/etc/systemd/system/minikms-unlock.service.d/provider.conf"
MODULE = "/usr/lib/softhsm/libsofthsm2.so"
LEASE_S = 30
"""The shortest one."""
WAIT_S_MAX = 120.0


@pytest.fixture
def made() -> Iterator[Machine]:
    """With a message in its store."""
    needs.root()
    with machine() as made:
        prepare(made, recommended=False)
        yield made


def paste(made: Machine, title: str, **names: str) -> str:
    """Each block of a section, with values for names in it. Returns what all of them print."""
    text = "\0".join(ALL_SECTIONS[title])
    for name, value in names.items():
        text = text.replace(name, value)
    return "".join(made.do(block) for block in text.split("\0"))


def root_keys(made: Machine) -> list[tuple[str, str]]:
    """Slot and provider of each. That in use is the first one."""
    roots = json.loads(made.do("minikms root list --json"))["roots"]
    return [(root["slot_id"], root["provider"]) for root in sorted(roots, key=lambda root: not root["in_use"])]


def move(made: Machine, source: str, setting: str = "") -> None:
    """From a file. Then all services start without anybody's help."""
    made.do(ALL_SECTIONS["Several root keys"][0])
    old, _ = root_keys(made)[0]
    configure, restart, remove = ALL_SECTIONS["Move the root key"]
    made.do(configure.replace("SOURCE", source))
    made.do(f"echo {setting} >> /etc/progressdb/minikms.env")
    made.do(restart)
    made.export(blocks(RUNBOOK)[0])
    made.do(remove.replace("OLD", old))
    assert [provider for _, provider in root_keys(made)] == [source.partition(":")[0], "file"]
    made.close()
    made.boot()
    wait_until(lambda: stored(made), seconds=WAIT_S_MAX)


def stored(made: Machine) -> bool:
    """Whether the message server stores a message."""
    try:
        store_message(made)
    except OSError:  # a refusal, or a server that starts just now
        return False
    return True


def has_a_token(made: Machine) -> str:
    """A new one of SoftHSM, with a key by the runbook, whose name this returns."""
    module, place = needs.pkcs11_module("softhsm/libsofthsm2.so"), made.at("/var/lib/softhsm")
    made.do(f"rm -rf {place}\nmkdir -p {place}/tokens")
    conf = place / "softhsm2.conf"
    conf.write_text(f"directories.tokendir = {place}/tokens\nobjectstore.backend = file\nlog.level = ERROR\n")
    made.environ["SOFTHSM2_CONF"] = str(conf)
    pins = ("--so-pin", "so-pin-123", "--pin", PIN)
    run(needs.program("softhsm2-util"), "--init-token", "--free", "--label", "kms", *pins, **made.environ)
    needs.program("pkcs11-tool")
    made.at("/root/pin").write_text(PIN)
    paste(made, "Move to an HSM", **{MODULE: module})
    with made.at(PROVIDER).open("a") as file:
        file.write(f"Environment=SOFTHSM2_CONF={conf}\n")
    return (
        f"pkcs11:token=kms;object=minikms?module-path={module}&pin-source=file:{made.at('/etc/progressdb/unlock/pin')}"
    )


def back_up_and_restore(made: Machine) -> None:
    """With the root key of the unlock service, by the pages and by the timer; an older archive with an older key."""
    older = "runuser -u minikms -- minikms backup verify /backup/monday.minikms"
    ended, said = made.run(older)
    assert (ended, "give one that opened the keyring when the backup was made" in said) == (1, True)
    made.do(f"{older} --root fd:0 < /root/minikms.key.old")
    paste(made, "Back up")
    ended, stores, archives = nightly_backup(made)
    assert (ended, len(stores), stores) == (0, 1, archives)
    made.do("runuser -u minikms -- minikms backup create /backup/moved.minikms")
    for block in ALL_SECTIONS["Restore"]:
        made.do(block.replace("monday", "moved"))
    key_file = max(made.at("/var/lib/progressdb/minikms/kms-deks").iterdir())
    made.do(ALL_SECTIONS["One key file is damaged"][0].replace("monday", "moved").replace("KEY_ID", key_file.stem))
    made.do("rm -r /backup/look")
    made.do(ALL_SECTIONS["Only the keyring is damaged"][0].replace("monday", "moved"))


@pytest.mark.timeout(900)
def test_a_root_key_moves_to_an_hsm_and_to_a_new_one_when_that_is_gone(made: Machine) -> None:
    move(made, has_a_token(made))
    back_up_and_restore(made)
    [lost] = [slot for slot, provider in root_keys(made) if provider == "pkcs11"]
    made.do("rm -r /var/lib/softhsm/tokens")
    made.do("systemctl restart minikms")
    assert not stored(made)
    paste(made, "The HSM is gone", SLOT=lost)
    made.export(blocks(RUNBOOK)[0])
    wait_until(lambda: stored(made), seconds=WAIT_S_MAX)
    move(made, has_a_token(made))


@pytest.mark.timeout(900)
def test_a_root_key_moves_to_a_cloud_and_is_taken_back_there(made: Machine) -> None:
    """It is used again by itself once its owner grants it."""
    with aws_kms(made.base) as aws:
        arn = aws.new_key()
        made.at("/root/unlock.env").write_text("".join(f"{name}={value}\n" for name, value in aws.environ.items()))
        paste(made, "Move to a cloud KMS")
        move(made, f"aws-kms:{arn}", f"LEASE=--root-lease={LEASE_S}")
        aws.enable(arn, False)
        wait_until(lambda: not stored(made), seconds=WAIT_S_MAX)
        assert "DisabledException" in paste(made, "The root key was taken back")
        ended, said = made.run("progressdb status")
        assert (ended, said.count("  failing: "), "`minikms unseal`" in said) == (1, 1, False), said
        aws.enable(arn, True)
        wait_until(lambda: stored(made), seconds=WAIT_S_MAX)


@pytest.mark.timeout(900)
def test_a_root_key_moves_to_a_tpm(made: Machine) -> None:
    place = made.base / "tpm"
    place.mkdir()
    tpm = Tpm(place)
    try:
        made.do(f"chown -R {made.uid('minikms-unlock')} {place}")
        paste(made, "Move to a TPM")
        move(made, tpm.source())
        config = made.at("/etc/progressdb/unlock/unlock.toml")
        before = config.read_text()
        with pytest.raises(AssertionError):  # another provider: the service in use would have no wrapped key of it
            made.do(ALL_SECTIONS["Move the root key"][0].replace("SOURCE", "clevis:/etc/progressdb/unlock/tang"))
        assert config.read_text() == before
    finally:
        tpm.stop()
