"""Tests of minikms-unlock."""
