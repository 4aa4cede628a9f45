"""Tests of `minikms/custody/rotation`."""
