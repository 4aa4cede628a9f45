"""The transit API: what clients of Vault send, and what they are answered."""
