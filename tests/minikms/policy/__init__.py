"""Principals, policy files and limits."""
