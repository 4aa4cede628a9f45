"""The command `minikms-unlock`.

Owns: its subcommands and flags, and the sentence for each error. Invariants: no secret in argv, in the environment or
in a pipe; results go to standard output, everything else to standard error; the configuration is read before the
process is hardened. It must never report a key as taken before the daemon has answered.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from minikms.commands import usage
from minikms.commands.output import print_json, print_result
from minikms.commands.usage import (
    EXIT_FAILED,
    EXIT_GOOD,
    EXIT_MISSING,
    SOCKET_VARIABLE,
    Json,
    LogFormat,
    Parameter,
    PassphraseSource,
    PathText,
    ServerUid,
    Socket,
    UnlockSource,
    explained_system,
    new_helper,
    run_app,
)

if TYPE_CHECKING:
    from minikms.client import Client
    from minikms_unlock.passphrase import Parameters

SOURCE: Final = "passphrase:"
PROVIDER: Final = "passphrase"

app = new_helper(
    "minikms-unlock",
    "Give the running key service a root key that it can't fetch itself.",
    "Exit status: 0 done, 1 refused, 2 wrong usage or something is missing.",
)

Source = Annotated[PassphraseSource, Parameter(show_choices=False, help=f"Where the root key comes from: `{SOURCE}`.")]
Config = Annotated[Path, Parameter(name="--config", help="File with the parameters of the passphrase.")]
ServiceConfig = Annotated[Path, Parameter(name="--config", help="The configuration of the unlock service.")]
AnySource = Annotated[
    UnlockSource,
    Parameter(show_choices=False, help="pkcs11:…, tpm2:, aws-kms:ARN, vault-transit:https://…#KEY or clevis:FILE."),
]
UNLOCK_SOCKET: Final = "/run/minikms-unlock/unlock.sock"
"""The socket of the unit `minikms-unlock.socket`."""


@app.command(name="init-passphrase")
def init_passphrase(*, config: Config, json: Json = False) -> int:
    """Write the parameters for a new passphrase: a random salt, and the cost of a guess. They are not secret."""
    from minikms_unlock.passphrase import make_config

    parameters = make_config(config)
    print_result(
        {"config": str(config), **vars(parameters)},
        f"Made {config}. Keep a copy of it with the passphrase: without it the passphrase opens nothing.\n"
        f"Add the passphrase with: minikms-unlock add {SOURCE} --config {config}",
        json=json,
    )
    return EXIT_GOOD


@app.command
def unseal(
    source: Source, *, config: Config, socket: Socket = None, server_uid: ServerUid = None, json: Json = False
) -> int:
    """Unseal the daemon with the root key of a passphrase, which is asked for on the terminal."""
    from minikms_unlock.session import root_of_passphrase

    parameters = _parameters(source, config)
    with _client(socket, server_uid) as kms, root_of_passphrase(parameters, new=False) as root:
        kms.unseal(root_hex=root.text)
        fingerprint = root.fingerprint
    print_result({"status": "ok", "fingerprint": fingerprint}, "The key service is unsealed, and serves.", json=json)
    return EXIT_GOOD


@app.command
def add(
    source: Source, *, config: Config, socket: Socket = None, server_uid: ServerUid = None, json: Json = False
) -> int:
    """Add the root key of a new passphrase to the keyring. The passphrase is asked for twice."""
    from minikms_unlock.session import root_of_passphrase

    parameters = _parameters(source, config)
    with _client(socket, server_uid) as kms, root_of_passphrase(parameters, new=True) as root:
        slot = kms.add_root(root.text, provider=PROVIDER)
    print_result(
        {"slot_id": slot.slot_id, "fingerprint": slot.fingerprint},
        f"The passphrase opens the keyring now: slot {slot.slot_id}. Test it from time to time with:\n"
        f"minikms-unlock test {slot.slot_id} {SOURCE} --config {config}",
        json=json,
    )
    return EXIT_GOOD


@app.command
def test(
    slot: Annotated[str, Parameter(help="The slot, as `minikms root list` shows it.")],
    source: Annotated[
        PassphraseSource | UnlockSource,
        Parameter(show_choices=False, help=f"`{SOURCE}`, or that of the unlock service's configuration."),
    ],
    *,
    config: Annotated[Path, Parameter(name="--config", help="Of the passphrase, or of the unlock service.")],
    socket: Socket = None,
    server_uid: ServerUid = None,
    json: Json = False,
) -> int:
    """Prove that a passphrase, or the provider of the unlock service, still opens its slot."""
    if source == SOURCE:
        from minikms_unlock.session import root_of_passphrase

        parameters = _parameters(source, config)
        with _client(socket, server_uid) as kms, root_of_passphrase(parameters, new=False) as root:
            proved = kms.test_root(slot, root.text)
    else:
        from minikms_unlock.setup import root_of_provider

        with _client(socket, server_uid) as kms, root_of_provider(source, config) as text:
            proved = kms.test_root(slot, text)
    print_result(
        {"slot_id": proved.slot_id, "tested_at": proved.tested_at},
        f"The {source.partition(':')[0]} opens slot {proved.slot_id}.",
        json=json,
    )
    return EXIT_GOOD


@app.command
def serve(*, config: ServiceConfig, log_format: LogFormat = "console") -> int:
    """Answer one question of the key service for its root key, and end.

    Exit status: 0 given, or nobody asked; 1 the provider gave no key; 2 it was started without a socket.
    """
    from minikms_unlock.service import serve as run

    return run(config, log_format)


@app.command
def configure(
    source: AnySource,
    *,
    config: ServiceConfig,
    socket: Socket = None,
    server_uid: ServerUid = None,
    json: Json = False,
) -> int:
    """Make, pin, add and test a root key that a provider wraps, while the key service runs, as root.

    Run it again after an interruption: it goes on. What opens the keyring already stays.
    """
    from minikms_unlock.setup import configure as run
    from minikms_unlock.setup import next_steps

    with _client(socket, server_uid) as kms:
        configured = run(source, config, kms)
    facts = {"slot_id": configured.slot.slot_id, "fingerprint": configured.slot.fingerprint, "done": configured.done}
    print_result(facts, next_steps(configured, source, config, UNLOCK_SOCKET), json=json)
    return EXIT_GOOD


@app.command
def doctor(
    *,
    config: ServiceConfig,
    unlock_socket: Annotated[PathText, Parameter(help="The socket of the unlock service.")] = UNLOCK_SOCKET,
    json: Json = False,
) -> int:
    """Check all that the unlock service needs for an answer, as its user.

    Exit status: 0 no problem, 1 a problem, 2 there is no configuration that can be read.
    """
    from minikms_unlock.setup import examine

    findings = list(examine(config, unlock_socket))
    problems = sum(check.level == "problem" for check in findings)
    if json:
        print_json({"problems": problems, "checks": findings})
    else:
        print_result(None, [f"{check.level}: {check.area}: {check.what}" for check in findings], json=False)
    return EXIT_FAILED if problems else EXIT_GOOD


def main() -> None:
    """Runs the command line and ends the process."""
    run_app(app, explained)


def explained(error: Exception) -> tuple[str, int]:
    """The text and the exit status of an error. An error that is a defect is raised again."""
    from minikms.api import errors

    if isinstance(error, errors.KmsUntrustedServerError):
        return f"{error}. {usage.UNTRUSTED_ADVICE}.", EXIT_FAILED
    if isinstance(error, errors.KmsError):
        missing = isinstance(error, errors.InvalidRequestError | errors.StartError)
        refused = isinstance(error, errors.KmsRefusedError) and not missing
        return str(error), EXIT_FAILED if refused else EXIT_MISSING
    from minikms_tokens import TokenError

    if isinstance(error, TokenError):
        return str(error), EXIT_FAILED
    return explained_system(error, "minikms-unlock"), EXIT_MISSING


def _parameters(source: str, config: Path) -> Parameters:
    from minikms.api.errors import StartError
    from minikms_unlock.passphrase import read_config

    if source != SOURCE:
        raise StartError(f"{source!r} is no source of a root key that this version knows; it knows {SOURCE}")
    return read_config(config)


def _client(socket: str | None, server_uid: int | None) -> Client:
    """A client of the daemon, after the daemon has answered. Raises StartError without a usable path or list of users,
    KmsError if no daemon answers or its user is not trusted.
    """
    from minikms.api.errors import StartError
    from minikms.client import Client

    path = usage.found_socket(socket)
    if path is None:
        raise StartError(f"name the daemon's socket: --socket PATH, or {SOCKET_VARIABLE}")
    try:
        client = Client(path, server_uids=usage.server_uids(server_uid))
        client.health()  # before a secret is typed
    except ValueError as error:
        raise StartError(str(error)) from None
    return client
