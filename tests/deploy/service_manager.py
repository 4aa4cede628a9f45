"""Starts a program as a .socket and a .service unit would: `service_manager.py [--each GID] SOCKET UID PROGRAM …`.

Owns: the protocol of sd_listen_fds(3) as systemd speaks it. Root listens at SOCKET with the mode and the backlog of
`deploy/systemd/minikms.socket`, gives the file to UID, and this process then replaces itself by the program: as UID,
without supplementary groups, with the socket as descriptor 3. With `--each` the file belongs to root and that group,
and the program runs once for each connection that waits. It must run as root.
"""

import argparse
import os
import select
import socket
from pathlib import Path

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "minikms.socket"
LISTEN_FDS_START = 3


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--each", type=int, metavar="GID")
    arguments.add_argument("path")
    arguments.add_argument("uid", type=int)
    arguments.add_argument("command", nargs=argparse.REMAINDER)
    given = arguments.parse_args()
    uid: int = given.uid
    unit = dict(line.split("=", 1) for line in UNIT.read_text(encoding="utf-8").splitlines() if "=" in line)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(given.path)
    if given.each is None:
        os.chown(given.path, uid, uid)
    else:
        os.chown(given.path, 0, given.each)
    os.chmod(given.path, int(unit["SocketMode"], 8))
    listener.listen(int(unit["Backlog"]))
    while given.each is not None and select.select([listener], [], [])[0] and (child := os.fork()) != 0:
        os.waitpid(child, 0)
    descriptor = listener.detach()
    if descriptor == LISTEN_FDS_START:
        os.set_inheritable(descriptor, True)
    else:
        os.dup2(descriptor, LISTEN_FDS_START)
        os.close(descriptor)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "minikms.socket"}
    os.execvp(given.command[0], given.command)


if __name__ == "__main__":
    main()
