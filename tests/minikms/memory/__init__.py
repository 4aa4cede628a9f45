"""Tests of `minikms/memory`."""
