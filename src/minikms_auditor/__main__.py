"""`python -m minikms_auditor`."""

from minikms_auditor.command import main

if __name__ == "__main__":
    main()
