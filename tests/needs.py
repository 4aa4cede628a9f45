"""What a test needs of the machine: a program, root, namespaces, descriptors, a Python library.

Owns the one rule for a missing need, and the report of what was skipped. On a developer's machine the test is skipped.
Under `CI=true` it fails, because `.ci/run` installs every need and runs the tests as root too. One exception: a need
that only root's rights can meet skips under CI for an ordinary user, because the run as root covers that test.
Call these first in a test or a fixture; never decide on a need anywhere else.
"""

import collections
import contextlib
import functools
import glob
import importlib
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import NoReturn

import pytest

_DEBIAN_PACKAGES = {
    "/usr/libexec/tangd": "tang",
    "bash": "bash",
    "buildah": "buildah",
    "bwrap": "bubblewrap",
    "chromium": "chromium",
    "clevis": "clevis",
    "curl": "curl",
    "dpkg-deb": "dpkg",
    "docker-compose": "docker-compose",
    "etcd": "etcd-server",
    "etcdctl": "etcd-client",
    "faketime": "faketime",
    "fish": "fish",
    "gcore": "gdb",
    "gdb": "gdb",
    "git": "git",
    "go": "golang-go",
    "h2load": "nghttp2-client",
    "haproxy": "haproxy",
    "help2man": "help2man",
    "ip": "iproute2",
    "java": "default-jre-headless",
    "jose": "jose",
    "kustomize": "kustomize",
    "lintian": "lintian",
    "make": "make",
    "mkfs.btrfs": "btrfs-progs",
    "mkfs.ext4": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "mount": "mount",
    "nginx": "nginx",
    "nft": "nftables",
    "node": "nodejs",
    "nsenter": "util-linux",
    "npm": "npm",
    "openssl": "openssl",
    "p11-kit": "p11-kit",
    "patroni": "patroni python3-etcd",
    "pkcs11-tool": "opensc",
    "postgres": "postgresql",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "rsyslogd": "rsyslog-gnutls",
    "setpriv": "util-linux",
    "softhsm2-util": "softhsm2",
    "ssh": "openssh-client",
    "ssh-add": "openssh-client",
    "ssh-agent": "openssh-client",
    "ssh-keygen": "openssh-client",
    "strace": "strace",
    "swtpm": "swtpm",
    "systemd-analyze": "systemd",
    "systemd-nspawn": "systemd-container",
    "systemd-socket-activate": "systemd",
    "tpm2_unseal": "tpm2-tools",
    "umount": "mount",
    "unshare": "util-linux",
    "zsh": "zsh",
}
"""The Debian package of each program that a test may need."""
_PROGRAM = "the program "
_LIBRARY = "the Python library "
PROBE_S_MAX = 60.0


def _missing(what: str, *, only_root_can: bool = False) -> NoReturn:
    if os.environ.get("CI") == "true" and (os.geteuid() == 0 or not only_root_can):
        pytest.fail(f"needs {what}, which .ci/run must provide", pytrace=False)
    pytest.skip(f"needs {what}", allow_module_level=True)


def program(name: str) -> str:
    """The full path of the program `name` found on PATH or among the system's own programs."""
    path = shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin")))
    if path is None:
        _missing(f"{_PROGRAM}{name}")
    return path


def postgresql() -> str:
    """The directory of PostgreSQL's own programs. Debian has it out of PATH, one for each version."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/postgres"))
    return os.path.dirname(found[-1] if found else program("postgres"))


def pkcs11_module(name: str) -> str:
    """The full path of the PKCS#11 module `name`, such as `softhsm/libsofthsm2.so`."""
    found = sorted(glob.glob(f"/usr/lib/{name}") + glob.glob(f"/usr/lib/*/{name}"))
    if not found:
        _missing(f"the PKCS#11 module {name}")
    return found[0]


def root() -> None:
    """Continue only as root (effective uid 0)."""
    if os.geteuid() != 0:
        _missing("root", only_root_can=True)


def systemd_directory() -> None:
    """Continue only where `systemd-analyze` finds its directory or may make it: as root, or where systemd has run."""
    if os.geteuid() != 0 and not os.path.isdir("/run/systemd"):
        _missing("the directory /run/systemd, which only root can make", only_root_can=True)


