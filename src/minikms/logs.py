"""structlog, imported without rich: `from minikms.logs import structlog`.

structlog imports rich and its colouring of source code wherever they are installed. That is a sixth of the start of the
daemon and of the server, and neither uses it. Only commands that print tables import rich, by themselves. Invariant:
whoever imports rich afterwards gets it. Nothing may depend on rich being absent: how a traceback is shown is decided
where the log is configured.
"""

from __future__ import annotations

import sys

_HIDDEN = "rich"

if _HIDDEN in sys.modules:
    import structlog
else:
    sys.modules[_HIDDEN] = None  # type: ignore[assignment]  # an import of it then fails as if it were not installed
    try:
        import structlog
    finally:
        del sys.modules[_HIDDEN]

__all__ = ["structlog"]
