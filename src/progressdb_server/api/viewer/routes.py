"""The viewer's routes: from a request to a page.

Owns: login and logout, who gets in, and which template shows what. Invariants: as the package says. A page that can't
be made is a page too, with the right status and a sentence.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Awaitable, Callable
from itertools import islice
from typing import Any, Final

import structlog

from minikms.client import KmsError
from progressdb_server.api.http import errors, head, limits
from progressdb_server.api.http.access import AddressBuckets, KeyTable, Role
from progressdb_server.api.http.errors import ApiError, Header, bad_request, forbidden
from progressdb_server.api.http.request import Call
from progressdb_server.api.http.response import Answer
from progressdb_server.api.routes import pages
from progressdb_server.api.routes.table import Operation, Resource
from progressdb_server.api.viewer.browsing import Browser, shown_time
from progressdb_server.api.viewer.sessions import Session, Sessions, new_token, same
from progressdb_server.jobs.service import Jobs
from progressdb_server.jobs.states import UNFINISHED, Job
from progressdb_server.kms.provider import Provider
from progressdb_server.store.model import MessageNotFoundError, Store, StoreError

SESSION_COOKIE: Final = "progressdb_viewer"
LOGIN_COOKIE: Final = "progressdb_login"
LOGIN_RPS: Final = 0.2
LOGIN_BURST: Final = 10
"""Of attempts from one address."""
FORM_BYTES_MAX: Final = 4096
_LOGIN_FIELDS: Final = frozenset({"csrf", "key", "username"})
"""`username` is there for password managers."""
JOBS_SHOWN_MAX: Final = 50
TEXT_CHARS_MAX: Final = 2000
"""Of a message in a list; its own page shows all of it."""

Page = Callable[[Call, Session], Awaitable[Answer]]

_log: Final = structlog.get_logger("progressdb.viewer")


class Viewer:
    def __init__(
        self,
        store: Store,
        provider: Provider,
        jobs: Jobs,
        keys: KeyTable,
        *,
        secure: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`secure`: browsers come by TLS, and are told to send the cookie by nothing else."""
        self._store = store
        self._browser = Browser(store, provider)
        self._provider = provider
        self._jobs = jobs
        self._keys = keys
        self._secure = secure
        self._clock = clock
        self.sessions = Sessions()
        self._attempts = AddressBuckets(LOGIN_RPS, LOGIN_BURST, count_max=limits.ADDRESSES_COUNT_MAX)

    def resources(self) -> tuple[Resource, ...]:
        inside = self._inside
        return (
            Resource("/viewer", {"GET": Operation(_to_viewer)}),
            Resource("/viewer/", {"GET": inside(self._threads)}),
            Resource("/viewer/threads/{thread}", {"GET": inside(self._thread)}),
            Resource("/viewer/messages/{message}", {"GET": inside(self._message)}),
            Resource("/viewer/jobs", {"GET": inside(self._jobs_page)}),
            Resource("/viewer/status", {"GET": inside(self._status)}),
            Resource(
                "/viewer/login",
                {"GET": Operation(_as_page(self._login_form)), "POST": Operation(_as_page(self._login))},
            ),
            Resource("/viewer/logout", {"POST": inside(self._logout)}),
            Resource("/viewer/style.css", {"GET": Operation(_style)}),
            Resource("/viewer/viewer.js", {"GET": Operation(_script)}),
        )

    # --- who gets in ------------------------------------------------------------------------------------------------
    def _inside(self, page: Page) -> Operation:
        """A page for a session; without one, the login."""

        async def guarded(call: Call) -> Answer:
            session = self.sessions.find(_cookie(call, SESSION_COOKIE), self._clock())
            if session is None:
                return _see_other("/viewer/login")
            return await page(call, session)

        return Operation(_as_page(guarded))

    async def _login_form(self, call: Call) -> Answer:
        return self._login_page(200, "")

    def _login_page(self, status: int, problem: str, headers: tuple[Header, ...] = ()) -> Answer:
        token = new_token()
        page = pages.rendered("viewer/login.html", csrf=token, problem=problem)
        return pages.answer(page, status, (self._set_cookie(LOGIN_COOKIE, token, "/viewer/login"), *headers))

    async def _login(self, call: Call) -> Answer:
        """The form's token must be that of its cookie, so that nobody is logged in by another site's form."""
        form = await _form(call, _LOGIN_FIELDS)
        wait_s = self._attempts.take(call.address, self._clock())
        if wait_s > 0:
            after = (b"retry-after", str(math.ceil(wait_s)).encode("ascii"))
            return self._login_page(429, "Too many attempts from this address; wait a little.", (after,))
        if not same(_cookie(call, LOGIN_COOKIE), form.get("csrf", "")):
            return self._login_page(403, "This form was too old; please log in again.")
        principal = self._keys.find(form.get("key", "").encode("utf-8", "surrogatepass"))
        if principal is None or principal.role is not Role.ADMIN:
            _log.warning("viewer_login_refused", request_id=call.request_id)
            return self._login_page(401, "This is not an admin key.", errors.UNAUTHORIZED_HEADERS)
        token = self.sessions.begin(principal.number, self._clock())
        _log.info("viewer_login", request_id=call.request_id, key=principal.number)
        return _see_other(
            "/viewer/",
            (
                self._set_cookie(SESSION_COOKIE, token, "/viewer"),
                self._set_cookie(LOGIN_COOKIE, "", "/viewer/login", ended=True),
            ),
        )

    async def _logout(self, call: Call, session: Session) -> Answer:
        form = await _form(call, frozenset({"csrf"}))
        if not session.check(form.get("csrf", "")):
            raise forbidden("this form was not made for this session")
        self.sessions.end(_cookie(call, SESSION_COOKIE))
        _log.info("viewer_logout", request_id=call.request_id, key=session.key_number)
        return _see_other("/viewer/login", (self._set_cookie(SESSION_COOKIE, "", "/viewer", ended=True),))

    def _set_cookie(self, name: str, value: str, path: str, *, ended: bool = False) -> Header:
        words = [f"{name}={value}", f"Path={path}", "HttpOnly", "SameSite=Strict"]
        words += ["Secure"] if self._secure else []
        words += ["Max-Age=0"] if ended else []
        return b"set-cookie", "; ".join(words).encode("ascii")

    # --- pages ------------------------------------------------------------------------------------------------------
    async def _threads(self, call: Call, session: Session) -> Answer:
        wanted, author = call.query.get("q", "").strip(), call.query.get("author", "").strip()
        if len(wanted) > limits.STORED_KEY_BYTES_MAX or len(author) > limits.AUTHOR_BYTES_MAX:
            raise bad_request("what you search for is too long")
        if wanted.startswith("msg-"):
            return _see_other(f"/viewer/messages/{wanted}") if limits.ID_PATTERN.fullmatch(wanted) else _nothing()
        found = await self._browser.threads(author=author, id_prefix=wanted, cursor=call.query.get("cursor", ""))
        return _page("threads", session, found=found, wanted=wanted, author=author, stats=await self._store.stats())

    async def _thread(self, call: Call, session: Session) -> Answer:
        thread = await self._store.get_thread(call.id_from_path("thread", "thread not found"))
        before, after = call.query.get("before", ""), call.query.get("after", "")
        if before and after:
            raise bad_request("before and after exclude each other")
        shown = await self._browser.messages(thread.id, before=before, after=after)
        return _page("thread", session, thread=thread, shown=shown)

    async def _message(self, call: Call, session: Session) -> Answer:
        versions = await self._browser.message(call.id_from_path("message", "message not found"))
        return _page("message", session, versions=versions, latest=versions[-1][0])

    async def _jobs_page(self, call: Call, session: Session) -> Answer:
        """The table alone with `part=rows`, for the page's script."""
        listed = (job for page in self._jobs.table.pages(newest_first=True) for job in page)
        jobs = list(islice(listed, JOBS_SHOWN_MAX))
        if call.query.get("part") == "rows":
            return pages.answer(pages.rendered("viewer/jobs_rows.html", jobs=jobs, percent=_percent, **_HELPERS))
        live = any(job.state in UNFINISHED for job in jobs)
        return _page("jobs", session, jobs=jobs, percent=_percent, live=live)

    async def _status(self, call: Call, session: Session) -> Answer:
        status: dict[str, Any] = await self._provider.status()
        return _page("status", session, status=status)


