"""Native mode: Django's own async methods, in the current session."""

from __future__ import annotations

from .install import install, is_installed, uninstall, use
from .sessions import current

__all__ = ["current", "install", "is_installed", "uninstall", "use"]
