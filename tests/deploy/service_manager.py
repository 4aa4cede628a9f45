"""Starts a program as a .socket and a .service unit would: `service_manager.py SOCKET UID PROGRAM ARGS...`.

Owns: the protocol of sd_listen_fds(3) as systemd speaks it. Root listens at SOCKET with the mode and the backlog of
`deploy/systemd/minikms.socket`, gives the file to UID, and this process then replaces itself by the program: as UID,
without supplementary groups, with the socket as descriptor 3. It must run as root.
"""

import os
import socket
import sys
from pathlib import Path

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "minikms.socket"
LISTEN_FDS_START = 3


def main() -> None:
    path, uid_text, *command = sys.argv[1:]
    uid = int(uid_text)
    unit = dict(line.split("=", 1) for line in UNIT.read_text(encoding="utf-8").splitlines() if "=" in line)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    os.chown(path, uid, uid)
    os.chmod(path, int(unit["SocketMode"], 8))
    listener.listen(int(unit["Backlog"]))
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
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
