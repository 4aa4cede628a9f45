"""The viewer and the documentation in a real browser: they work, run nothing that a user typed, and fit the screen."""

from collections.abc import Iterator
from importlib import resources

import pytest

from tests import needs
from tests.progressdb_server.api.asgi_client import ADMIN
from tests.progressdb_server.api.browser import Browser
from tests.progressdb_server.api.real_server import RealServer

PAGES = (
    "/viewer/",
    "/viewer/threads",
    "/viewer/threads/{thread}",
    "/viewer/keys",
    "/viewer/jobs",
    "/viewer/audit?thread={thread}&verb=reads",
    "/viewer/status",
    "/docs/",
)
TAB, ENTER = 9, 13
HOSTILE = (
    "<script>window.stolen = 1</script><img src=x onerror='window.stolen = 2'>"
    "<a href='javascript:window.stolen=3'>x</a>\"'></div><svg/onload=window.stolen=4>{{ 7 * 7 }}{% raw %}"
)


@pytest.fixture(scope="module")
def page(server: RealServer) -> Iterator[Browser]:
    with Browser() as browser:
        browser.go(f"http://127.0.0.1:{server.port}/viewer/")
        browser.evaluate(f"document.getElementById('key').value = {ADMIN!r}")
        browser.follow("document.forms[0].submit()")
        yield browser


def url(server: RealServer, path: str) -> str:
    return f"http://127.0.0.1:{server.port}{path}"


def hostile_thread(server: RealServer) -> str:
    thread = str(server("POST", "/v1/threads", {"title": HOSTILE, "author": "<b>eve</b>"}).json["id"])
    message = server(
        "POST", "/v1/messages", {"thread": thread, "author": "<b>eve</b>", "body": HOSTILE, "role": HOSTILE[:100]}
    ).json["id"]
    server("PUT", f"/v1/messages/{message}", {"author": "<b>eve</b>", "body": {HOSTILE: [HOSTILE]}})
    server("POST", f"/v1/messages/{message}/reactions", {"id": "<i>", "reaction": HOSTILE})
    return thread


def test_a_person_logs_in_with_the_keyboard_and_finds_a_message(server: RealServer) -> None:
    thread = server("POST", "/v1/threads", {"title": "Lunch", "author": "alice"}).json["id"]
    server("POST", "/v1/messages", {"thread": thread, "author": "alice", "body": "Soup at noon"})
    with Browser() as browser:
        browser.go(url(server, "/viewer/"))
        browser.until("document.activeElement.id === 'key'")
        browser.type("wrong")
        browser.follow("document.forms[0].submit()")
        assert browser.evaluate("document.querySelector('[role=alert]').textContent") == "This is not an admin key."
        browser.until("document.activeElement.id === 'key'")
        browser.type(ADMIN)
        browser.press("Enter", ENTER)
        browser.until("location.pathname === '/viewer/' && document.title.startsWith('Overview')")
        browser.press("Tab", TAB)
        assert browser.evaluate("document.activeElement.className") == "skip"
        browser.follow("document.querySelector('nav a[href=\"/viewer/threads\"]').click()")
        browser.evaluate(f"document.querySelector('a[href=\"/viewer/threads/{thread}\"]').focus()")
        browser.press("Enter", ENTER)
        browser.until("document.title.startsWith('Lunch')")
        assert browser.evaluate("document.querySelector('article .body').textContent") == "Soup at noon"
        protection = browser.evaluate("document.querySelector('article footer').textContent")
        assert "DEK k_" in protection
        assert "under KEK 1 since 20" in protection
        browser.follow("document.querySelector('form[action=\"/viewer/logout\"] button').click()")
        browser.until("location.pathname === '/viewer/login'")
        browser.go(url(server, f"/viewer/threads/{thread}"))
        assert browser.evaluate("location.pathname") == "/viewer/login"
        assert [text for text in browser.complaints if "401" not in text] == []


def test_what_users_typed_is_text_and_never_runs(server: RealServer, page: Browser) -> None:
    thread = hostile_thread(server)
    message = server("GET", f"/v1/messages?thread={thread}").json["messages"][0]["id"]
    page.complaints.clear()
    for place in ("/viewer/threads", f"/viewer/threads/{thread}", f"/viewer/messages/{message}"):
        page.go(url(server, place))
        assert "<script>window.stolen" in page.evaluate("document.body.textContent")
        assert page.evaluate("document.querySelectorAll('main script, main img, main svg, main b, main i').length") == 0
        assert page.evaluate("[...document.links].filter(a => a.protocol === 'javascript:').length") == 0
    page.go(url(server, "/viewer/threads?q=%22%3E%3Cscript%3Ewindow.stolen=5%3C/script%3E&author=%22onfocus=stolen"))
    assert page.evaluate("document.getElementById('q').value").startswith('"><script>')
    assert page.evaluate("window.stolen === undefined")
    assert page.complaints == []


