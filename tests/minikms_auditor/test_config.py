"""The configuration of the auditor: what is refused, and the sentence that says why."""

from pathlib import Path

import pytest

from minikms.api.errors import StartError
from minikms.memory import SecretArena
from minikms_auditor.config import AuditorFiles, parse_config
from minikms_auditor.process import ARENA_SLOTS
from minikms_auditor.signers import open_signers

GOOD = """
version = 1
origin = "kms.example/audit"
kms_socket = "s"
log_dir = "log"
state_dir = "state"
signers = ["file:auditor.key"]
"""
KEY = "w.example+e533421d+BAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f"


def witness(url: str, more: str = "", key: str = KEY) -> str:
    return f'{GOOD}quorum = 1\n[[witness]]\nurl = "{url}"\nkey = "{key}"\n{more}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD.replace("version = 1", "version = 2"), "version"),
        (GOOD.replace("version = 1", "version = " + "1" * 5_000), "is not TOML"),
        (GOOD + "colour = 1", "colour"),
        (GOOD + "a" + ".a" * 300 + " = 1", "dots"),
        (GOOD.replace("kms.example/audit", "a+b"), "origin is"),
        (GOOD + 'metrics = "127.0.0.1"', "no address and port"),
        (GOOD + 'metrics = "0.0.0.0:9104"', "an address of this host"),
        (GOOD + "kms_server_uids = []", "must name a user"),
        (GOOD + "kms_server_uids = [-1]", "kms_server_uids"),
        (GOOD.replace('"log"', '"l\\u0000g"'), "NUL"),
        (GOOD.replace('"file:auditor.key"', ""), "signers has"),
        (GOOD.replace('"file:auditor.key"', '"file:a", "file:b", "file:c"'), "signers has"),
        (GOOD.replace("file:auditor.key", "auditor.key"), "a signer is"),
        (GOOD + f"token_paths = {['/t'] * 17}", "token_paths"),
        (GOOD + 'public_keys = ["AAAA"]', "44 characters"),
        (GOOD + "resubmit_seconds = 0", "resubmit_seconds is"),
        (GOOD + "quorum = 1", "quorum is"),
        (GOOD + "[questions]", "users"),
        (GOOD + "[questions]\nusers = []", "must name a user"),
        (GOOD + "[questions]\nusers = [-1]", "users"),
        (witness("https://w.example", key=KEY.replace("AAB", "AAC")), "verifier key"),
        (witness("https://w.example", f'[[witness]]\nurl = "https://v.example"\nkey = "{KEY}"'), "the same key"),
        (witness("http://w.example", 'ca = "ca.pem"'), "has no TLS"),
        *((witness(url), "no URL") for url in ("w.example", "ftp://w.example", "http://", "http://[w", "http://w:x")),
        *((witness(url), "no URL") for url in ("http://u@w", "http://w?q", "http://w#f", "http://w:0", "http://w/ü")),
    ],
)
def test_a_configuration_that_is_not_valid_is_refused(text: str, said: str) -> None:
    with pytest.raises(StartError, match=f"^auditor.toml.*{said}"):
        parse_config(text.encode(), "auditor.toml")


def sink(*members: str) -> str:
    return GOOD + '[[sink]]\nname = "siem"\n' + "\n".join(members)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (sink('type = "carrier-pigeon"'), "type"),
        (sink('type = "http"'), "url"),
        (sink('type = "splunk"', 'url = "https://s"'), "token"),
        (sink('type = "file"', 'path = "f"', 'token = "t"'), "token"),
        (sink('type = "file"', 'path = "f"', 'format = "cef"'), "format"),
        (sink('type = "file"', 'path = "f"').replace("siem", "../siem"), "a name is"),
        (sink('type = "file"', 'path = "f"') + '\n[[sink]]\nname = "siem"\ntype = "file"\npath = "g"', "same name"),
        (sink('type = "file"', 'path = "f"') + '\n[[sink]]\nname = "s"\ntype = "file"\npath = "f"', "same file"),
        *((sink('type = "syslog"', f'url = "{url}"'), "no URL") for url in ("https://s:1", "tls://", "tls://s:1/p")),
        (sink('type = "syslog"', 'url = "tls://s"'), "must name a port"),
        (sink('type = "syslog"', 'url = "tcp://s:1"', 'ca = "c"'), "has no TLS"),
        (sink('type = "syslog"', 'url = "tcp://s:1"', "required = true"), "of the type http, splunk or file"),
        (sink('type = "syslog"', 'url = "tls://s:1"', 'cert = "c"'), "belong together"),
        *((sink('type = "http"', f'url = "{url}"'), "no URL") for url in ("ftp://s", "https://u@s", "https://s/#f")),
        (sink('type = "http"', 'url = "http://s.example"'), "on this host"),
        (sink('type = "splunk"', 'url = "https://s/path"', 'token = "t"'), "no URL"),
    ],
)
def test_a_sink_that_is_not_valid_is_refused(text: str, said: str) -> None:
    with pytest.raises(StartError, match=f"^auditor.toml.*{said}"):
        parse_config(text.encode(), "auditor.toml")


@pytest.mark.parametrize(
    "path", ["state/state.json", "state", "log/minikms-audit.log", "other/../state/x", "link/status.json"]
)
def test_a_file_of_a_sink_among_the_auditors_own_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "link").symlink_to("state")
    (tmp_path / "auditor.toml").write_text(sink('type = "file"', f'path = "{path}"'))
    with pytest.raises(StartError, match="the file of the sink 'siem' lies in"):
        AuditorFiles(tmp_path / "auditor.toml").config()
    (tmp_path / "auditor.toml").write_text(sink('type = "file"', 'path = "statement"'))
    AuditorFiles(tmp_path / "auditor.toml").config()


def test_a_configuration_with_each_member_is_valid() -> None:
    every = witness("https://w.example/w1", 'ca = "ca.pem"').replace("quorum", 'metrics = "[::1]:9104"\nquorum')
    assert parse_config(every.encode(), "auditor.toml").metrics == "[::1]:9104"


def test_questions_have_the_numbers_of_users_and_a_path_for_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "auditor.toml"
    path.write_text(GOOD + '[questions]\nusers = ["root", 7, "root"]\nsocket = "q"')
    questions = AuditorFiles(path).config().questions
    assert questions is not None and (questions.uids, questions.socket) == (frozenset({0, 7}), str(tmp_path / "q"))
    for wrong, said in (('users = ["no.such.user"]', "no user"), (f'users = [1]\nsocket = "{"s" * 200}"', "socket")):
        path.write_text(f"{GOOD}[questions]\n{wrong}")
        with pytest.raises(StartError, match=said):
            AuditorFiles(path).config()


def test_two_signers_with_the_same_key_are_refused(tmp_path: Path) -> None:
    key = tmp_path / "auditor.key"
    key.write_text("5a" * 32)
    key.chmod(0o600)
    files = AuditorFiles(tmp_path / "auditor.toml")
    with SecretArena(ARENA_SLOTS) as arena, pytest.raises(StartError, match="two signers have the same key"):
        open_signers("kms.example/audit", ["file:auditor.key"] * 2, files, arena)
