"""Lines as OCSF events: each is valid by the published schema, and holds its line."""

import json
from pathlib import Path
from typing import Any

import pytest

from minikms.api.verbs import VERBS
from minikms.audit import ocsf, record
from minikms.audit.record import Event
from tests import needs
from tests.minikms.audit.logmaker import open_log

TYPES = (*sorted(verb.name for verb in VERBS), record.TYPE_REFUSED)
LOG_ID = "5a" * 16


def encoded(directory: Path, *events: Event) -> list[tuple[bytes, dict[str, Any]]]:
    """Each line of a log with these events, and its OCSF event."""
    log = open_log(directory)
    for event in events:
        log.add(event)
    log.close()
    lines = (directory / "minikms-audit.log").read_bytes().split(b"\n")[:-1]
    return [(line, json.loads(ocsf.encode(LOG_ID, record.parse_line(line)[0], line))) for line in lines]


def test_every_type_of_line_is_valid_by_the_published_schema(tmp_path: Path) -> None:
    schemas = needs.library("ocsf_json_schema")
    validation = needs.library("jsonschema")
    schema = schemas.OcsfJsonSchemaEmbedded(schemas.get_ocsf_schema(version=ocsf.VERSION)).get_class_schema(
        "api_activity"
    )
    validator = validation.Draft202012Validator(schema)
    full: dict[str, Any] = {
        "pid": 7, "key_id": "k_1", "key_ids": ["k_1", "k_2"], "thread_id": "t", "count": 3, "request_id": "r",
        "request_ids": ["a", "b"], "detail": "text", "facts": {"via": "uid:5", "n": 2**63 - 1},
    }  # fmt: skip
    events = [Event(type=each, actor="peer_uid:1000") for each in TYPES]
    events += [Event(type=each, actor="spiffe://a/b", outcome="forbidden", **full) for each in TYPES]
    found = encoded(tmp_path, *events)
    assert len(found) > len(events)
    for _, event in found:
        assert [error.message for error in validator.iter_errors(event)] == []


def test_every_verb_has_an_activity() -> None:
    assert ocsf.ACTIVITIES.keys() == {verb.name for verb in VERBS}


def test_an_event_says_who_did_what_to_which_key(tmp_path: Path) -> None:
    line, event = encoded(
        tmp_path,
        Event(
            type="destroy_key", actor="peer_uid:1000", pid=7, key_id="k_1", thread_id="t", outcome="forbidden",
            request_id="r1", facts={"via": "uid:5"},
        ),
    )[1]  # fmt: skip
    assert (event["activity_name"], event["status_id"], event["status_code"]) == ("Delete", 2, "forbidden")
    assert event["actor"] == {"user": {"name": "peer_uid:1000", "uid": "1000"}, "process": {"pid": 7}}
    assert event["src_endpoint"] == {"name": "uid:5"}
    assert event["resources"] == [{"type": "key", "uid": "k_1"}, {"type": "thread", "uid": "t"}]
    assert event["api"]["request"] == {"uid": "r1"} and event["api"]["response"] == {"error": "forbidden"}
    assert (event["metadata"]["sequence"], event["metadata"]["uid"]) == (2, f"{LOG_ID}:2")
    assert event["raw_data"].encode() == line and event["unmapped"]["log_id"] == LOG_ID


def test_no_text_of_a_line_can_forge_an_attribute(tmp_path: Path) -> None:
    every = "".join(map(chr, range(0x100)))
    event = Event(type=every, actor=every, key_id=every, detail='","class_uid":1,"x":"', facts={every: every})
    line, found = encoded(tmp_path, event)[1]
    assert found["class_uid"] == 6003 and found["raw_data"].encode() == line
    assert b"\n" not in ocsf.encode(LOG_ID, record.parse_line(line)[0], line)


@pytest.mark.parametrize("text", ["%" * 85, '"' * 85])
def test_an_event_is_never_longer_than_its_bound(text: str) -> None:
    """With the longest line that there can be, of quotation marks as far as a line may have them."""
    event = Event(seq=1, ts=1, type="encrypt_batch", actor="a", key_ids=[record.escape(text)] * 1024, detail="d")
    line = record.encode_line(record.encode_event(event), bytes(32))[:-1]
    head = len(ocsf.encode(LOG_ID, event, line))
    assert head < ocsf.EVENT_BYTES_MAX * len(line) // record.LINE_BYTES_MAX + 4096
