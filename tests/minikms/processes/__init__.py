"""Tests of `minikms/processes`."""
