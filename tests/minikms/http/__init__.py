"""Tests of `minikms/http`."""
