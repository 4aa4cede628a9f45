"""The image, built and run: under its own interpreter and libraries, with a read-only root and no shell.

Needs the network (Debian's packages, Python's packages) and root.
"""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests import needs
from tests.deploy import pods
from tests.deploy.pods import ComposeVolumes, Pod
from tests.deploy.test_kubernetes import (
    SETTINGS,
    Conversation,
    accept_the_log,
    holds,
    run_a_conversation,
    run_elsewhere,
    status_of,
)
from tests.harness.ports import free_port
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.torture
BASE, IMAGE = "localhost/minikms-test-base", "localhost/minikms-test"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
SHELLS = ("sh", "bash", "dash")


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=pods.PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.strip()


def build_flags() -> str:
    """Without a runtime and with the limits and the CAs of this machine."""
    limits = {"nproc": resource.RLIMIT_NPROC, "nofile": resource.RLIMIT_NOFILE}
    hard = {name: min(resource.getrlimit(number)[1], 8192) for name, number in limits.items()}
    flags = ["--isolation=chroot", "--network=host", f"--volume={CERTIFICATES}:{CERTIFICATES}:ro"]
    return " ".join([*flags, *(f"--ulimit={name}={number}:{number}" for name, number in hard.items())])


@pytest.fixture(scope="module")
def rootfs() -> Iterator[Path]:
    """The files of the image, in a directory where mount points may be made; its shells are gone."""
    needs.root()
    for name in ("buildah", "mmdebstrap", "make"):
        needs.program(name)
    run("make", "image-base", f"BASE={BASE}")
    run("make", "image", f"BASE={BASE}", f"IMAGE={IMAGE}", f"IMAGE_FLAGS={build_flags()}")
    container = run("buildah", "from", IMAGE)
    try:
        files = Path(run("buildah", "mount", container))
        for shell in SHELLS:
            (files / "usr" / "bin" / shell).unlink(missing_ok=True)
        yield files
    finally:
        run("buildah", "rm", container)


def test_the_image_serves_a_conversation_under_its_filter(public: Path, rootfs: Path) -> None:
    run_a_conversation(public, rootfs, seccomp=True)


def test_the_image_serves_a_server_elsewhere(public: Path, rootfs: Path) -> None:
    run_elsewhere(public, rootfs)


def test_the_image_serves_a_conversation_under_compose(public: Path, rootfs: Path) -> None:
    """compose.yaml: volumes with the owners that the image gives them, secrets that belong to their users. The auditor
    publishes a tree once an operator has accepted the log.
    """
    services = {name: pods.composed()["services"][name] for name in ("minikms", "progressdb", "auditor")}
    config = public / "config"
    for name in ("policy", "auditor"):
        (config / name).mkdir(parents=True)
        shutil.copy(pods.COMPOSE.with_name(f"{name}.toml"), config / name)
    for name, content, uid in (
        ("minikms.key", os.urandom(32).hex().encode() + b"\n", 10001),
        ("progressdb.yaml", SETTINGS, 10002),
        ("auditor/signer.key", os.urandom(32).hex().encode() + b"\n", 10004),
    ):
        (config / name).touch(0o600)
        (config / name).write_bytes(content)
        os.chown(config / name, uid, -1)
    own = public / "compose"
    own.mkdir()
    hosts = {
        "root-key": config / "minikms.key",
        "progressdb-config": config / "progressdb.yaml",
        "/etc/progressdb/policy": config / "policy",
        "/etc/progressdb/auditor": config / "auditor",
    }
    port = free_port()
    with Pod(
        public,
        pods.as_pod(services),
        {},
        rootfs=rootfs,
        environ={"PROGRESSDB_ADDR": f"127.0.0.1:{port}", "PORT_8080": str(port)},
        volumes=ComposeVolumes(own, services, rootfs, hosts),
    ) as running:
        running.start("minikms")
        services_probe = running.specs["progressdb"]["startupProbe"]["exec"]["command"]
        services_probe[:] = [word.replace(":8080/", f":{port}/") for word in services_probe]
        running.start("progressdb")
        talk = Conversation(port)
        wait_until(lambda: talk.say() == 200)
        assert running.stop("minikms") == 0
        running.start("minikms")
        wait_until(partial(talk.is_whole))
        assert not holds(running.volumes.path("store"), talk.texts[0])
        assert status_of(running)["memory"]["arena"] == "memfd_secret"
        running.start("auditor")
        state = running.volumes.path("auditor-state") / "state"
        accept_the_log(running, state, "--config=/etc/minikms/auditor/auditor.toml")
        assert running.stop("auditor") == 0


def test_every_program_of_the_image_starts(rootfs: Path) -> None:
    helpers = [f"minikms-{name}" for name in ("auditor", "gateway", "replicator", "unlock")]
    for program in ("minikms", *helpers, "progressdb"):
        words = [needs.program("bwrap"), "--ro-bind", str(rootfs), "/", "--proc", "/proc", "--dev", "/dev"]
        assert run(*words, f"/opt/progressdb/bin/{program}", "--version")