def test_names_that_users_chose_squeeze_and_turn_nothing(server: RealServer, page: Browser) -> None:
    author = "\u202eeve"
    thread = server("POST", "/v1/threads", {"title": "A" * 1000, "author": author}).json["id"]
    page.size(1100, 800)
    page.go(url(server, "/viewer/threads"))
    row = f"document.querySelector('a[href=\"/viewer/threads/{thread}\"]').closest('tr')"
    assert page.evaluate(f"{row}.querySelector('td code').getClientRects().length") <= 2
    assert page.evaluate(f"{row}.querySelector('th bdi').title") == "A" * 1000
    assert page.evaluate(f"{row}.clientHeight") < 120
    page.go(url(server, f"/viewer/threads/{thread}"))
    bdi = page.evaluate("document.querySelector('main > p bdi').textContent")
    assert bdi == author
    assert page.evaluate("getComputedStyle(document.querySelector('main > p bdi')).unicodeBidi") == "isolate"


def test_an_inline_script_would_not_run_either(server: RealServer, page: Browser) -> None:
    """The policy stops what escaping would have let through."""
    page.go(url(server, "/viewer/"))
    page.complaints.clear()
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.stolen = 6'}))"
    )
    page.evaluate("fetch('http://127.0.0.1:9/').catch(() => 0)")
    assert page.evaluate("window.stolen === undefined")
    assert [text for text in page.complaints if "Content Security Policy" in text] != []


def test_a_running_job_is_followed_without_reloading(server: RealServer, page: Browser) -> None:
    thread = server("POST", "/v1/threads", {"title": "Rotated", "author": "alice"}).json["id"]
    for number in range(12):
        server("POST", "/v1/messages", {"thread": thread, "author": "alice", "body": number})
    begun = server("POST", "/admin/rotate_thread_dek", {"thread_id": thread, "records_per_second": 4}, key=ADMIN)
    assert begun.status == 202
    page.go(url(server, "/viewer/jobs"))
    page.evaluate("window.kept = true")
    page.until("document.querySelector('#part [data-label=State]').textContent.trim() === 'done'")
    assert page.evaluate("window.kept")
    assert page.evaluate("document.querySelector('#part progress').value") == 100
    assert page.until("document.querySelector('#part [role=status]').textContent.startsWith('None of these jobs')")
    page.go(url(server, f"/viewer/threads/{thread}"))
    assert begun.json["new_key"] in page.evaluate("document.querySelector('article footer').textContent")


def test_what_is_wrong_leads_to_its_page_in_one_click(server: RealServer, page: Browser) -> None:
    """A job is paused. The overview says so, with the command; the page of the job has state, records and keys. The
    overview also says where time goes, and leads to the keys; a thread leads to who read it.
    """
    thread = server("POST", "/v1/threads", {"title": "Paused", "author": "alice"}).json["id"]
    for number in range(12):
        server("POST", "/v1/messages", {"thread": thread, "author": "alice", "body": number})
    asked = {"thread_id": thread, "records_per_second": 1}
    job = server("POST", "/admin/rotate_thread_dek", asked, key=ADMIN).json["job_id"]
    assert server("POST", f"/admin/jobs/{job}/pause", key=ADMIN).status == 200
    page.go(url(server, "/viewer/"))
    assert page.evaluate("document.querySelector('#part [role=status]').textContent").endswith("need attention.")
    shown = page.evaluate("document.querySelector('#part').textContent")
    assert f"progressdb jobs resume {job}" in shown
    assert all(f"{where} " in shown for where in ("server", "key service", "disk"))
    assert page.evaluate("document.querySelector('nav a[href=\"/viewer/keys\"]') !== null")
    page.follow(f"document.querySelector('#part a[href=\"/viewer/jobs/{job}\"]').click()")
    shown = page.evaluate("document.querySelector('main').textContent")
    assert "paused, since" in shown and "0 failed" in shown and f"progressdb jobs resume {job}" in shown
    page.go(url(server, f"/viewer/threads/{thread}"))
    assert "verb=reads" in page.evaluate("[...document.links].find(a => a.textContent.startsWith('Who read')).href")
    assert server("POST", f"/admin/jobs/{job}/cancel", key=ADMIN).status == 200


