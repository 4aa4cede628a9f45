"""What only the collector of reference cycles can free, in a process of which the tests ask it."""

import gc
from types import FrameType


def switch_off() -> None:
    """Of the collector: from here on what a reference cycle holds stays, until `frames` frees it."""
    gc.collect()
    gc.disable()


def frames() -> list[str]:
    """The places of all frames in reference cycles that nothing else leads to. An error that a frame keeps makes one,
    for its traceback leads to the frame: everything that these frames hold is held until the collector runs."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        found = [one for one in gc.garbage if isinstance(one, FrameType)]
        return sorted({f"{one.f_code.co_filename}:{one.f_lineno} {one.f_code.co_qualname}" for one in found})
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
