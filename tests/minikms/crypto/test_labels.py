"""Associated data: different lists of fields have different encodings, and no label is a prefix of another."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from minikms.audit import record as audit_record
from minikms.crypto import labels

LABELS = [value for name, value in vars(labels).items() if name.isupper() and isinstance(value, bytes)]
FIELDS = st.lists(st.binary(max_size=40), max_size=6)


def test_every_label_ends_in_its_only_nul() -> None:
    assert len(LABELS) >= 10
    for label in LABELS:
        assert label.endswith(b"\0")
        assert b"\0" not in label[:-1]
        assert label.startswith(b"minikms/")


def test_no_label_is_a_prefix_of_another_so_no_two_uses_share_data() -> None:
    used = [*LABELS, audit_record.THREAD_LABEL]
    for one, other in itertools.permutations(used, 2):
        assert not other.startswith(one)


@given(st.sampled_from(LABELS), FIELDS, st.sampled_from(LABELS), FIELDS)
def test_two_lists_of_fields_never_have_the_same_encoding(
    one: bytes, fields: list[bytes], other: bytes, others: list[bytes]
) -> None:
    same = labels.aad(one, *fields) == labels.aad(other, *others)
    assert same == (one == other and fields == others)


@given(FIELDS.filter(bool), st.data())
def test_moving_bytes_from_one_field_to_the_next_changes_the_encoding(fields: list[bytes], data: st.DataObject) -> None:
    """Without lengths, the same concatenation with other boundaries would have the same encoding."""
    joined = b"".join(fields)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(joined)), min_size=len(fields) - 1, max_size=len(fields) - 1)))
    recut = [joined[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(joined)])]
    assert (labels.aad(labels.DEK, *fields) == labels.aad(labels.DEK, *recut)) == (fields == recut)


@given(st.binary(max_size=300))
def test_a_field_is_its_length_in_four_bytes_then_its_value(value: bytes) -> None:
    assert labels.aad(b"l\0", value) == b"l\0" + len(value).to_bytes(4, "big") + value


@given(st.integers(0, 2**64 - 1))
def test_a_number_is_eight_bytes_and_keeps_its_order(value: int) -> None:
    assert int.from_bytes(labels.number(value), "big") == value
    assert len(labels.number(value)) == 8


IDS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)


@given(IDS, IDS, IDS, IDS, st.binary(max_size=30), st.binary(max_size=30))
def test_a_record_is_bound_to_its_key_its_thread_and_the_callers_aad(
    key: str, thread: str, other_key: str, other_thread: str, aad: bytes, other_aad: bytes
) -> None:
    one = labels.record_aad(labels.record_aad_prefix(key_id=key, thread_id=thread), aad)
    other = labels.record_aad(labels.record_aad_prefix(key_id=other_key, thread_id=other_thread), other_aad)
    assert (one == other) == ((key, thread, aad) == (other_key, other_thread, other_aad))


Properties = tuple[str, str, str, str, int, int]
PROPERTIES: st.SearchStrategy[Properties] = st.tuples(IDS, IDS, IDS, IDS, st.integers(1, 2**32), st.integers(0, 2**31))


@given(PROPERTIES, PROPERTIES)
def test_a_wrapped_key_is_bound_to_all_six_of_its_properties(one: Properties, other: Properties) -> None:
    def encoded(of: Properties) -> bytes:
        return labels.dek_aad(
            key_id=of[0], thread_id=of[1], purpose=of[2], algorithm=of[3], kek_version=of[4], in_thread=of[5]
        )

    assert (encoded(one) == encoded(other)) == (one == other)