# --- helpers of the pages --------------------------------------------------------------------------------------
def _percent(job: Job) -> int:
    """How much of it is behind us, 100 where there is nothing to do."""
    total = max(job.total, job.done + job.failed)
    return 100 * (job.done + job.failed) // total if total else 100 * (job.state == "done")


def _text(body: object, chars_max: int | None = TEXT_CHARS_MAX) -> str:
    """A message's body as text: itself where it is one, otherwise JSON."""
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False, indent=1)
    return text if chars_max is None or len(text) <= chars_max else text[:chars_max] + " …"


_HELPERS: Final[dict[str, Any]] = {"shown_time": shown_time, "text": _text}


def _page(name: str, session: Session, **values: Any) -> Answer:
    return pages.answer(pages.rendered(f"viewer/{name}.html", session=session, active=name, **_HELPERS, **values))


def _as_page(handler: Callable[[Call], Awaitable[Answer]]) -> Callable[[Call], Awaitable[Answer]]:
    """What a handler refuses becomes a page."""

    async def shown(call: Call) -> Answer:
        try:
            return await handler(call)
        except ApiError as error:
            refusal = error
        except StoreError as error:
            refusal = errors.from_store(error)
        except KmsError:
            refusal = ApiError(503, "the key service is not available now", ((b"retry-after", b"2"),))
        page = pages.rendered("viewer/problem.html", problem=refusal.text, request_id=call.request_id)
        return pages.answer(page, refusal.status, refusal.headers)

    return shown


def _nothing() -> Answer:
    raise MessageNotFoundError("message not found")


def _see_other(place: str, headers: tuple[Header, ...] = ()) -> Answer:
    return Answer(
        303, content_type=None, headers=((b"location", place.encode("ascii")), (b"content-length", b"0"), *headers)
    )


async def _to_viewer(call: Call) -> Answer:
    return Answer(308, content_type=None, headers=((b"location", b"/viewer/"), (b"content-length", b"0")))


async def _style(call: Call) -> Answer:
    return pages.asset("style.css")


async def _script(call: Call) -> Answer:
    return pages.asset("viewer.js")


def _cookie(call: Call, name: str) -> str:
    """The value of one cookie; empty where there is none, or two of the name."""
    given = call.headers.get(head.COOKIE, b"").decode("latin-1")
    found = [value for key, _, value in (part.strip().partition("=") for part in given.split(";")) if key == name]
    return found[0] if len(found) == 1 else ""


async def _form(call: Call, fields: frozenset[str]) -> dict[str, str]:
    """`application/x-www-form-urlencoded` with no other fields than these. Raises ApiError 400, 413."""
    raw = await call.body()
    if len(raw) > FORM_BYTES_MAX:
        raise errors.too_large()
    form = head.read_query(raw)
    if not fields.issuperset(form):
        raise bad_request("the form has a field that is not known")
    return form
