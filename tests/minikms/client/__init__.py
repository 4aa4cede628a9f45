"""Tests of `minikms/client`."""
