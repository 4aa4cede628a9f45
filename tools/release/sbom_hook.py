"""Puts the SBOM that `make dist` made into the wheel (PEP 770). A wheel that pip builds in a checkout has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SBOM = "sbom.cdx.json"


class SbomHook(BuildHookInterface[Any]):  # type: ignore[misc]  # hatchling is not installed where the types are checked
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard" and Path(self.root, SBOM).exists():
            build_data["sbom_files"].append(SBOM)
