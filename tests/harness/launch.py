"""Runs a program for a shell: `python -I -S launch.py MODULE ARGUMENTS…` ends as `python -m MODULE ARGUMENTS…` ends.

Owns: asking the process of `tests.harness.forked`, whose socket is the inherited descriptor $FORKER, for the program.
Invariants: the program has this process's descriptors, environment, directory, umask and user; a signal that ends this
process reaches it; this process ends as it ends. It imports nothing that an interpreter has not loaded: its start is
most of its cost.
"""

import _signal as signal  # type: ignore[import-not-found]  # what `signal` imports costs a fifth of a start
import _socket as socket
import marshal
import os
import sys

FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


def main() -> None:
    forker = socket.socket(fileno=int(os.environ.pop("FORKER")))
    answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    request = {"words": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd(), "umask": os.umask(0)}
    request["user"] = os.getuid(), os.getgid(), os.getgroups()
    descriptors = b"".join(number.to_bytes(4, sys.byteorder) for number in (theirs.fileno(), 0, 1, 2))
    forker.sendmsg([marshal.dumps(request)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
    theirs.close()
    forker.close()
    program = int(answers.recv(16))
    for number in FORWARDED:
        signal.signal(number, lambda number, _: os.kill(program, number))
    for number in 0, 1, 2:
        os.close(number)
    status = int(answers.recv(16))
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


main()
