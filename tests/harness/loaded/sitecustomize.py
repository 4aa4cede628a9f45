"""Loaded by each interpreter that starts with this directory in PYTHONPATH: what its process has loaded at its end.

It opens its files at once, because a hardened process opens none, and imports only what an interpreter has loaded.
"""

import atexit
import os
import sys
from collections.abc import Callable

_file = os.open(os.environ["LOADED_FILE"], os.O_WRONLY | os.O_CREAT, 0o600)
_maps = os.open("/proc/self/maps", os.O_RDONLY) if os.path.exists("/proc/self/maps") else None
_late: list[str] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if event == "import" and len(sys.meta_path) == 1:  # after `end_imports`
        _late.append(str(arguments[0]))


def _error(act: Callable[[], object]) -> str:
    try:
        act()
    except Exception as error:  # noqa: BLE001  its kind is the result
        return type(error).__name__
    return ""


def _fail() -> None:
    raise ValueError("ß")


def _shown() -> None:
    """The text of an error as each part of the standard library shows it."""
    import logging
    import traceback
    import warnings

    try:
        _fail()
    except ValueError as error:
        traceback.print_exception(error)
        logging.getLogger("asyncio").error("ß", exc_info=True)
        sys.excepthook(type(error), error, error.__traceback__)
        warnings.showwarning("ß", UserWarning, __file__, 1)
        "ß".encode("latin-1").decode("utf-8", "backslashreplace")


def _report() -> None:
    modules = {name: getattr(module, "__file__", None) for name, module in sys.modules.items() if module is not None}
    libraries = b""
    while _maps is not None and (part := os.read(_maps, 1 << 20)):
        libraries += part
    late = _late.copy()
    tried = {
        "show": _error(_shown),
        "import": _error(lambda: __import__("colorsys")),
        "read": _error(lambda: os.open(os.__file__, os.O_RDONLY)),
    }
    report = repr({"modules": modules, "libraries": os.fsdecode(libraries), "late": late, "tried": tried})
    os.ftruncate(_file, 0)
    os.pwrite(_file, report.encode(), 0)


sys.addaudithook(_hook)
atexit.register(_report)
