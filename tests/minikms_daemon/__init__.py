"""Tests of `minikms_daemon`."""
