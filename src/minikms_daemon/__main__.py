"""`python -P -m minikms_daemon DESCRIPTOR WORDS…`: the process that holds the keys, as `minikms serve` starts it."""

from minikms_daemon.serve import main

if __name__ == "__main__":
    main()
