"""Runs a program as a unit's sandbox would, where no systemd runs: `restricted.py UNIT WRITABLE_DIR PROGRAM ARGS...`.

Owns: what the sandboxing directives of a [Service] section mean to the kernel, as systemd.exec(5) tells it. It is
started in mount and network namespaces of its own (`unshare --mount --net`) and replaces itself by the program.
Invariants: a directive that is not known here ends it, so that a new line in a unit is never silently untested; those
that only a service manager can give meaning to are named in MANAGERS_OWN.
It runs as root without capabilities, for a foreign user might not be able to read the interpreter; root without
capabilities has no right over another's files.
"""

import ctypes
import errno
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from minikms.memory import libc, process

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
MANAGERS_OWN = {
    # users, life cycle, directories
    "Type", "NotifyAccess", "WatchdogSec", "User", "Group", "SupplementaryGroups", "ExecStart", "ExecReload",
    "ExecStopPost",
    "Environment", "EnvironmentFile", "Restart", "RestartPreventExitStatus", "RestartSec", "TimeoutStartSec",
    "TimeoutStopSec", "RuntimeMaxSec", "RuntimeDirectory",
    "RuntimeDirectoryMode", "RuntimeDirectoryPreserve", "StateDirectory", "StateDirectoryMode",
    # control groups, and limits that this test's process cannot raise
    "MemoryMax", "MemorySwapMax", "OOMPolicy", "LimitMEMLOCK", "LimitNOFILE", "DevicePolicy", "IPAddressDeny",
    "IPAddressAllow",
    # the interpreter of a developer may lie in a home directory
    "ProtectHome",
    # no use without a session keyring, foreign files, or capabilities, which are dropped here
    "KeyringMode", "RemoveIPC", "PrivateMounts", "ProtectHostname", "ProtectControlGroups", "ProtectKernelTunables",
}  # fmt: skip
"""Directives that have no meaning here, or whose effect is part of what the caller of this program has set up."""

FILTERED_BY_CALL = {
    # directive → the system calls that it forbids, beside what SystemCallFilter= leaves out
    "LockPersonality": ("personality",),
    "ProtectClock": ("settimeofday", "clock_settime", "clock_adjtime", "adjtimex"),
    "ProtectKernelLogs": ("syslog",),
    "ProtectKernelModules": ("init_module", "finit_module", "delete_module"),
    "RestrictNamespaces": ("unshare", "setns", "clone3"),
    "RestrictRealtime": ("sched_setscheduler",),
    "RestrictSUIDSGID": (),  # by argument: no program under test makes set-id files, and the umask test shows the modes
}

MDWE_OPTION, MDWE_REFUSE_EXEC_GAIN = 65, 1  # linux/prctl.h: PR_SET_MDWE
ALLOW = 0x7FFF0000  # SCMP_ACT_ALLOW of seccomp.h
FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10}
SCMP_CMP_EQ = 4


class Comparison(ctypes.Structure):
    """struct scmp_arg_cmp of seccomp.h."""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def directives(unit: str, section: str = "[Service]") -> list[tuple[str, str]]:
    """The lines of a section of a file."""
    here, found = "", []
    with open(unit, encoding="utf-8") as file:
        for line in map(str.strip, file):
            if line.startswith("["):
                here = line
            elif line and not line.startswith(("#", ";")) and here == section:
                name, _, value = line.partition("=")
                found.append((name, value))
    return found


def loaded(unit: str, section: str = "[Service]", etc: Path | None = None) -> list[tuple[str, str]]:
    """The lines of a section of a unit of `deploy/systemd`, such as `minikms@acme.service`, and of its drop-ins there
    and in `etc`, in which an empty value removes those before it, and that of a directory its mode too."""
    prefix, at, rest = unit.partition("@")
    instance, _, kind = rest.rpartition(".")
    file = UNITS / (f"{prefix}@.{kind}" if at else unit)
    lines = directives(str(file), section)
    places = [UNITS, *([] if etc is None else [etc])]
    directories = [place / f"{name}.d" for place in places for name in {file.name, unit}]
    for drop_in in sorted(path for directory in directories for path in directory.glob("*.conf")):
        for name, value in directives(str(drop_in), section):
            removed = (name, f"{name}Mode")
            lines = [*lines, (name, value)] if value else [line for line in lines if line[0] not in removed]
    return [(name, value.replace("%i", instance)) for name, value in lines]


