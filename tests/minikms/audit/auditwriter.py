"""A small process that writes an audit log, for tests with faults of the kernel.

Usage: auditwriter.py DIRECTORY COMMITS [EVENTS_PER_COMMIT [FILE_BYTES_MAX]]. Prints a line per commit: the seq of the
head when it was written, else "unavailable"; after a failure it waits a moment and continues. It prints after the
commit, as a daemon answers after it.
"""

import resource
import sys
import time
from pathlib import Path

from minikms.api.errors import AuditUnavailableError
from minikms.audit.log import LogLimits
from tests.minikms.audit.logmaker import KEY1, encrypt_event, open_log


def main(directory: str, commits: str, events: str = "1", file_bytes_max: str = "0") -> None:
    log = open_log(Path(directory), KEY1, clock=time.time_ns, limits=LogLimits(reserve_bytes=256 * 1024))
    if int(file_bytes_max):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_bytes_max), resource.RLIM_INFINITY))
    for number in range(int(commits)):
        if number == int(commits) // 2 and int(file_bytes_max):
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        for item in range(int(events)):
            log.add(encrypt_event(number * int(events) + item))
        try:
            log.commit()
            log.sync.fdatasync()
            print(log.head["seq"], flush=True)
        except AuditUnavailableError:
            print("unavailable", flush=True)
            time.sleep(0.002)
    try:
        log.close()
    except AuditUnavailableError:
        print("unclosed", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
