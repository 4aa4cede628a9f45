"""The type of a verb: its name, path, roles, request, answer and possible refusals.

Owns: what an entry of the verb table can say, and the form of an error. Invariants: no I/O; a request with an unknown
field is refused. It must never know a particular verb: those are in `minikms.api.verbs`, `minikms.api.root_verbs`,
`minikms.api.seal_verbs`, `minikms.api.audit_verbs` and `minikms.api.replica_verbs`.
"""

from __future__ import annotations

from typing import Annotated, Final, Generic, Literal, TypeVar, get_args

import msgspec

Role = Literal[
    "create", "encrypt", "decrypt", "rotate", "destroy", "data_key", "audit", "monitor", "unseal", "ship", "replicate"
]
ROLES: Final[frozenset[Role]] = frozenset(get_args(Role))
Purpose = Literal["thread", "data", "mac", "derived"]
"""`derived` is `data` for callers who bind each record to a context (docs/spec/transit.md)."""
State = Literal["active", "retired", "destroyed"]
Base64 = Annotated[str, "base64"]
"""Bytes in a request, decoded strictly (msgspec would accept lax base64). Any other text is as short as an id."""


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """Base of all requests. An unknown field is refused, so that a mistyped `aad` is never ignored."""


RequestT = TypeVar("RequestT", bound=Request)
AnswerT = TypeVar("AnswerT")


class Verb(msgspec.Struct, Generic[RequestT, AnswerT], frozen=True, eq=False):
    """One operation of the key service. Verbs are compared by identity.

    name: in the audit log, in metrics, and as the operation of the OpenAPI document. path: `{key_id}`, `{slot_id}` or
    `{member_id}` stands for the field of that name; other fields are the query of a GET and the body of a POST. roles:
    the caller needs all. answer: the type of the JSON answer; `str` for plain text.
    """

    name: str
    method: Literal["GET", "POST"]
    path: str
    roles: tuple[Role, ...]
    request: type[RequestT]
    answer: type[AnswerT]
    summary: str
    refusals: tuple[str, ...] = ()
    """Error codes that this verb may answer in addition to those of every verb. `internal` in this list is a 503, when
    the arena has no free slot for another key.
    """
    repeatable: bool = False
    """A client may send the request again when it does not know whether the first one was carried out."""
    roles_by_item: bool = False
    """A caller without the role gets 200, and `forbidden` for each item."""
    proxied: bool = False
    """A proxy may use it on behalf of a principal. No verb that changes the service itself may set this."""
    charged_as: Literal["decrypts", "reencrypts"] | None = None
    """The hourly limit of a policy that counts its items, also those that fail."""
    answers_plaintext: bool = False
    """The answer is withheld if the policy no longer allows it when it leaves."""
    key_id_in_body: bool = False
    """The body repeats the key id of the path."""
    root_field: str = ""
    """The field of the body that holds a root key. The daemon takes it out before anything else reads the body."""
    may_answer_202: bool = False
    """It may answer 202, with an answer of the same type, while the work continues."""

    @property
    def is_batch(self) -> bool:
        """The request has a list `items` of at most BATCH_ITEMS_MAX."""
        return "items" in self.request.__struct_fields__

    @property
    def creates(self) -> bool:
        """It makes a key for the thread that the request names."""
        return "create" in self.roles and "thread_id" in self.request.__struct_fields__

    @property
    def has_body(self) -> bool:
        """Whether a request has a JSON body; otherwise its path, or its query, holds all fields."""
        return self.method == "POST" and (self.key_id_in_body or bool(self.root_field) or not self.path_field)

    @property
    def path_field(self) -> str:
        """The field that the path names; empty if it names none."""
        return self.path.partition("{")[2].partition("}")[0]


class ErrorAnswer(msgspec.Struct):
    """The body of every error: `error` is a sentence for people, `code` a stable word."""

    error: str
    code: str
