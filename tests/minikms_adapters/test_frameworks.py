"""Each framework is there, or the report of the run says which command installs it."""

import pytest

from tests import needs
from tests.minikms_adapters.conftest import NEEDS


@pytest.mark.parametrize("name", sorted({name for needed in NEEDS.values() for name in needed}))
def test_a_framework_can_be_imported(name: str) -> None:
    assert needs.library(name).__name__ == name
