"""`minikms keys receipt` and `minikms receipt verify`: the receipt of a destroyed key, from the audit log.

Owns: the flags, and how a receipt is shown. Invariants: a receipt is verified without a daemon and without the log;
what is shown of it was signed by a given audit key; its place in the tree is shown only if the tree's keys prove it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from minikms import api
from minikms.api.errors import StartError
from minikms.audit import receipt
from minikms.audit.export import Exported, NotInTreeError, ProofChecker, Proven, open_tree
from minikms.audit.note import NoteError
from minikms.audit.receipt import Receipt
from minikms.audit.record import parse_line
from minikms.audit.tree import ProofError
from minikms.cli import audit, audit_tree
from minikms.cli.console import DataDir, Json, chosen_data_dir, complain
from minikms.commands.output import print_facts, print_json
from minikms.keys.dek import check_key_id
from minikms.platform.clock import rfc3339

app = App(name="receipt", help="Verify the receipt of a destroyed key.", version_flags=[])


@audit_tree.judging
def show(
    key_id: Annotated[str, Parameter(help="The key's id: k_…")],
    *,
    data_dir: DataDir = None,
    tiles: audit_tree.TreeDir = None,
) -> None:
    """Print the receipt of a destroyed key.

    It is the newest one in the audit log, as JSON. A daemon need not run. With --tiles it holds the proof that its line
    is in the auditor's tree. Exit status: 0 done, 1 the line is not the one in the tree, 2 the log has no receipt of
    the key.
    """
    from minikms.audit.blocks import Lookup
    from minikms.audit.queries import Query, find

    check_key_id(key_id)
    directory, index = audit.found_log(data_dir), audit.readable_index(chosen_data_dir(data_dir))
    sought = Query(key=key_id, types=(api.DESTROY_KEY.name,), outcomes=("ok",))
    matches = find(directory, sought, Lookup(index, directory) if index else None)
    lines = [line for line in matches if receipt.is_receipt(parse_line(line)[0])]
    if not lines:
        raise StartError(
            f"the audit log in {directory} has no receipt of {key_id}. If an earlier version destroyed it, or the line "
            "was removed, `minikms keys destroy` writes another one"
        )
    proof = ""
    if tiles is not None:
        prover = open_tree(Path(tiles))
        try:
            proof = prover.prove(prover.newest_log, parse_line(lines[-1])[0].seq, lines[-1]).proof
        except NotInTreeError as error:
            complain(f"{error}, so the receipt has no proof yet")
    print(msgspec.json.encode(Receipt(receipt.VERSION, lines[-1].decode("ascii"), proof)).decode())


@app.command
@audit_tree.judging
def verify(
    file: Annotated[str, Parameter(help="What `minikms keys receipt` printed; - reads standard input.")],
    *,
    public_key: Annotated[list[str], Parameter(help="Audit key, or a file that holds it. Repeatable: one signed.")],
    key: Annotated[str, Parameter(help="The id that the destroyed key must have.")] = "",
    log_key: audit_tree.LogKeys = None,
    witness: audit_tree.WitnessKeys = None,
    quorum: audit_tree.Quorum = None,
    json: Json = False,
) -> None:
    """Check the receipt of a destroyed key.

    One of the audit keys must have signed it. This needs no daemon and no log. With --log-key its line must be in the
    tree whose tree checkpoint these keys have signed. Exit status: 0 it is valid, 1 it is not, 2 a key or the file is
    missing.
    """
    keys = audit.public_keys(public_key)
    in_tree = log_key or witness or quorum is not None
    checker = ProofChecker(audit_tree.policy(log_key, witness, quorum)) if in_tree else None
    with audit_tree.opened(file) as source:
        parsed = receipt.parse(source.read(receipt.RECEIPT_BYTES_MAX + 1))
    event = receipt.check(parsed, keys)
    if key and event.key_id != key:
        raise ProofError(f"the receipt is one of {event.key_id}, not of {key}")
    facts: dict[str, object] = {
        "key_id": event.key_id,
        "destroyed_at": rfc3339(int(event.facts["destroyed_at"]) * 10**9),
        **{name: event.facts[name] for name in ("tombstone", "tombstone_tag", "epoch", "backups_removed", "archives")},
        "actor": event.actor,
        "seq": event.seq,
        "tree": _place(parsed, checker),
    }
    if json:
        print_json(facts)
    else:
        print("The receipt is valid: the audit key has signed that the key was destroyed.")
        print_facts([(name.replace("_", " "), value) for name, value in facts.items()], indent=2)


def _place(parsed: Receipt, checker: ProofChecker | None) -> str:
    """The place of the line in the tree. Raises ProofError."""
    if checker is None:
        return "not checked: --log-key was not given" if parsed.proof else "the receipt has no proof"
    if not parsed.proof:
        raise ProofError("the receipt has no proof that its line is in the tree")
    try:
        proven: Proven = checker.check(Exported(parsed.line, parsed.proof))
    except NoteError as error:
        raise ProofError(str(error)) from None
    at = proven.opened.quorum_time(checker.quorum)
    cosigned = "no witness has cosigned" if at is None else f"cosigned by a quorum at {rfc3339(at * 10**9)}"
    return f"leaf {proven.index} of {proven.opened.checkpoint.origin}, {cosigned}"
