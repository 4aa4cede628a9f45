"""Tests of `minikms_daemon/server`."""
