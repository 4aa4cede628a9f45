"""`python -m progressdb_server`: the `progressdb` command."""

from progressdb_server.cli import main

if __name__ == "__main__":
    main()
