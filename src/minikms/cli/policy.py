"""`minikms policy check` and `explain`: what a policy file says, without a daemon. `minikms policy reload`: the running
daemon reads its file again.

Owns: flags and output. Invariants: a file is judged by the parser of the daemon and a decision is made by its rules;
check and explain read one file and change nothing. No command of these may need the data directory or a key.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, get_args

from cyclopts import App, Parameter

from minikms.api import Role
from minikms.api.printable import clean
from minikms.cli.console import DaemonFlags, Json, complain
from minikms.cli.serve import POLICY_VARIABLE
from minikms.commands.output import Facts, counted, print_json, print_result
from minikms.commands.usage import EXIT_FAILED, EXIT_GOOD, CommandError
from minikms.processes.flags import ALLOWED_UIDS_VARIABLE

if TYPE_CHECKING:
    from minikms.policy.rules import Rules

app = App(name="policy", help="Check, explain and reload a policy file.", version_flags=[])

ROLE_WORDS: Final = ", ".join(get_args(Role))

File = Annotated[Path, Parameter(help="The policy file.")]
PolicyFile = Annotated[Path | None, Parameter(name="--policy", help=f"The policy file [{POLICY_VARIABLE}].")]


@app.command
def check(file: File, *, json: Json = False) -> int:
    """Check the content of a policy file as the daemon does, and warn of what looks like a mistake.

    It does not check where the file lies and who may write it. Exit status: 0 the file is valid, 1 it is not, 2 it
    can't be read.
    """
    from minikms.policy.lint import warnings
    from minikms.policy.rules import PolicyFileError

    try:
        rules = _read(file)
    except PolicyFileError as error:
        if json:
            print_json({"valid": False, "error": str(error)})
        else:
            complain(f"{file}: {clean(str(error))}")
        return EXIT_FAILED
    sentences = warnings(rules)
    facts = {"valid": True, "sha256": rules.sha256, "grants": len(rules.grants), "proxies": len(rules.proxies)}
    counts = f"{counted(len(rules.grants), 'grant')}, {counted(len(rules.proxies), 'proxy', 'proxies')}"
    valid = f"{file} is valid: {counts}, SHA-256 {rules.sha256}"
    print_result({**facts, "warnings": sentences}, [valid, *(f"warning: {text}" for text in sentences)], json=json)
    return EXIT_GOOD


@app.command
def explain(
    *,
    policy: PolicyFile = None,
    principal: Annotated[str, Parameter(help="Who asks, such as uid:1000 or spiffe://prod/chat.")],
    role: Annotated[str, Parameter(help=f"The role that the request needs: {ROLE_WORDS}.")],
    thread: Annotated[str | None, Parameter(help="The thread of the key; none: any thread that a grant has.")] = None,
    via: Annotated[
        str | None, Parameter(help="The proxy that asks, such as uid:992; default: the first that may.")
    ] = None,
    allowed_uids: Annotated[
        str | None, Parameter(help=f"The uids that the daemon lets connect [{ALLOWED_UIDS_VARIABLE}].")
    ] = None,
    json: Json = False,
) -> int:
    """Print whether a policy file allows a request, which grant decides, and what would have to change.

    An allowed request can still be refused, because of a limit or the state of the key. Exit status: 0 allowed, 1
    denied, 2 wrong usage, or the file can't be read or is not valid.
    """
    from dataclasses import asdict

    from minikms.policy.explanation import explain as explained
    from minikms.policy.file_policy import FilePolicy
    from minikms.policy.policy import parse_uids

    named = policy or Path(os.environ.get(POLICY_VARIABLE) or "")
    if not named.name:
        raise CommandError(f"name the policy file: --policy FILE, or {POLICY_VARIABLE}")
    wanted = next((known for known in get_args(Role) if known == role), None)
    if wanted is None:
        raise CommandError(f"there is no role {clean(role)!r}; the roles are {ROLE_WORDS}")
    allowed = allowed_uids or os.environ.get(ALLOWED_UIDS_VARIABLE)
    uids = parse_uids(allowed, source=ALLOWED_UIDS_VARIABLE) if allowed else None
    explanation = explained(FilePolicy(_read(named), uids), principal, wanted, thread, via)
    facts = [
        ("decision", explanation.decision if not explanation.code else f"{explanation.decision} ({explanation.code})")
    ]
    facts += [
        (title, value)
        for title, value in (
            ("principal", explanation.principal),
            ("via", explanation.via),
            ("role", explanation.role),
            ("thread", explanation.thread),
            ("grant", explanation.grant),
            ("proxy", explanation.proxy),
            ("why", explanation.why),
        )
        if value
    ]
    facts += [("limit", text) for text in explanation.limits]
    facts += [("change", text) for text in explanation.what_would_change]
    print_result(asdict(explanation), Facts(facts), json=json)
    return EXIT_GOOD if explanation.decision == "allowed" else EXIT_FAILED


@app.command(name="reload")
def reload_policy(*, daemon: DaemonFlags = DaemonFlags(), json: Json = False) -> None:
    """Let the running daemon read its policy file again.

    Requests that it is carrying out obey the new policy too. Exit status: 0 it is in force, 1 it is refused, and the
    policy before it stays in force, 2 the daemon does not answer.
    """
    with daemon.client() as kms:
        answer = kms.reload_policy()
    text = f"The policy is in force: generation {answer.generation}, SHA-256 {answer.sha256}"
    print_result(answer, text, json=json)


def _read(file: Path) -> Rules:
    from minikms.policy.rules import POLICY_BYTES_MAX, parse_policy

    with file.open("rb") as opened:
        return parse_policy(opened.read(POLICY_BYTES_MAX + 1))
