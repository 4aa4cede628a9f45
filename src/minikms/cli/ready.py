"""`minikms ready`: a probe of the running daemon, for programs.

Owns: the exit status of a probe. Invariants: the answer is the daemon's; it needs no role, so that the daemon's own
user may ask; nothing is printed when the answer is yes. It must never wait longer than a probe may take.
"""

from __future__ import annotations

from typing import Annotated, Final

from cyclopts import Parameter

from minikms.cli.console import ServerUid, Socket, daemon_client
from minikms.usage import EXIT_GOOD

ANSWER_SECONDS: Final = 3.0


def ready(
    *,
    socket: Socket = None,
    server_uid: ServerUid = None,
    live: Annotated[
        bool, Parameter(help="Ask only whether it answers, as a sealed one does.", negative=(), show_default=False)
    ] = False,
) -> int:
    """Check that the running daemon serves, as the probe of a container does.

    It needs no role: the users of the daemon may ask, and the daemon's own user. With --live every user may.
    Exit status: 0 yes, 1 it is sealed or can't write its audit log, 2 it does not answer.
    """
    with daemon_client(socket, server_uid, timeout_s=ANSWER_SECONDS) as kms:
        if live:
            kms.health()
        else:
            kms.ready()
    return EXIT_GOOD
