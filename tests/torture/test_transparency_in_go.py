"""Trees of a real auditor satisfy two programs in Go that others wrote: golang.org/x/mod/sumdb, and the witness
litewitness of Debian's `golang-github-filosottile-litetlog-dev`.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from minikms.api.base64 import encode_text
from minikms.audit import tree
from minikms.audit.export import tile_reader
from minikms.audit.tiles import Tiles
from minikms.cli import audit_tree
from tests import needs
from tests.harness.ports import free_port
from tests.harness.waiting import wait_until
from tests.minikms_auditor.rig import ORIGIN, Rig, root_of
from tests.vectors import make_tree

pytestmark = [pytest.mark.torture, pytest.mark.timeout(900)]

GO = "go"
DEBIAN_GO = Path("/usr/share/gocode")
SQLITE_BUILD_S_MAX = 800
"""litewitness includes SQLite, whose Go takes the compiler minutes when it has nothing cached."""
WITNESS = "witness.example/lite"


def source(package: str, debian: str) -> Path:
    """The directory of a package in Go that Debian installed."""
    needs.program(GO)
    directory = DEBIAN_GO / "src" / package
    if not directory.exists():
        pytest.skip(f"needs the Debian package {debian}")
    return directory


def build(target: Path, package: str, *gopath: Path, cwd: Path) -> Path:
    environ = os.environ | {
        "GO111MODULE": "off",
        "GOFLAGS": "",
        "GOPROXY": "off",
        "GOPATH": os.pathsep.join(map(str, (*gopath, DEBIAN_GO))),
    }
    command = (needs.program(GO), "build", "-o", str(target), package)
    built = subprocess.run(
        command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=SQLITE_BUILD_S_MAX, check=False
    )
    assert built.returncode == 0, built.stderr
    return target


def test_notes_proofs_and_tiles_satisfy_the_checksum_database_of_go(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source("golang.org/x/mod/sumdb/tlog", "golang-golang-x-mod-dev")
    verifier = build(tmp_path / "sumdb", str(Path(__file__).with_name("sumdb.go")), cwd=tmp_path)
    base = tmp_path / "rig"
    base.mkdir()
    with Rig(base, witnesses=1) as rig:
        earlier = []
        for count in (1, 2, 250, 3, 300, 600):
            rig.write(count)
            rig.steps()
            earlier.append(rig.published())
        assert [root_of(rig.lines()[:size]) for size, _ in earlier] == [root for _, root in earlier]
        directory, size = rig.state_dir / "tree", earlier[-1][0]
        node = Tiles(tile_reader(directory), size).node
        capfd.readouterr()
        assert audit_tree.export(data_dir=str(rig.log_dir), tiles=str(directory)) == 0
        question = {
            "Directory": str(directory),
            "LogKey": rig.vkey(),
            "Exported": [json.loads(line) for line in capfd.readouterr().out.splitlines()],
            "Earlier": [
                {
                    "Size": old,
                    "Root": encode_text(root),
                    "Proof": list(map(encode_text, tree.consistency_proof(node, old, size))),
                }
                for old, root in earlier
            ],
        }

    def answer(**changed: object) -> str:
        asked = json.dumps(question | changed)
        ran = subprocess.run([verifier], input=asked, capture_output=True, text=True, timeout=60, check=False)
        assert (ran.returncode == 0) == (ran.stderr == ""), ran
        return ran.stdout

    assert answer() == f"verified {size}\n"
    assert answer(Exported=[*question["Exported"][:-2], *question["Exported"][:-3:-1]]) == ""
    assert answer(Earlier=[{**question["Earlier"][2], "Size": earlier[1][0]}]) == ""
    assert answer(LogKey=make_tree.LOG_KEY) == ""


class LiteRig(Rig):
    """Its only witness is the one that `table` of the configuration names."""

    table = ""

    def config(self) -> bytes:
        return super().config() + self.table.encode()


@contextlib.contextmanager
def litewitness(base: Path, log_key: str) -> Iterator[str]:
    """A running one; its table of the configuration.

    As packaged (0.4.3) it can't cosign: without GODEBUG its routes are not found (404), because GOPATH mode means the
    patterns of Go 1.21; and the root that it stores panics in the SQLite package of Debian, which takes text only.
    """
    packaged = source("filippo.io/litetlog", "golang-github-filosottile-litetlog-dev")
    mended = base / "go"
    copy = shutil.copytree(packaged, mended / "src" / "filippo.io" / "litetlog")
    witness = copy / "internal" / "witness" / "witness.go"
    text = witness.read_text()
    wrong = "nil, newSize, newHash, origin, oldSize)"
    assert text.count(wrong) == 1
    witness.write_text(text.replace(wrong, "nil, newSize, newHash.String(), origin, oldSize)"))
    run, control = (
        str(build(base / name, f"filippo.io/litetlog/cmd/{name}", mended, cwd=base))
        for name in ("litewitness", "witnessctl")
    )
    agent_socket, port = str(base / "agent"), free_port()

    def ran(*command: str) -> str:
        environ = os.environ | {"SSH_AUTH_SOCK": agent_socket}
        return subprocess.run(command, cwd=base, env=environ, capture_output=True, text=True, check=True).stdout

    keygen, add, agent = (needs.program(name) for name in ("ssh-keygen", "ssh-add", "ssh-agent"))
    ran(keygen, "-q", "-t", "ed25519", "-N", "", "-f", "key")
    ran(control, "add-log", "-db", "witness.db", "-origin", ORIGIN)
    ran(control, "add-key", "-db", "witness.db", "-origin", ORIGIN, "-key", log_key)
    log = base / "litewitness.log"
    flags = f"-name {WITNESS} -db witness.db -ssh-agent {agent_socket} -listen 127.0.0.1:{port}".split()
    with contextlib.ExitStack() as running:

        def start(*command: str, **environ: str) -> None:
            with log.open("ab") as file:
                process = subprocess.Popen(command, cwd=base, env=os.environ | environ, stdout=file, stderr=file)
            running.callback(process.wait)
            running.callback(process.kill)

        start(agent, "-D", "-a", agent_socket)
        wait_until(lambda: os.path.exists(agent_socket))
        ran(add, "-q", "key")
        start(run, *flags, "-key", ran(keygen, "-lf", "key.pub").split()[1], GODEBUG="httpmuxgo121=0")
        wait_until(lambda: "listening" in log.read_text())
        [vkey] = re.findall(r"vkey=(\S+)", log.read_text())
        yield f'[[witness]]\nurl = "http://127.0.0.1:{port}"\nkey = "{vkey}"\n'


def test_litewitness_cosigns_the_trees_of_a_real_auditor(tmp_path: Path) -> None:
    base, lite = tmp_path / "rig", tmp_path / "lite"
    base.mkdir()
    lite.mkdir()
    with LiteRig(base, quorum=1, resubmit_seconds=1) as rig, litewitness(lite, rig.vkey()) as rig.table:
        for count in (1, 2, 250, 3, 600):
            rig.write(count)
            status = rig.steps()
            assert (status.alarm, status.errors, status.witnesses[0].error) == ("", (), "")
            assert rig.published() == (len(rig.lines()), root_of(rig.lines()))
        copies = {name: shutil.copytree(base / name, tmp_path / f"older-{name}") for name in ("log", "state")}
        rig.start()  # which submits the same tree again
        assert rig.steps().witnesses[0].error == ""
        rig.write(5)
        rig.steps()
        rig.stop()
        for name, copy in copies.items():
            shutil.rmtree(base / name)
            copy.rename(base / name)
        assert "knows a tree of" in rig.steps().alarm
        assert (tmp_path / "lite" / "litewitness.log").read_text().count("panic") == 0
