"""`python -m minikms_unlock` is the command `minikms-unlock`."""

from minikms_unlock.command import main

if __name__ == "__main__":
    main()
