"""The `minikms` command, whose daemon waits ten minutes for a client that neither reads nor sends.

Run before `-m minikms …`, for which it stands.
"""

import functools
import sys

from minikms.http.limits import Limits
from minikms_daemon.seal import seal
from tests.harness import in_process

if __name__ == "__main__":
    from minikms.cli import main

    vars(seal)["Limits"] = functools.partial(Limits, write_stall_seconds_max=600, body_seconds_max=600)
    in_process.install()
    sys.argv = ["minikms", *sys.argv[3:]]
    main()
