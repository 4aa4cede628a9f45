"""`minikms seal` and `minikms unseal`, through the running daemon.

Owns: the prompt for a share or a root key, and the progress that several operators see, each on a terminal of their
own. Invariants: a secret is typed on a terminal only, is not shown, and lies in the arena and in one buffer that is
zeroed after it was sent or refused; a wrong one is refused by the daemon, and this command asks again. It must never
say that the daemon is sealed or serves before the daemon has said so.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from minikms.api.printable import clean
from minikms.cli.console import DaemonFlags, Json, Yes, complain
from minikms.commands.output import Facts, confirm, print_result
from minikms.commands.usage import EXIT_FAILED, EXIT_GOOD

if TYPE_CHECKING:
    from minikms import api
    from minikms.client import Client
    from minikms.memory.arena import SecretArena

POLL_SECONDS: Final = 1.0
ARENA_SLOTS: Final = 16
_BLANKS: Final = b" \t\r"


def seal(*, daemon: DaemonFlags = DaemonFlags(), yes: Yes = False, json: Json = False) -> None:
    """Zero every key of the running daemon at once.

    The daemon then serves nothing until `minikms unseal`, even after a restart.
    Exit status: 0 sealed, 1 refused, or sealed but a restart would not stay sealed, 2 the daemon does not answer.
    """
    with daemon.client() as kms:
        confirm("Zero every key? Every request is refused until somebody unseals the key service.", yes=yes)
        answer = kms.seal()
    lines = (
        f"Sealed since {answer.since}: the daemon has no key in its memory, and a restart stays sealed.",
        "It serves again after: minikms unseal",
    )
    print_result(answer, lines, json=json)


def unseal(
    *,
    from_source: Annotated[
        bool, Parameter(help="Let the daemon read its own source of the root key, such as its key file.")
    ] = False,
    status: Annotated[
        bool, Parameter(help="Show whether it is sealed, and which shares it has.", show_default=False)
    ] = False,
    daemon: DaemonFlags = DaemonFlags(),
    json: Json = False,
) -> int:
    """Give a sealed daemon a share of the root key, or the root key itself.

    It asks on the terminal; nothing is shown. Several people may enter their shares, each on a terminal of their own;
    every terminal shows how many are still missing.
    Exit status: 0 it serves, 1 it is sealed, or the attempt was refused, 2 it does not answer or there is no terminal.

    For example:
        minikms unseal --from-source
    """
    with daemon.client() as kms:
        state = kms.unseal_status()
        if state.sealed and not status:
            state = kms.unseal() if from_source else _ask_until_unsealed(kms, state, quiet=json)
    verdict = "still sealed." if state.sealed else "not sealed: it serves."
    text = Facts(_facts(state)) if status and state.sealed else f"The key service is {verdict}"
    print_result(state, text, json=json)
    return EXIT_FAILED if state.sealed else EXIT_GOOD


def _ask_until_unsealed(kms: Client, state: api.UnsealStatusAnswer, *, quiet: bool) -> api.UnsealStatusAnswer:
    """Asks for secrets until the daemon serves, or waits for the shares of others. The last state."""
    from minikms import api
    from minikms.api import errors
    from minikms.memory.arena import SecretArena

    with SecretArena(ARENA_SLOTS) as arena:
        while state.sealed:
            if not quiet and state.shares is not None:
                print(_progress(state.shares))
            secret = _read_typed(arena, waits=state.shares is not None)
            try:
                if not secret:
                    state = _wait(kms, state, quiet=quiet)
                elif len(secret) == api.KEY_HEX_CHARS:
                    state = kms.unseal(root_hex=secret)
                else:
                    state = kms.unseal(share=secret)
            except errors.NotSealedError:
                state = kms.unseal_status()
            except (errors.KmsRefusedError, errors.KmsTimeoutError) as error:
                if isinstance(error, (errors.ForbiddenError, errors.UnauthorizedError)):
                    raise
                complain(error.message if isinstance(error, errors.KmsRefusedError) else str(error))
                state = kms.unseal_status()
            finally:
                secret[:] = bytes(len(secret))
    return state


def _read_typed(arena: SecretArena, *, waits: bool) -> bytearray:
    """What a person types, without blanks around it. The caller zeroes it."""
    from minikms import api
    from minikms.memory.terminal import typed_secret

    otherwise = "or only Enter to wait for the others" if waits else "it is not shown"
    with typed_secret(f"Share or root key ({otherwise}): ", api.SHARE_BYTES_MAX, arena) as parts:
        places = [(part, index) for part in parts for index in range(len(part))]
        solid = [number for number, (part, index) in enumerate(places) if part[index] not in _BLANKS]
        if not solid:
            return bytearray()
        text = bytearray(solid[-1] + 1 - solid[0])  # of its final size: a buffer that is moved leaves a copy
        for position, (part, index) in enumerate(places[solid[0] : solid[-1] + 1]):
            text[position] = part[index]
        return text


def _wait(kms: Client, state: api.UnsealStatusAnswer, *, quiet: bool) -> api.UnsealStatusAnswer:
    """Waits while others enter shares, and shows the progress. Returns when it serves, or when no share is left."""
    while state.sealed and state.shares is not None:
        time.sleep(POLL_SECONDS)
        before, state = state.shares, kms.unseal_status()
        if not quiet and state.shares is not None and state.shares.numbers != before.numbers:
            print(_progress(state.shares))
    if state.sealed and not quiet:
        print("No share is there: they have expired, or gave a wrong root key. Enter them again.")
    return state


def _progress(shares: api.SharesProgress) -> str:
    numbers = ", ".join(map(str, shares.numbers))
    return (
        f"{len(shares.numbers)} of {shares.threshold} shares are there (number {numbers}); they are zeroed at "
        f"{clean(shares.expires_at)}."
    )


def _facts(state: api.UnsealStatusAnswer) -> list[tuple[str, object]]:
    facts: list[tuple[str, object]] = [
        ("sealed since", state.since or "unknown"),
        ("by", state.by or "the start of the daemon"),
        ("after a restart", "sealed" if state.stays_sealed else "NOT SEALED"),
        ("--from-source", "possible" if state.from_source else "not possible: the source was read once already"),
        ("wrong attempts", state.failed_attempts),
    ]
    return facts if state.shares is None else [*facts, ("shares", _progress(state.shares))]
