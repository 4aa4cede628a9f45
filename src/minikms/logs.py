"""structlog, imported without rich: `from minikms.logs import structlog`; and the log of a service.

structlog imports rich and its colouring of source code wherever they are installed. That is a sixth of the start of the
daemon and of the server, and neither uses it. Only commands that print tables import rich, by themselves. Invariant:
whoever imports rich afterwards gets it. Nothing may depend on rich being absent: how a traceback is shown is decided
where the log is configured.
"""

from __future__ import annotations

import sys
import time

from minikms.printable import clean

_HIDDEN = "rich"

if _HIDDEN in sys.modules:
    import structlog
else:
    sys.modules[_HIDDEN] = None  # type: ignore[assignment]  # an import of it then fails as if it were not installed
    try:
        import structlog
    finally:
        del sys.modules[_HIDDEN]

__all__ = ["clean_values", "service_logger", "structlog"]


def clean_values(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """The processor before a renderer of text; JSON escapes by itself."""
    return {name: clean(value) if isinstance(value, str) else value for name, value in event.items()}


def service_logger(log_format: str) -> structlog.stdlib.BoundLogger:
    """The log of a process that serves, on standard error: one event a line, as JSON or as `key=value`."""
    renderers: list[structlog.typing.Processor] = (
        [structlog.processors.JSONRenderer()]
        if log_format == "json"
        else [clean_values, structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"])]
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *renderers,
        ],
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    logger: structlog.stdlib.BoundLogger = structlog.get_logger("minikms", started_at=time.time_ns() // 1_000_000_000)
    return logger
