"""Tests of `minikms`."""
