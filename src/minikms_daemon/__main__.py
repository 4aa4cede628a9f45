"""`python -P -m minikms_daemon DESCRIPTOR WORDS…`: the process that holds the keys, as `minikms serve` starts it."""

from __future__ import annotations


def main() -> None:
    import gc
    import sys

    from minikms.processes.flags import COLLECTED_OBJECTS_MIN

    gc.set_threshold(COLLECTED_OBJECTS_MIN)
    sys.modules["typing_extensions"] = None  # type: ignore[assignment]  # else msgspec loads its 4,400 lines
    from minikms_daemon.serve import main

    main()


if __name__ == "__main__":
    main()
