"""Tests of `minikms_daemon/replica`."""
