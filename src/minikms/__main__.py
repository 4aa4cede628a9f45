"""`python -m minikms`: the command."""

from minikms.cli import main

if __name__ == "__main__":
    main()
