"""Tests of `minikms/audit`."""
