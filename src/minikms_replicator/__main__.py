"""`python -m minikms_replicator`."""

from minikms_replicator.command import main

if __name__ == "__main__":
    main()
