"""Tests of `minikms/roots`."""
