"""miniKMS: a local, hardened key service. Start reading at `minikms_daemon.service`.

`minikms.Client` and `minikms.AsyncClient` are the libraries. They, the items of batches and every error of
`minikms.api.errors` load when they are first asked for, so that the daemon never imports them and the command starts
fast. `minikms.__version__` is the version of the installed distribution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minikms.api.errors import *  # noqa: F403  the errors are named in that module alone
    from minikms.client import *  # noqa: F403  its public names are listed there

    __version__: str


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("progressdb-minikms")
    if name.endswith("Error"):
        from minikms.api import errors

        return getattr(errors, name)
    if name[:1].isupper():  # no submodule
        from minikms import client

        if name in client.__all__:
            return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
