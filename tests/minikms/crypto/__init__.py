"""Tests of `minikms/crypto`."""
