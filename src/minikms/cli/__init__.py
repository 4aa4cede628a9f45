"""The command. Placeholder main until the command is composed."""


def main() -> None:
    raise SystemExit("not composed yet")
