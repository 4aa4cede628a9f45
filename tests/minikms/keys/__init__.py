"""Tests of `minikms/keys`."""
