"""Tests of `minikms_daemon/audit`."""
