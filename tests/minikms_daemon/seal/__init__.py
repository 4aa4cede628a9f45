"""Tests of `minikms_daemon/seal`."""
