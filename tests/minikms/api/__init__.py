"""Tests of `minikms/api`."""
