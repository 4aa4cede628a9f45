"""Tests of `minikms/service`."""
