"""Tests of `minikms_daemon/service`."""
