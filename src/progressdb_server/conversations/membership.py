"""Who may read a thread and write into it: the one policy, and the entries on disk that it is decided from.

Owns: the rule of a store (`Rule`), what an author is to a thread (`Standing`), and `check`, by which every route and
every write decides. Invariants:
- An author who was removed neither reads nor writes, under either rule, until added again.
- A write carries the entry that it was decided from as a condition, so the writer orders a post and a concurrent
  removal.
- The entry of the thread's own author is never a removed one.
- A thread has at most `MEMBERS_COUNT_MAX` entries, removed ones too. A removal always leaves an entry, even of an
  author who had none, so that no later post or repair makes that author a member.
"""

from __future__ import annotations

import enum
from typing import Final, Literal

from progressdb_server.store import keyspace
from progressdb_server.store.model import AuthorNotInThreadError, NotAMemberError

MEMBERS_COUNT_MAX: Final = 4096
"""Members of a thread, with those who were removed."""

Rule = Literal["members", "open"]
"""`members`: only the author of a thread and its members post into it. `open`: whoever posts becomes a member."""


class Standing(enum.Enum):
    """What somebody is to a thread. The thread's author is a member."""

    MEMBER = "member"
    REMOVED = "removed"
    OUTSIDER = "outsider"


class Act(enum.Enum):
    READ = "read"
    WRITE = "write"


def standing_of(entry: bytes | None) -> Standing:
    """The standing in the value of an entry of `keyspace.writer`; None if there is none."""
    if entry is None:
        return Standing.OUTSIDER
    return Standing.MEMBER if entry == keyspace.MEMBER else Standing.REMOVED


def check(rule: Rule, standing: Standing, act: Act) -> None:
    """Checks that a user of this standing may do this. Raises NotAMemberError or AuthorNotInThreadError.

    It is called for a signed user. A backend or admin key acts for anyone, so it is called for such a key only where it
    names an author whose messages it lists.
    """
    if standing is Standing.MEMBER:
        return
    if standing is Standing.OUTSIDER:
        if act is Act.READ:
            raise AuthorNotInThreadError
        if rule == "open":
            return
    raise NotAMemberError
