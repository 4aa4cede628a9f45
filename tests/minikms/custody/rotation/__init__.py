"""Tests of `minikms_daemon/rotation`."""
