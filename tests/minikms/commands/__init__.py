"""Tests of `minikms/commands`."""
