"""A release, made again here and on two bare Debians; its package, installed on a bare Debian that systemd boots.

Needs the network (Debian's packages, Python's packages), root, and some minutes.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import needs
from tests.documents.machine import blocks
from tests.documents.test_runbook import ALL_SECTIONS, RUNBOOK
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.torture, pytest.mark.timeout(1800)]
PROJECT = Path(__file__).parents[2]
INSTALLED = (
    *("systemd", "systemd-sysv", "dbus", "curl", "openssl", "debconf", "init-system-helpers"),
    *("softhsm2", "opensc"),
)
SOURCE = (
    "pkcs11:token=kms;object=minikms?module-path=/usr/lib/softhsm/libsofthsm2.so"
    "&pin-source=file:/etc/progressdb/unlock/pin"
)
SERVES = "timeout 90 sh -c 'until minikms status; do sleep 1; done'\n"


def run(*command: str | Path, at: Path = PROJECT, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=at, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.strip()


def sums_of(directory: Path) -> dict[str, str]:
    lines = [line.split("  ") for line in (directory / "SHA256SUMS").read_text().splitlines()]
    return {name: digest for digest, name in lines}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for program in ("dpkg-deb", "help2man", "ssh-keygen"):
        needs.program(program)
    made = tmp_path_factory.mktemp("release")
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", made / "key")
    (made / "signers").write_text("release " + " ".join((made / "key.pub").read_text().split()[:2]) + "\n")
    own = ("--signing-key", made / "key", "--signers", made / "signers")
    run(sys.executable, "tools/release/dist.py", made / "dist", *own)
    return made / "dist"


def test_another_clone_makes_the_same_bytes(release: Path, tmp_path: Path) -> None:
    clone = tmp_path / "another place" / "clone"
    run("git", "clone", "-q", "--no-hardlinks", PROJECT, clone)
    run(sys.executable, "tools/release/dist.py", tmp_path / "dist", at=clone, TZ="Asia/Tokyo", LANG="C")
    assert (tmp_path / "dist/SHA256SUMS").read_text() == (release / "SHA256SUMS").read_text()


@pytest.mark.parametrize("suite", ["trixie", "bookworm"])
def test_a_bare_debian_makes_the_same_bytes(release: Path, tmp_path: Path, suite: str) -> None:
    """With its own Python and tools, as another user. A package is for the Python of its Debian: it is compared where
    this machine has that release.
    """
    needs.root()
    needs.program("mmdebstrap")
    bare, home = tmp_path / "debian", tmp_path / "debian/home/newcomer"
    run("tools/bare_debian.sh", "make", bare, "git", "help2man", SUITE=suite)
    run("git", "clone", "-q", "--no-hardlinks", PROJECT, home / "clone")
    run("chown", "-R", f"--reference={home}", home / "clone")
    run("tools/bare_debian.sh", "run", bare, "sh", "-c", "cd clone && python3 tools/release/dist.py dist")
    sums, others = (sums_of(place) for place in (release, home / "clone/dist"))
    if platform.freedesktop_os_release().get("VERSION_CODENAME") != suite:
        for each in (sums, others):
            del each[next(name for name in each if name.endswith(".deb"))]
    assert sums == others
    assert len(sums) >= 3
    shutil.rmtree(bare)


def test_checksums_and_signature_are_of_all_files(release: Path) -> None:
    sums = sums_of(release)
    files = {path.name for path in release.iterdir()} - {"SHA256SUMS", "SHA256SUMS.sig"}
    assert sums == {name: hashlib.sha256((release / name).read_bytes()).hexdigest() for name in files}
    verify = ("ssh-keygen", "-Y", "verify", "-n", "file", "-I", "release", "-f", str(release.parent / "signers"))
    with (release / "SHA256SUMS").open() as sums_file:
        subprocess.run([*verify, "-s", str(release / "SHA256SUMS.sig")], stdin=sums_file, check=True)


def test_lintian_accepts_the_package(release: Path) -> None:
    needs.program("lintian")
    assert run("lintian", "--allow-root", "--fail-on", "error,warning", *release.glob("*.deb")) == ""


class Booted:
    """A Debian below `root`, that systemd has booted."""

    def __init__(self, root: Path, console: Path) -> None:
        self.root = root
        flags = ("--register=no", "--keep-unit", "--private-network", "--console=read-only")
        allowed = ("--capability=CAP_IPC_LOCK", "--system-call-filter=memfd_secret @memlock")
        with console.open("wb") as output:
            self._nspawn = subprocess.Popen(
                ["systemd-nspawn", "-q", "-D", str(root), "--boot", *allowed, *flags],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        wait_until(self._is_up, seconds=180)

    def _enter(self) -> tuple[str, ...]:
        leader = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
        return ("nsenter", "-t", leader[0], "-a") if leader else ("false",)

    def _is_up(self) -> bool:
        asked = (*self._enter(), "systemctl", "is-system-running")
        said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        return said in ("running", "degraded")

    def sh(self, text: str) -> str:
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return run(*self._enter(), "env", path, "DEBIAN_FRONTEND=noninteractive", "sh", "-ec", "cd; " + text)

    def end(self) -> None:
        self._nspawn.terminate()
        try:
            self._nspawn.wait(60)
        except subprocess.TimeoutExpired:
            self._nspawn.kill()
            self._nspawn.wait()


@pytest.fixture(scope="module")
def debian(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    needs.root()
    for program in ("mmdebstrap", "systemd-nspawn", "nsenter"):
        needs.program(program)
    place = tmp_path_factory.mktemp("debian")
    run("tools/bare_debian.sh", "make", place / "root", *INSTALLED)
    for package in release.glob("*.deb"):
        shutil.copy(package, place / "root/root")
    booted = Booted(place / "root", place / "console")
    yield booted
    booted.end()


def test_a_bare_debian_stores_a_conversation_in_five_commands(debian: Booted) -> None:
    """Those of the page, pasted in their order."""
    page = (PROJECT / "deploy/systemd/README.md").read_text("utf-8")
    commands = page.split("## From the package")[1].split("```sh\n")[1].split("```")[0]
    assert len([line for line in commands.splitlines() if not line.startswith(" ")]) == 5
    shown = debian.sh(commands)
    assert shown.count('"body":{"text":"hello"}') == 2
    assert not any(
        b"hello" in path.read_bytes() for path in debian.root.glob("var/lib/progressdb/**/*") if path.is_file()
    )


def test_only_root_is_an_operator_where_nobody_else_was_named(debian: Booted) -> None:
    assert "PROGRESSDB_MINIKMS_ADMIN_UIDS=0\n" in debian.sh("cat /etc/progressdb/minikms.env") + "\n"
    server = "setpriv --reuid=progressdb --regid=progressdb --groups=minikms"
    refused = debian.sh(f"{server} minikms seal --yes --server-uid 0 2>&1 && echo SEALED || true")
    assert "SEALED" not in refused
    assert "role" in refused


def test_the_message_server_is_no_operator_by_its_uid_either(debian: Booted) -> None:
    debian.sh("mv /etc/progressdb/minikms.env kept.env; useradd ada")
    named = "ada * $(id -u progressdb) progressdb nobody-there"
    debian.sh(f'echo "set progressdb/operators {named}" | debconf-communicate && dpkg-reconfigure progressdb')
    admins = debian.sh(
        "grep -o 'ADMIN_UIDS=.*' /etc/progressdb/minikms.env; id -u ada; mv kept.env /etc/progressdb/minikms.env"
    )
    made, uid = admins.splitlines()
    assert made == f"ADMIN_UIDS=0,{uid}"


def test_an_upgrade_restarts_what_runs_and_keeps_what_is_stored(debian: Booted) -> None:
    before = debian.sh("systemctl show --property=MainPID minikms.service progressdb.service")
    debian.sh("dpkg -i progressdb_*.deb")
    assert debian.sh("systemctl show --property=MainPID minikms.service progressdb.service") != before
    assert '"hello"' in debian.sh(
        ". /etc/progressdb/progressdb.env && curl -fsS --retry 9 --retry-all-errors "
        '-H "X-API-Key: $PROGRESSDB_API_BACKEND_KEYS" "http://127.0.0.1:8080/v1/messages?thread=first"'
    )


def paste(debian: Booted, block: str) -> str:
    """After the first block of the runbook."""
    return debian.sh(f"{blocks(RUNBOOK)[0]}\n{block}")


def test_an_hsm_gives_the_root_key_at_every_start(debian: Booted) -> None:
    """By the runbook. While the token is away, or the unlock service can't start, the key service waits for it."""
    debian.sh("echo 123456 > pin\nsofthsm2-util --init-token --free --label kms --so-pin 123456 --pin 123456")
    paste(debian, ALL_SECTIONS["Several root keys"][0])
    paste(debian, ALL_SECTIONS["Move to an HSM"][0])
    for block in ALL_SECTIONS["Move the root key"]:
        paste(debian, block.replace("SOURCE", SOURCE).replace("OLD", "s1"))
    debian.sh(f"systemctl kill --signal=KILL minikms\nsleep 1\n{SERVES}")
    debian.sh("mv /var/lib/softhsm/tokens away\nmkdir /var/lib/softhsm/tokens\nsystemctl restart minikms")
    debian.sh("timeout 60 sh -c 'until minikms status | grep -q \"no PKCS#11 tokens\"; do sleep 1; done'")
    debian.sh(f"rmdir /var/lib/softhsm/tokens\nmv away /var/lib/softhsm/tokens\n{SERVES}")
    drop_in = "/etc/systemd/system/minikms-unlock.service.d/wrong.conf"
    debian.sh(f"printf '[Service]\\nEnvironmentFile=/no.env\\n' > {drop_in}\nsystemctl daemon-reload")
    state = "systemctl show --property=SubState minikms-unlock.service"
    debian.sh(f"systemctl restart minikms\ntimeout 60 sh -c 'until {state} | grep -q auto-restart; do sleep 0.1; done'")
    debian.sh(f"rm {drop_in}\nsystemctl daemon-reload\n{SERVES}")


def test_a_tenant_has_services_and_directories_of_its_own(debian: Booted) -> None:
    debian.sh("cd /usr/share/doc/progressdb\n" + blocks(PROJECT / "docs/tenants.md")[1])
    debian.sh("systemctl start progressdb@acme.service")
    modes = debian.sh("stat --format=%a /run/minikms-acme /var/lib/progressdb-acme/minikms /var/lib/progressdb-acme/db")
    assert modes.split() == ["750", "700", "700"]
    debian.sh(blocks(PROJECT / "docs/tenants.md")[-1])


def test_data_keys_and_settings_go_with_purge_only(debian: Booted) -> None:
    debian.sh("dpkg -r progressdb")
    kept = "minikms.env minikms.pin progressdb.env unlock", "db minikms unlock"
    for directory, names in zip(("/etc/progressdb", "/var/lib/progressdb"), kept, strict=True):
        assert debian.sh(f"ls {directory}").split() == names.split()
    assert debian.sh("ls -d /opt/progressdb /usr/bin/minikms 2>/dev/null || true") == ""
    debian.sh("dpkg -P progressdb")
    assert debian.sh("ls -d /etc/progressdb /var/lib/progressdb 2>/dev/null || true") == ""
