"""What the process that holds the keys has loaded: `python -m tests.minikms_daemon.loaded_modules` rewrites the list.

Owns: the configurations, the walk of each through what a daemon does, the count of code lines, and the form of the
list. Invariant: the process is the command that a user types, in an interpreter of its own.
"""

import ast
import io
import os
import re
import signal
import tempfile
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from minikms import api
from minikms.processes import handover
from minikms.processes.flags import DAEMON
from tests.harness import verb_requests
from tests.harness.live_daemon import LiveDaemon
from tests.harness.scripts import PROJECT
from tests.harness.unlocking import UnlockListener
from tests.harness.waiting import wait_until
from tests.minikms_daemon.replica.hosts import Hosts
from tests.minikms_daemon.service.asking import ask, encrypted, new_key, post

LIST: Final = PROJECT / "docs" / "loaded.toml"
PATH_OF_REPORT: Final = PROJECT / "tests" / "harness" / "loaded"
ROLES: Final = '["create", "encrypt", "decrypt", "monitor", "rotate", "destroy", "unseal", "ship", "replicate"]'
POLICY: Final = f"""version = 1
[[grant]]
principals = ["uid:{os.geteuid()}"]
roles = {ROLES}
threads = ["*"]
"""
BESIDE: Final = {"plain": "", "policy": "plain", "member": "policy", "unlock": "plain", "auditor": "policy"}
"""Each configuration, and the one whose modules its section leaves out."""
WHY: Final = {
    "cryptography": "AES-GCM, CMAC, Ed25519, HPKE: no primitive is ours",
    "_cffi_backend": "loaded by cryptography",
    "msgspec": "decodes JSON and MessagePack into typed structs",
    "uvloop": "the event loop",
    "httptools": "the HTTP parser of Node.js",
    "pybase64": "base64 at twice the speed",
    "zstandard": "compresses closed files of the audit log",
}
_GENERIC: Final = re.compile(r"(\.so[.\d]*|-[0-9a-f]{6,}|\.(cpython|abi3)[-\w]*|[-.]\d[.\d]*)")


class Loaded(NamedTuple):
    """`modules`: files by name. `late`: what was imported after the hardening. `tried`: the errors of showing an error,
    of an import and of reading a Python module then. `hardening`: as the status has it.
    """

    modules: dict[str, Path]
    libraries: set[str]
    late: list[str]
    tried: dict[str, str]
    hardening: dict[str, bool]
    rss_kib: int

    @property
    def own(self) -> dict[str, int]:
        """Code lines of our modules."""
        source = PROJECT / "src"
        return {name: code_lines(path) for name, path in self.modules.items() if path.is_relative_to(source)}

    @property
    def foreign(self) -> Counter[str]:
        """Code lines of each other package that is not the standard library's."""
        lines: Counter[str] = Counter()
        for name, path in self.modules.items():
            if "site-packages" in path.parts or "dist-packages" in path.parts:
                lines[name.partition(".")[0]] += code_lines(path)
        return lines


def code_lines(path: Path) -> int:
    """Lines with code: no blank lines, comments, texts that stand alone, or imports."""
    if path.suffix != ".py":
        return 0
    text = path.read_text("utf-8")
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and type(node.value.value) is str
        if isinstance(node, ast.Import | ast.ImportFrom) or (isinstance(node, ast.Expr) and is_text):
            left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines: set[int] = set()
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in blank:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - left_out)


# --- the configurations -----------------------------------------------------------------------------------------


@contextmanager
def _daemon(base: Path, configuration: str) -> Iterator[LiveDaemon]:
    run = base / "run"  # of the socket, where the daemon may write
    run.mkdir()
    flags: list[str] = []
    if configuration in ("policy", "auditor"):
        policy = base / "policy" / "policy.toml"
        policy.parent.mkdir()
        policy.write_text(POLICY)
        flags += ["--policy", str(policy)]
    if configuration == "auditor":
        log_dir = base / "audit"
        log_dir.mkdir()
        log_dir.chmod(0o2750)
        flags += ["--audit-dir", str(log_dir)]
    with ExitStack() as undo:
        if configuration == "member":
            hosts = Hosts(base, undo, launcher=(), forked=False)
            undo.enter_context(hosts.replicator_a)
            wait_until(lambda: hosts.replicator_a.kms.replica_status().mode == "serving")
            yield hosts.a
            return
        daemon = undo.enter_context(LiveDaemon(base, "file", *flags, socket=run / "s", forked=False))
        if configuration == "unlock":
            key = handover.KEY + daemon.root()
            listener = undo.enter_context(UnlockListener(base / "unlock.sock", key))
            daemon.stop()
            place = daemon.command.index("--master-key-file")
            unlock = ["--root", f"unlock:{listener.path}", "--unlock-uids", str(os.geteuid()), "--root-lease", "60"]
            daemon.command[place : place + 2] = unlock
            daemon.start()
        yield daemon


