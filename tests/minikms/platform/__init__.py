"""Tests of `minikms/platform`."""
