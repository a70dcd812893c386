"""Native mode: Django's own async methods, in the current session."""

from __future__ import annotations

from .install import install, is_installed, uninstall, use

__all__ = ["install", "is_installed", "uninstall", "use"]
