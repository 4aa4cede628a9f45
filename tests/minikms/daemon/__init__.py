"""Tests of `minikms/daemon`."""
