"""Tests of `minikms-auditor`."""
