"""Tests of the `minikms` command."""
