"""`minikms completion`: what a shell needs to complete this command.

Owns: printing the script of each shell, which is made from the command tree. It changes no file: where a script
belongs is the user's choice.
"""

from __future__ import annotations

from typing import Literal

from minikms.cli.console import EXIT_GOOD


def completion(shell: Literal["bash", "zsh", "fish"]) -> int:
    """Print the completion script of a shell. For bash: source <(minikms completion bash)"""
    from minikms.cli.command import app

    print(app.generate_completion(prog_name="minikms", shell=shell), end="")
    return EXIT_GOOD
