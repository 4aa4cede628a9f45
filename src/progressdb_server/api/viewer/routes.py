"""The operations of the viewer: login, logout and the pages.

Owns: which callers are let in, and the template of each page. The invariants are those of the package. An error becomes
a page too, with its status and a sentence. When the key service is away or hangs, every page shows what is known
without it, and what to do.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import math
import re
import time
from collections.abc import Awaitable, Callable
from functools import partial, wraps
from typing import Any, Final, TypeVar
from urllib.parse import quote

from minikms import api
from minikms.api.errors import ForbiddenError, KeyDestroyedError, KmsError
from minikms.platform.addresses import address_group
from minikms.platform.logs import Log
from progressdb_server.api.gate import head, limits
from progressdb_server.api.gate.errors import (
    TOO_LARGE,
    UNAUTHORIZED_HEADERS,
    ApiError,
    bad_request,
    forbidden,
    retry_after,
    too_large,
)
from progressdb_server.api.gate.keys import KeyTable, Role
from progressdb_server.api.gate.rates import RateBuckets
from progressdb_server.api.gate.request import ApiRequest
from progressdb_server.api.gate.response import ApiResponse, redirect
from progressdb_server.api.openapi.description import (
    AUTHOR,
    DISK,
    ID,
    NOTHING,
    TEXT,
    Dependency,
    Handler,
    Operation,
    Parameter,
    text,
)
from progressdb_server.api.routes import pages
from progressdb_server.api.routes.metrics import ApiMetrics
from progressdb_server.api.routes.readiness import Readiness
from progressdb_server.api.viewer import audit, overview
from progressdb_server.api.viewer.audit import AuditorClient, AuditorError
from progressdb_server.api.viewer.browsing import Browser, MessagePage, ThreadPage, VersionPage, format_time
from progressdb_server.api.viewer.history import SAMPLE_S, History
from progressdb_server.api.viewer.keys import KeyBrowser, ViewerKeyPage
from progressdb_server.api.viewer.sessions import Sessions, ViewerSession, new_token, same
from progressdb_server.conditions import Look, verb_for
from progressdb_server.conversations.whole import Conversations
from progressdb_server.http.asgi import Header
from progressdb_server.jobs.service import Jobs
from progressdb_server.jobs.states import Job, JobNotFoundError
from progressdb_server.kms.provider import Fault, Provider, fault
from progressdb_server.store.model import (
    KeyServiceRefusedError,
    MessageNotFoundError,
    StatusError,
    StoreUnavailableError,
    Thread,
    ThreadNotFoundError,
)

SESSION_COOKIE: Final = "progressdb_viewer"
LOGIN_COOKIE: Final = "progressdb_login"
LOGIN_RPS: Final = 0.2
LOGIN_BURST: Final = 10
"""Refused keys of login attempts from one address. Beyond them a wrong key is a 429, and a right one opens."""
_LOGIN_FIELDS: Final = frozenset({"csrf", "key", "username", "next"})
"""`username` is for password managers."""
_PLACE: Final = re.compile(r"/viewer/[A-Za-z0-9._~%/?&=+:-]{0,1000}", re.ASCII)
"""What a login may lead to."""
JOBS_SHOWN_MAX: Final = 50
OPEN_S_MAX: Final = 5.0
"""How long a page waits for its records to be opened."""
TEXT_CHARS_MAX: Final = 2000
"""Characters of a message in a list. Its own page shows all of it."""
INVALID_LOGIN: Final = "This is not an admin key."
OLD_FORM: Final = "The login form has expired. Log in again."
TOO_MANY_ATTEMPTS: Final = "Too many login attempts from this address. Wait a minute, then try again."
OTHER_SESSION: Final = "the form belongs to another session: reload the page"
SEARCH_TOO_LONG: Final = "the search text is too long"
TWO_CURSORS: Final = "give before or after, not both"
UNKNOWN_FIELD: Final = "the form has an unknown field"

Shown = TypeVar("Shown")
PageHandler = Callable[[ApiRequest, ViewerSession], Awaitable[ApiResponse]]

_log: Final = Log()


class Viewer:
    def __init__(
        self,
        store: Conversations,
        provider: Provider,
        jobs: Jobs,
        readiness: Readiness,
        keys: KeyTable,
        *,
        metrics: ApiMetrics,
        auditor: AuditorClient,
        look: Look,
        secure: bool,
    ) -> None:
        """`secure`: the server speaks TLS, and browsers may send the cookie only over TLS."""
        self._auditor = auditor
        self._look = look
        self._metrics = metrics
        self._history = History()
        self._sampling: asyncio.Task[None] | None = None
        self._store = store
        self._browser = Browser(store, provider)
        self._key_browser = KeyBrowser(provider, jobs.table)
        self._jobs = jobs
        self._readiness = readiness
        self._keys = keys
        self._secure = secure
        self.sessions = Sessions()
        self._attempts = RateBuckets(LOGIN_RPS, LOGIN_BURST, count_max=limits.ADDRESSES_COUNT_MAX)

    def start(self) -> None:
        """Begins the history of the overview."""
        self._sampling = asyncio.get_running_loop().create_task(self._sample())

    async def close(self) -> None:
        if self._sampling is not None:
            self._sampling.cancel()
            await asyncio.wait({self._sampling})

    async def _sample(self) -> None:
        while True:
            self._history.take(time.time(), overview.totals(self._metrics, self._readiness.kms))
            await asyncio.sleep(SAMPLE_S)

    # --- login and logout -------------------------------------------------------------------------------------------
    def _inside(self, page: PageHandler) -> Handler:
        """A page within a session. Without a session, the response redirects to the login."""

        @wraps(page)
        async def guarded(request: ApiRequest) -> ApiResponse:
            session = self.sessions.find(_cookie(request, SESSION_COOKIE), time.monotonic())
            if session is None:
                place = request.path + (f"?{query}" if (query := request.query_string.decode("latin-1")) else "")
                suffix = f"?next={quote(place, safe='/')}" if _PLACE.fullmatch(place) and place != "/viewer/" else ""
                return redirect(303, f"/viewer/login{suffix if request.method == 'GET' else ''}")
            request.viewer_key = session.key_number
            return await page(request, session)

        return guarded

    async def _login_form(self, request: ApiRequest) -> ApiResponse:
        """Show the login form."""
        return self._login_page(200, "", request.query_params.get("next", ""))

    def _login_page(self, status: int, problem: str, place: str, headers: tuple[Header, ...] = ()) -> ApiResponse:
        token = new_token()
        page = pages.render("viewer/login.html", csrf=token, problem=problem, next=place)
        return pages.page_response(page, status, (self._set_cookie(LOGIN_COOKIE, token, "/viewer/login"), *headers))

    async def _login(self, request: ApiRequest) -> ApiResponse:
        """Log in with an admin key. This starts a session.

        The form's token must match its cookie, so that no form of another site can log a user in."""
        form = await _form(request, _LOGIN_FIELDS)
        address, now_s = address_group(request.client_address), time.monotonic()
        place = form.get("next", "")
        if not same(_cookie(request, LOGIN_COOKIE), form.get("csrf", "")):
            return self._login_page(403, OLD_FORM, place)
        caller = self._keys.find(form.get("key", "").encode("utf-8", "surrogatepass"))
        if caller is None or caller.role is not Role.ADMIN:
            if (wait_s := self._attempts.wait_s(address, now_s)) > 0:
                return self._login_page(429, TOO_MANY_ATTEMPTS, place, (retry_after(math.ceil(wait_s)),))
            self._attempts.take(address, now_s)
            _log.warning("viewer_login_refused", request_id=request.request_id)
            return self._login_page(401, INVALID_LOGIN, place, UNAUTHORIZED_HEADERS)
        self.sessions.end(_cookie(request, SESSION_COOKIE))
        token = self.sessions.begin(caller.number, time.monotonic())
        _log.info("viewer_login", request_id=request.request_id, key=caller.number)
        return redirect(
            303,
            place if _PLACE.fullmatch(place) else "/viewer/",
            (
                self._set_cookie(SESSION_COOKIE, token, "/viewer"),
                self._set_cookie(LOGIN_COOKIE, "", "/viewer/login", ended=True),
            ),
        )

    async def _logout(self, request: ApiRequest, session: ViewerSession) -> ApiResponse:
        """Log out. This ends the session."""
        form = await _form(request, frozenset({"csrf"}))
        if not session.check(form.get("csrf", "")):
            raise forbidden(OTHER_SESSION)
        self.sessions.end(_cookie(request, SESSION_COOKIE))
        _log.info("viewer_logout", request_id=request.request_id, key=session.key_number)
        return redirect(303, "/viewer/login", (self._set_cookie(SESSION_COOKIE, "", "/viewer", ended=True),))

    def _set_cookie(self, name: str, value: str, path: str, *, ended: bool = False) -> Header:
        words = [f"{name}={value}", f"Path={path}", "HttpOnly", "SameSite=Strict"]
        words += ["Secure"] if self._secure else []
        words += ["Max-Age=0"] if ended else []
        return b"set-cookie", "; ".join(words).encode("ascii")

    # --- pages ------------------------------------------------------------------------------------------------------
    async def _overview(self, request: ApiRequest, session: ViewerSession) -> ApiResponse:
        """Show whether all is well, and what the server has done lately."""
        day = request.query_params.get("period") == "day"
        kms = self._readiness.kms
        stats: dict[str, int] = {}
        with contextlib.suppress(StoreUnavailableError):
            stats = await self._store.stats()
        values = {
            "conditions": await self._look.conditions(),
            "charts": overview.charts(self._history, day=day),
            "day": day,
            "stats": stats,
            "slowest": {
                "server": self._metrics.slowest(),
                "key service": kms.slowest(),
                "disk": self._store.metrics.slowest(),
            },
            "keys": kms.last_status.keys if kms.last_status else None,
            "width": overview.CHART_WIDTH,
            "height": overview.CHART_HEIGHT,
        }
        if request.query_params.get("part") == "live":
            return pages.page_response(pages.render("viewer/overview_live.html", **_HELPERS, **values))
        return _page("overview", session, **values)

    async def _threads(self, request: ApiRequest, session: ViewerSession) -> ApiResponse:
        """List threads, newest first. Search them by id and author."""
        wanted, author = request.query_params.get("q", "").strip(), request.query_params.get("author", "").strip()
        if len(wanted) > limits.STORED_KEY_BYTES_MAX or len(author) > limits.AUTHOR_BYTES_MAX:
            raise bad_request(SEARCH_TOO_LONG)
        if wanted.startswith("msg-"):
            if not limits.ID_PATTERN.fullmatch(wanted):
                raise MessageNotFoundError
            return redirect(303, f"/viewer/messages/{wanted}")
        cursor = request.query_params.get("cursor", "")

        async def read(opened: bool) -> ThreadPage:
            return await self._browser.threads(author=author, id_prefix=wanted, cursor=cursor, opened=opened)

        page, problem = await self._opened(read)
        stats = await self._store.stats()
        return _page("threads", session, page=page, wanted=wanted, author=author, stats=stats, problem=problem)

    async def _thread(self, request: ApiRequest, session: ViewerSession) -> ApiResponse:
        """Show a conversation, and the key that encrypts each message."""
        thread_id = request.id_from_path("thread", ThreadNotFoundError)
        before, after = request.query_params.get("before", ""), request.query_params.get("after", "")
        await self._browser.thread(thread_id, opened=False)  # an unknown thread is a 404, whatever the query
        if before and after:
            raise bad_request(TWO_CURSORS)

        async def read(opened: bool) -> tuple[Thread, MessagePage]:
            thread = await self._browser.thread(thread_id, opened=opened)
            return thread, await self._browser.messages(thread_id, before=before, after=after, opened=opened)

        (thread, page), problem = await self._opened(read)
        return _page("thread", session, thread=thread, page=page, problem=problem)

    async def _message(self, request: ApiRequest, session: ViewerSession) -> ApiResponse:
        """Show the versions of a message."""
        message_id = request.id_from_path("message", MessageNotFoundError)

        async def read(opened: bool) -> VersionPage:
            return await self._browser.message(message_id, opened=opened)

        page, problem = await self._opened(read)
        return _page("message", session, page=page, latest=page.versions[-1][0], problem=problem)

    async def _jobs_page(self, request: ApiRequest, session: ViewerSession) -> ApiResponse:
        """Show the jobs and their progress."""
        jobs = await self._newest_jobs()
        if request.query_params.get("part") == "rows":
            return pages.page_response(pages.render("viewer/jobs_rows.html", jobs=jobs, percent=_percent, **_HELPERS))
        return _page("jobs", session, jobs=jobs, percent=_percent)

    async def _job_page(self, request: ApiRequest, session: ViewerSession) -> ApiResponse:
        """Show a job: its state, the reason, records, keys, and what can be done."""
        job = await self._jobs.table.get(request.path_params["job"])
        return _page("job", session, job=job)

    async def _keys_page(self, request: ApiRequest, session: ViewerSession) -> ApiResponse:
        """List keys, oldest first, by thread and state, or one by its id."""
        query = {name: request.query_params.get(name, "").strip() for name in ("key", "thread", "state", "cursor")}
        if any(len(value) > limits.STORED_KEY_BYTES_MAX for value in query.values()):
            raise bad_request(SEARCH_TOO_LONG)
        state: api.State | None = "active" if query["state"] == "active" else None
        if query["state"] == "retired":
            state = "retired"
        page, problem, mistake = ViewerKeyPage([]), "", ""
        try:
            async with asyncio.timeout(OPEN_S_MAX):
                if query["key"]:
                    page = await self._key_browser.one(query["key"])
                else:
                    page = await self._key_browser.page(thread=query["thread"], state=state, cursor=query["cursor"])
        except TimeoutError:
            problem = "it has not answered in time"
        except KmsError as error:
            if isinstance(error, KeyDestroyedError):
                return _page("keys", session, page=page, query=query, problem="", mistake="", destroyed=True)
            if fault(error) is Fault.REQUEST and not isinstance(error, ForbiddenError):
                mistake = str(error)
            else:
                problem = str(error)
        return _page("keys", session, page=page, query=query, problem=problem, mistake=mistake, destroyed=False)

    async def _audit(self, request: ApiRequest, session: ViewerSession) -> ApiResponse:
        """Search the audit log, newest lines first."""
        query = {name: request.query_params.get(name, "").strip() for name in audit.FIELDS}
        if any(len(value) > limits.STORED_KEY_BYTES_MAX for value in query.values()):
            raise bad_request(SEARCH_TOO_LONG)
        key: str | None = None
        with contextlib.suppress(StoreUnavailableError):
            if limits.ID_PATTERN.fullmatch(query["thread"]):
                key = await self._store.rekeying.key_of_thread(query["thread"])
        question = audit.question(query, asker=f"admin key {session.key_number}", thread_keys=(key,) if key else ())
        answer, problem = None, ""
        try:
            answer = await self._auditor.ask(question) if self._auditor.is_configured else None
        except AuditorError as error:
            problem = str(error)
        named = answer is None or (answer.thread_keys and not answer.begins_late and key in (None, *answer.thread_keys))
        return _page(
            "audit",
            session,
            query=query,
            answer=answer,
            problem=problem,
            configured=self._auditor.is_configured,
            missing=bool(query["thread"]) and not named,
            verbs=sorted(verb.name for verb in api.VERBS),
        )

    async def _newest_jobs(self) -> list[Job]:
        jobs: list[Job] = []
        async for page in self._jobs.table.newest():
            jobs += page
            if len(jobs) >= JOBS_SHOWN_MAX:
                break
        return jobs[:JOBS_SHOWN_MAX]

    async def _status(self, request: ApiRequest, session: ViewerSession) -> ApiResponse:
        """Show the status of the key service, or its last status."""
        problem = await self._readiness.key_service.problem()
        kms = self._readiness.kms
        address = kms.address if len(kms.addresses) > 1 else ""
        return _page(
            "status", session, status=kms.last_status, seen_ns=kms.last_status_ns, problem=problem, address=address
        )

    async def _opened(self, read: Callable[[bool], Awaitable[Shown]]) -> tuple[Shown, str]:
        """What a page shows, and what is wrong with the key service. If something is, `read(False)` shows what is
        stored in plaintext, so that no page waits long for a key service that is away or hangs."""
        problem = await self._readiness.key_service.problem()
        if not problem:
            try:
                async with asyncio.timeout(OPEN_S_MAX):
                    return await read(True), ""
            except TimeoutError:
                problem = "it did not open the records in time"
            except (StoreUnavailableError, KeyServiceRefusedError) as error:
                problem = str(error)
        return await read(False), problem

    def error_page(self, error: ApiError, request: ApiRequest) -> ApiResponse:
        """The page of an error, with the bar of the session if there is one."""
        session = self.sessions.find(_cookie(request, SESSION_COOKIE), time.monotonic())
        values = {"problem": error.text, "request_id": request.request_id}
        place = request.path if error.status == 404 else ""
        page = pages.render("viewer/problem.html", session=session, active="", place=place, **values)
        return pages.page_response(page, error.status, error.headers)

    # --- operations -------------------------------------------------------------------------------------------------
    def operations(self) -> tuple[Operation, ...]:
        inside = self._inside
        without_session = partial(Operation, "GET", response=TEXT, needs=NOTHING)
        return (
            Operation("GET", "/viewer", _to_viewer, status=308, needs=NOTHING),
            _shown(
                "/viewer/",
                inside(self._overview),
                Parameter("period", TEXT, "`day`: the charts show a day and not an hour."),
                Parameter("part", TEXT, "`live`: only what changes."),
                needs=NOTHING,
            ),
            _shown(
                "/viewer/threads",
                inside(self._threads),
                Parameter(
                    "q", text(limits.STORED_KEY_BYTES_MAX), "The beginning of a thread id, or a whole message id."
                ),
                Parameter("author", AUTHOR, "The author of the threads."),
                Parameter("cursor", {"type": "string", "maxLength": 1024}, "The cursor of the previous page's link."),
                raises=(MessageNotFoundError,),
                errors={400: (SEARCH_TOO_LONG,)},
            ),
            _shown(
                "/viewer/threads/{thread}",
                inside(self._thread),
                Parameter("before", ID, "A message id. Shows the messages before it."),
                Parameter("after", ID, "A message id. Shows the messages after it."),
                raises=(ThreadNotFoundError, MessageNotFoundError),
                errors={400: (TWO_CURSORS,)},
            ),
            _shown("/viewer/messages/{message}", inside(self._message), raises=(MessageNotFoundError,)),
            _shown(
                "/viewer/audit",
                inside(self._audit),
                *(Parameter(name, text(limits.STORED_KEY_BYTES_MAX), what) for name, what in audit.FIELDS.items()),
                errors={400: (SEARCH_TOO_LONG, audit.BAD_TIME, audit.BAD_NUMBER)},
                needs=NOTHING,
            ),
            _shown("/viewer/jobs", inside(self._jobs_page), Parameter("part", TEXT, "`rows`: only the table.")),
            _shown("/viewer/jobs/{job}", inside(self._job_page), raises=(JobNotFoundError,)),
            _shown(
                "/viewer/keys",
                inside(self._keys_page),
                Parameter("key", TEXT, "The id of one key."),
                Parameter("thread", TEXT, "The id of a thread."),
                Parameter("state", TEXT, "`active` or `retired`."),
                Parameter("cursor", TEXT, "The cursor of the previous page's link."),
                errors={400: (SEARCH_TOO_LONG,)},
                needs=NOTHING,
            ),
            _shown("/viewer/status", inside(self._status), needs=NOTHING),
            without_session(
                "/viewer/login",
                self._login_form,
                content_type="text/html",
                parameters=(Parameter("next", TEXT, "The page to show after the login."),),
            ),
            _posted(
                "/viewer/login",
                self._login,
                {401: (INVALID_LOGIN,), 403: (OLD_FORM,), 429: (TOO_MANY_ATTEMPTS,)},
                _LOGIN_FIELDS,
            ),
            _posted("/viewer/logout", inside(self._logout), {403: (OTHER_SESSION,)}, frozenset({"csrf"})),
            without_session("/viewer/style.css", _style, content_type="text/css"),
            without_session("/viewer/viewer.js", _script, content_type="text/javascript"),
        )


