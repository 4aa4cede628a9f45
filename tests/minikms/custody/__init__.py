"""Tests of `minikms/custody`."""
