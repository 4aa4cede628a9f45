"""What tests of several rooms share: as those of `minikms`."""

from tests.minikms.conftest import daemon, directory

__all__ = ["daemon", "directory"]
