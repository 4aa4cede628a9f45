"""Tests of `minikms/daemon/replica`."""
