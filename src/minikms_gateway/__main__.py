"""`python -m minikms_gateway`."""

from minikms_gateway.command import main

if __name__ == "__main__":
    main()
