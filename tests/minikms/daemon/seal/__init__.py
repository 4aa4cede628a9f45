"""Tests of `minikms/daemon/seal`."""