def expand(names: Iterable[str]) -> set[str]:
    """System call names, with each @group in its members."""
    calls: set[str] = set()
    for name in names:
        if not name.startswith("@"):
            calls.add(name)
            continue
        listed = subprocess.run(["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True)
        lines = [line.strip() for line in listed.stdout.splitlines()[1:]]
        calls |= expand(line for line in lines if line and not line.startswith("#"))
    return calls


def allowed_calls(lines: list[tuple[str, str]]) -> set[str]:
    """What SystemCallFilter= and its relatives leave: the first line allows, ~ takes away."""
    allowed: set[str] = set()
    for name, value in lines:
        if name == "SystemCallFilter":
            if value.startswith("~"):
                allowed -= expand(value[1:].split())
            else:
                allowed |= expand(value.split())
        elif name in FILTERED_BY_CALL and value == "yes":
            allowed -= set(FILTERED_BY_CALL[name])
    return allowed


def install_filter(allowed: set[str], families: list[str]) -> None:
    """An allow list through libseccomp, as systemd makes it; a denied call fails with EPERM, clone3 with ENOSYS."""
    seccomp = ctypes.CDLL("libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(seccomp.seccomp_init(0x50000 | errno.EPERM))
    for call in sorted(allowed):
        number = seccomp.seccomp_syscall_resolve_name(call.encode())
        if number < 0 or call == "socket":  # not of this architecture
            continue
        check(seccomp.seccomp_rule_add_array(context, ALLOW, number, 0, None), call)
    number = seccomp.seccomp_syscall_resolve_name(b"clone3")  # so that libc falls back to clone(2)
    seccomp.seccomp_rule_add_array(context, 0x50000 | errno.ENOSYS, number, 0, None)
    number = seccomp.seccomp_syscall_resolve_name(b"socket")
    for family in families:
        comparison = Comparison(0, SCMP_CMP_EQ, FAMILIES[family], 0)
        check(seccomp.seccomp_rule_add_array(context, ALLOW, number, 1, ctypes.byref(comparison)), family)
    check(seccomp.seccomp_load(context), "seccomp_load")


def check(result: int, what: str) -> None:
    if result != 0:
        raise SystemExit(f"{what}: {os.strerror(-result)}")


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def isolate_files(lines: dict[str, str], writable: str) -> None:
    """ProtectSystem=strict with ReadWritePaths=, PrivateDevices=, PrivateTmp=, ProtectProc= and ProcSubset=, as
    mounts.
    """
    mount("--make-rprivate", "/")
    named = [path.removeprefix("-") for path in lines.pop("ReadWritePaths", "").split()]
    if lines.pop("ProtectSystem") == "strict":
        for path in (writable, *filter(os.path.exists, named)):
            mount("--bind", path, path)
        mount("-o", "remount,bind,ro", "/")
    if lines.pop("PrivateDevices") == "yes":
        mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/dev")
        for name, minor in {"null": 3, "zero": 5, "full": 7, "random": 8, "urandom": 9}.items():  # null(4), random(4)
            os.mknod(f"/dev/{name}", stat.S_IFCHR | 0o666, os.makedev(1, minor))
        mount("-o", "remount,ro", "/dev")
    hide = {"invisible": "hidepid=invisible", "": ""}[lines.pop("ProtectProc", "")]
    subset = {"pid": "subset=pid", "": ""}[lines.pop("ProcSubset", "")]
    mount("-t", "proc", "-o", ",".join(filter(None, (hide, subset))), "proc", "/proc")


def main() -> None:
    unit, writable, *command = sys.argv[1:]
    lines = directives(unit)
    single = {name: value for name, value in lines if name not in MANAGERS_OWN and name not in FILTERED_BY_CALL}
    allowed = allowed_calls(lines)
    families = single.pop("RestrictAddressFamilies").split()
    isolate_files(single, writable)
    os.umask(int(single.pop("UMask"), 8))
    resource.setrlimit(resource.RLIMIT_CORE, (int(single["LimitCORE"]), int(single.pop("LimitCORE"))))
    if single.pop("MemoryDenyWriteExecute") == "yes":
        libc.prctl("prctl(PR_SET_MDWE)", MDWE_OPTION, MDWE_REFUSE_EXEC_GAIN)
    for name in ("SystemCallFilter", "SystemCallErrorNumber", "SystemCallArchitectures", "NoNewPrivileges"):
        single.pop(name)
    for name in ("PrivateNetwork", "PrivateIPC", "PrivateTmp"):  # by the caller's namespaces; nothing is shared in /tmp
        single.pop(name, None)
    if single.pop("CapabilityBoundingSet") == single.pop("AmbientCapabilities") == "":
        process.drop_capabilities()
    if single:
        raise SystemExit(f"directives that this test does not know: {sorted(single)}")
    install_filter(allowed, families)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