def test_a_page_says_that_the_server_is_away_or_the_session_has_ended(server: RealServer) -> None:
    with Browser() as browser:
        browser.go(url(server, "/viewer/"))
        browser.evaluate(f"document.getElementById('key').value = {ADMIN!r}")
        browser.follow("document.forms[0].submit()")
        browser.go(url(server, "/viewer/jobs"))
        assert browser.evaluate("getComputedStyle(document.getElementById('stale')).visibility") == "hidden"
        browser.call("Network.enable")
        offline = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        browser.call("Network.emulateNetworkConditions", offline=True, **offline)
        browser.until("document.getElementById('stale').textContent.startsWith('The server does not answer')")
        browser.call("Network.emulateNetworkConditions", offline=False, **offline)
        browser.until("document.getElementById('stale').textContent === ''")
        browser.evaluate(
            "fetch('/viewer/logout', {method: 'POST', redirect: 'manual', "
            "body: new URLSearchParams({csrf: document.querySelector('[name=csrf]').value})})"
        )
        browser.until("document.getElementById('stale').textContent.startsWith('The session has ended')")


@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (390, "dark"), (1100, "light")])
def test_every_page_fits_and_can_be_read(server: RealServer, page: Browser, width: int, scheme: str) -> None:
    """Colours depend on the scheme alone, places on the width alone."""
    thread = hostile_thread(server)
    page.size(width, 800)
    page.scheme(scheme)
    for place in (one.format(thread=thread) for one in PAGES):
        page.go(url(server, place))
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (place, width)
        assert page.evaluate(BROKEN) == [], (place, width)
        assert "`" not in page.evaluate("document.body.innerText"), place
        assert page.evaluate(CONTRAST) >= 4.5, (place, scheme)
        assert page.evaluate(UNLABELLED) == [], place
        assert page.evaluate("document.querySelectorAll('h1').length") == 1
        assert page.evaluate("document.documentElement.lang") == "en"


def test_axe_finds_no_violation_on_any_page(server: RealServer, page: Browser) -> None:
    """axe-core has the rules of WCAG 2.1, A and AA, and of good practice."""
    package = needs.library("axe_core_python").__name__
    script = resources.files(package).joinpath("axe.min.js").read_text("utf-8")
    thread = hostile_thread(server)
    for place in (*(one.format(thread=thread) for one in PAGES), "/viewer/nothing", "/viewer/login"):
        page.go(url(server, place))
        page.evaluate(f"{script}; 0")
        page.evaluate("axe.run().then(found => window.violations = found.violations.map(one => one.id))")
        page.until("window.violations !== undefined")
        assert page.evaluate("window.violations") == [], place


def test_the_documentation_loads_nothing_from_elsewhere(server: RealServer, page: Browser) -> None:
    page.requested.clear()
    page.complaints.clear()
    page.go(url(server, "/docs/"))
    assert page.evaluate("document.querySelectorAll('details').length") > 40
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert "missing signature headers" in page.evaluate("document.body.textContent")
    assert {one for one in page.requested if not one.startswith(url(server, "/docs/"))} == set()
    assert page.complaints == []


CONTRAST = """
(() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[0-9.]+/g).map(Number).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (!colour.endsWith(", 0)")) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  let worst = 21;
  for (const element of document.querySelectorAll("body *:not(.skip)")) {
    if (![...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
    if (!element.getClientRects().length) continue;
    const pair = [light(getComputedStyle(element).color), light(ground(element))].sort((a, b) => b - a);
    worst = Math.min(worst, (pair[0] + 0.05) / (pair[1] + 0.05));
  }
  return worst;
})()
"""
"""The least contrast of a text with what is behind it (WCAG 2.2, success criterion 1.4.3 asks for 4.5)."""
BROKEN = r"""
(() => {
  const found = [];
  for (const cell of document.querySelectorAll("th, td")) {
    const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
      for (const word of texts.currentNode.data.matchAll(/\b[A-Za-z_]\w{0,23}\b/g)) {
        const range = new Range();
        range.setStart(texts.currentNode, word.index);
        range.setEnd(texts.currentNode, word.index + word[0].length);
        if (new Set([...range.getClientRects()].map((one) => one.top)).size > 1) found.push(word[0]);
      }
    }
  }
  return found;
})()
"""
"""Words of table cells that stand on two lines."""
UNLABELLED = """
[...document.querySelectorAll("input:not([type=hidden]), button, a, progress, th:not([scope])")]
  .filter((one) => !(one.labels && one.labels.length) && !one.textContent.trim() && !one.ariaLabel)
  .map((one) => one.outerHTML)
"""
"""Controls that a screen reader has no name for."""