# --- helpers of the pages --------------------------------------------------------------------------------------
def _percent(job: Job) -> int:
    """Progress in percent; 100 for a finished job without records. A record that failed is no progress."""
    total = max(job.total, job.done + job.failed)
    return 100 * job.done // total if total else 100 * (job.state == "done")


def _text(body: object, chars_max: int | None) -> str:
    """A message's body: itself if it is text, or has nothing but a text, otherwise JSON. At most `chars_max`
    characters."""
    if isinstance(body, dict) and list(body) == ["text"]:
        body = body["text"]
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False, indent=1)
    return text if chars_max is None or len(text) <= chars_max else text[:chars_max] + " …"


def _base64(in_hex: str) -> str:
    """A public key as commands print it."""
    return base64.b64encode(bytes.fromhex(in_hex)).decode("ascii")


_HELPERS: Final[dict[str, Any]] = {
    "format_time": format_time,
    "text": _text,
    "base64": _base64,
    "TEXT_CHARS_MAX": TEXT_CHARS_MAX,
    "verb_for": verb_for,
}


def _page(name: str, session: ViewerSession, **values: Any) -> ApiResponse:
    return pages.page_response(pages.render(f"viewer/{name}.html", session=session, active=name, **_HELPERS, **values))


async def _to_viewer(request: ApiRequest) -> ApiResponse:
    """Redirect to `/viewer/`."""
    return redirect(308, "/viewer/")


