"""Switches the tool on that ECOSYSTEM_TOOL names, in every Python process that has this folder in
PYTHONPATH: as agents do that start with the interpreter, and as a project's settings module does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3]))

if os.environ.get("ECOSYSTEM_TOOL"):
    from tests.ecosystem import tools

    tools.switch_on(os.environ["ECOSYSTEM_TOOL"])