def _walk(daemon: LiveDaemon) -> None:
    """Every verb, and what else a daemon does until its end; also requests that are refused."""
    wait_until(lambda: ask(daemon, "GET", "/ready").status == 200)
    key_id = new_key(daemon)
    encrypted(daemon, key_id)
    for verb in sorted(api.VERBS, key=lambda verb: verb.name):
        if verb not in (api.SEAL, api.UNSEAL):
            members = msgspec.to_builtins(verb_requests.example(verb, key_id))
            members.pop(verb.path_field, None)
            target = verb.path.format(key_id=key_id, slot_id="s1", member_id="m2", version=1)
            answer = ask(daemon, verb.method, target, members if verb.method == "POST" else None)
            assert answer.code != api.CODE_INTERNAL, (verb.name, answer)
    for body in (b"", b"{", b'{"thread_id": "\xff"}', b"[" * 100_000, {"thread_id": "t", "x": 1}):
        assert post(daemon, "/create_dek_for_thread", body).status == 400
    assert ask(daemon, "GET", "/nothing").status == 404
    assert post(daemon, "/rotate_kek", {}).status in (200, 202)
    wait_until(lambda: ask(daemon, "GET", "/keks").body.get("rotation") is None)
    os.kill(daemon.pid, signal.SIGHUP)
    assert post(daemon, "/seal", {}).status == 200
    assert ask(daemon, "GET", "/keks").code == api.CODE_SEALED
    assert post(daemon, "/unseal", {"root_hex": os.urandom(32).hex()}).status == 403
    assert post(daemon, "/unseal", {"root_hex": daemon.root().hex()}).status == 200
    wait_until(lambda: ask(daemon, "GET", "/ready").status == 200)  # a member takes over again
    encrypted(daemon, new_key(daemon))


def loaded(configuration: str) -> Loaded:
    with tempfile.TemporaryDirectory(prefix="minikms-loaded-") as name:
        base = Path(name)
        file = base / "loaded"
        environ = dict(os.environ)
        os.environ.update(PYTHONPATH=f"{PATH_OF_REPORT}{os.pathsep}{PROJECT / 'src'}", LOADED_FILE=str(file))
        try:
            with _daemon(base, configuration) as daemon:
                _walk(daemon)
                hardening = ask(daemon, "GET", "/status").body["hardening"]
                rss = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{daemon.pid}/status").read_text())
                daemon.stop()
                report: dict[str, Any] = ast.literal_eval(file.read_text())
        finally:
            os.environ.clear()
            os.environ.update(environ)
    # The loader and Python's own libraries are left out: each build of Python divides itself otherwise.
    paths = {line.split(None, 5)[5] for line in report["libraries"].splitlines() if ".so" in line}
    names = {os.path.basename(path) for path in paths if "/lib-dynload/" not in path}
    report["modules"][f"{DAEMON}.__main__"] = report["modules"].pop("__main__")
    return Loaded(
        {name: Path(path) for name, path in report["modules"].items() if path},
        {_GENERIC.sub("", name) for name in names if not name.startswith(("ld-", "libpython"))},
        report["late"],
        report["tried"],
        {measure["measure"]: measure["in_force"] for measure in hardening},
        int(rss[1]) if rss else 0,
    )


# --- the list ---------------------------------------------------------------------------------------------------


def read_list() -> dict[str, Any]:
    return tomllib.loads(LIST.read_text("utf-8"))


def expected_modules(configuration: str, listed: dict[str, Any]) -> dict[str, int]:
    """Code lines of the modules of a configuration, with those that its section leaves out."""
    beside = BESIDE[configuration]
    others = expected_modules(beside, listed) if beside else {}
    return {**others, **listed["modules"][configuration]}


def written(each: dict[str, Loaded]) -> str:
    """The list, in the order in which a reviewer reads it: the rooms as docs/architecture.md has them."""
    page = (PROJECT / "docs" / "architecture.md").read_text("utf-8")
    rooms: list[str] = []
    for program in ("minikms_daemon", "minikms"):
        table = page.partition(f"`src/{program}`\n")[2].partition("\n###")[0]
        names = re.findall(r"^\| `([\w/.]+)` \|", table, re.MULTILINE)
        rooms += [f"{program}.{name.strip('/').removesuffix('.py').replace('/', '.')}" for name in names]

    def place(name: str) -> tuple[int, str]:
        match = [rooms.index(room) for room in rooms if f"{name}.".startswith(f"{room}.")]
        return match[-1] if match else -1 if name.startswith("minikms_daemon") else len(rooms), name

    text = "# Written by `python -m tests.minikms_daemon.loaded_modules`: see reviewing.md.\n"
    for configuration, beside in BESIDE.items():
        others = each[beside].own if beside else {}
        own = {name: lines for name, lines in each[configuration].own.items() if name not in others}
        about = f", beside those of {beside}" if beside else ""
        text += f"\n[modules.{configuration}]  # {len(own)} with {sum(own.values())} code lines{about}\n"
        text += "".join(f'"{name}" = {own[name]}\n' for name in sorted(own, key=place))
    foreign: dict[str, int] = {}
    for loaded in each.values():
        foreign |= loaded.foreign
    text += f"\n[foreign]  # {sum(foreign.values())} code lines; the rest of each is compiled\n"
    for package, lines in sorted(foreign.items()):
        version = metadata.version("cffi" if package == "_cffi_backend" else package)
        text += f'{package} = {{ version = "{version}", lines = {lines}, why = "{WHY[package]}" }}\n'
    libraries = sorted(set().union(*(loaded.libraries for loaded in each.values())))
    lines_of_names = "".join(f'  "{library}",\n' for library in libraries)
    return f"{text}\n[shared_libraries]  # without versions\nnames = [\n{lines_of_names}]\n"


def main() -> None:
    each: dict[str, Loaded] = {configuration: loaded(configuration) for configuration in BESIDE}
    LIST.write_text(written(each), "utf-8")
    for configuration, found in each.items():
        own, foreign = sum(found.own.values()), sum(found.foreign.values())
        print(f"{configuration}: {own} own, {foreign} foreign, {found.rss_kib} KiB")


if __name__ == "__main__":
    main()