@functools.cache
def runs_as(uid: int) -> bool:
    """Whether root can start this interpreter, with the project in it, as the user `uid`."""
    command = [sys.executable, "-c", "import minikms"]
    try:
        tried = subprocess.run(
            command,
            cwd="/",
            user=uid,
            group=uid,
            extra_groups=(),
            capture_output=True,
            timeout=PROBE_S_MAX,
            check=False,
        )
    except PermissionError:
        return False
    return tried.returncode == 0


def interpreter_for(uid: int) -> None:
    """Continue only as root, where the user `uid` can run this interpreter. No package can move it or the project."""
    root()
    if not runs_as(uid):
        pytest.skip("needs an interpreter and a project outside the private directories of root")


def namespaces(*kinds: str) -> str:
    """The full path of `unshare`, where it can make namespaces of these kinds (`mount`, `user`, …).

    A chroot has no user namespaces, and its root directory can't be made private; many containers forbid both.
    """
    unshare = program("unshare")
    if not _unshares(unshare, kinds):
        _missing(f"namespaces ({', '.join(kinds)}), which this user or container may not make", only_root_can=True)
    return unshare


@functools.cache
def _unshares(unshare: str, kinds: tuple[str, ...]) -> bool:
    command = [unshare, *(f"--{kind}" for kind in kinds), "true"]
    return subprocess.run(command, capture_output=True, timeout=PROBE_S_MAX, check=False).returncode == 0


@contextlib.contextmanager
def descriptors(count: int) -> Iterator[None]:
    """Let this process and the children that it starts meanwhile have `count` open descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted_soft = soft if soft == resource.RLIM_INFINITY else max(soft, count)
    wanted_hard = hard if hard == resource.RLIM_INFINITY else max(hard, count)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted_soft, wanted_hard))
    except (OSError, ValueError):
        _missing(f"{count} open descriptors (`ulimit -Hn` says {hard})", only_root_can=True)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, wanted_hard))


def linux(version: str, available: bool) -> None:
    """Continue only where the kernel has what came with Linux `version`. No package can provide a newer kernel."""
    if not available:
        pytest.skip(f"needs Linux {version} or newer")


def memory_disks() -> None:
    """Continue only where root can make compressed disks in memory (zram). No package can add them to a kernel."""
    if not os.access("/sys/class/zram-control/hot_add", os.R_OK):
        pytest.skip("needs a kernel with zram, and the right to make its disks")


def machine(*supported: str) -> None:
    """Continue only on a processor of one of these kinds, as `uname -m` names them."""
    if os.uname().machine not in supported:
        pytest.skip(f"needs {' or '.join(supported)}")


def processor_flags(*flags: str) -> None:
    """Continue only on a processor that has all these features, as /proc/cpuinfo names them. No package adds one."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        present = set(re.findall(r"\w+", next((line for line in file if line.startswith("flags")), "")))
    if not present.issuperset(flags):
        pytest.skip(f"needs a processor with {' and '.join(flags)}")


def library(name: str) -> ModuleType:
    """The importable Python module `name`, imported."""
    try:
        return importlib.import_module(name)
    except ImportError:
        _missing(f"{_LIBRARY}{name}")


def python(*version: int) -> None:
    """Continue only under this version of Python or a newer one."""
    if sys.version_info < version:
        pytest.skip(f"needs Python {'.'.join(map(str, version))} or newer", allow_module_level=True)


def packages(*requirements: str) -> NoReturn:
    """Python packages for an environment of a test's own, which could not be installed."""
    _missing(f"the Python packages {' '.join(requirements)}")


def report(reasons: Iterable[str]) -> list[str]:
    """Lines that tell how many tests each reason skipped, and the command that installs what is missing."""
    counts = collections.Counter(reason.removeprefix("Skipped: ") for reason in reasons)
    lines = [f"skipped {count:4}: {reason}" for reason, count in sorted(counts.items(), key=lambda pair: -pair[1])]
    missing = {found[1] for reason in counts if (found := re.fullmatch(f"needs {_PROGRAM}(\\S+)", reason))}
    if missing:
        install = sorted({_DEBIAN_PACKAGES.get(name, name) for name in missing})
        lines.append(f"to run them too: apt-get install {' '.join(install)}")
    if any(reason.startswith(f"needs {_LIBRARY}") for reason in counts):
        lines.append("to run them too: make frameworks")
    return lines