async def _style(request: ApiRequest) -> ApiResponse:
    """The style sheet of the pages."""
    return pages.asset_response("style.css")


async def _script(request: ApiRequest) -> ApiResponse:
    """The script of the page that shows the jobs."""
    return pages.asset_response("viewer.js")


def _cookie(request: ApiRequest, name: str) -> str:
    """The value of a cookie; empty if there is none, or more than one of this name."""
    header = request.headers.get(head.COOKIE, b"").decode("latin-1")
    values = [value for key, _, value in (part.strip().partition("=") for part in header.split(";")) if key == name]
    return values[0] if len(values) == 1 else ""


async def _form(request: ApiRequest, fields: frozenset[str]) -> dict[str, str]:
    """The fields of an `application/x-www-form-urlencoded` body. Raises ApiError 400 for any other field, 413."""
    raw = await request.body()
    if len(raw) > limits.FORM_BYTES_MAX:
        raise too_large()
    form = head.read_query(raw)
    if not fields.issuperset(form):
        raise bad_request(UNKNOWN_FIELD)
    return form


# --- operations -------------------------------------------------------------------------------------------------
def _shown(
    path: str,
    handler: Handler,
    *parameters: Parameter,
    raises: tuple[type[StatusError], ...] = (),
    errors: dict[int, tuple[str, ...]] | None = None,
    needs: frozenset[Dependency] = DISK,
) -> Operation:
    """An operation that shows a page, or redirects to the login."""
    return Operation(
        "GET",
        path,
        handler,
        response=TEXT,
        content_type="text/html",
        parameters=parameters,
        other_responses={303: None},
        errors=errors or {},
        raises=raises,
        needs=needs,
    )


def _posted(path: str, handler: Handler, errors: dict[int, tuple[str, ...]], fields: frozenset[str]) -> Operation:
    """An operation that takes a form and redirects."""
    form = {
        "type": "object",
        "properties": {name: {"type": "string", "maxLength": 1000} for name in sorted(fields)},
        "required": sorted(fields - {"username", "next"}),
        "additionalProperties": False,
    }
    errors = {413: (TOO_LARGE,), 400: (UNKNOWN_FIELD,), **errors}
    return Operation("POST", path, handler, status=303, form=form, errors=errors, needs=NOTHING)
