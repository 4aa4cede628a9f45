"""What a release is made from."""

import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
PINNED = re.compile(r"^([\w.-]+)==([\w.]+)", re.MULTILINE)


def pinned(place: str) -> dict[str, str]:
    text = (PROJECT / place).read_text("utf-8")
    return {name.lower().replace("_", "-").replace(".", "-"): version for name, version in PINNED.findall(text)}


def test_a_release_has_the_versions_that_the_tests_run_with() -> None:
    released, tested = pinned("tools/release/requirements.txt"), pinned("tools/bootstrap/constraints.txt")
    assert len(released) > 20
    assert released.items() <= tested.items()


@pytest.mark.parametrize("lock", ["release/requirements.txt", "release/build.txt", "site/requirements.txt"])
def test_every_library_of_a_release_is_pinned_with_its_hash(lock: str) -> None:
    text = (PROJECT / "tools" / lock).read_text("utf-8").replace("\\\n", " ")
    assert all("--hash=sha256:" in line for line in text.splitlines())
    assert "://" not in text
