"""The process that holds the keys has loaded what docs/loaded.toml lists, in each configuration, and nothing later."""

import sys
from importlib import metadata

import pytest

from tests.minikms_daemon.loaded_modules import BESIDE, expected_modules, loaded, read_list

REWRITE = "run `python -m tests.minikms_daemon.loaded_modules`, and read the difference"
LINES_MAX = {"plain": 16_700, "policy": 17_900, "member": 19_250, "unlock": 17_000, "auditor": 18_050}
"""Code lines of ours. A feature that nothing configures costs a reviewer none."""
ALL_LINES_MAX = 19_500
"""Code lines of ours with every configuration at once."""
FOREIGN_LINES_MAX = 4_500
LINES_STALE_MAX = 0.05
"""A change of a few lines needs no new list."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads procfs")
@pytest.mark.parametrize("configuration", BESIDE)
def test_the_process_has_loaded_what_the_list_has(configuration: str) -> None:
    """Own modules are the same everywhere. Foreign packages may have other versions, and fewer shared libraries are
    loaded where a distribution compiles some of them into the interpreter."""
    process, listed = loaded(configuration), read_list()
    expected = expected_modules(configuration, listed)
    own = process.own
    assert own.keys() == expected.keys(), REWRITE
    assert abs(sum(own.values()) - sum(expected.values())) <= sum(own.values()) * LINES_STALE_MAX, REWRITE
    assert sum(own.values()) <= LINES_MAX[configuration]
    assert process.foreign.keys() <= listed["foreign"].keys(), REWRITE
    for package, lines in process.foreign.items():
        about = listed["foreign"][package]
        if about["lines"] and metadata.version(package) == about["version"]:
            assert lines <= about["lines"], REWRITE
    assert sum(process.foreign.values()) <= FOREIGN_LINES_MAX
    assert process.libraries - set(listed["shared_libraries"]["names"]) == set(), REWRITE
    assert process.late == []
    denied = "PermissionError" if process.hardening["filesystem_restricted"] else ""
    assert process.tried == {"show": "", "import": "ImportError", "read": denied}


def test_a_process_with_every_configuration_has_few_enough_lines() -> None:
    listed = read_list()
    modules: dict[str, int] = {}
    for configuration in BESIDE:
        modules |= expected_modules(configuration, listed)
    assert sum(modules.values()) <= ALL_LINES_MAX
