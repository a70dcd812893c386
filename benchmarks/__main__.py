"""Runs the benchmarks: `python -m benchmarks`."""

from __future__ import annotations

import os
import sys
import time

from rich.console import Console

from benchmarks import options

WIDTH = 180


def main() -> int:
    """Measure, show, save; returns the exit code."""
    chosen = options.parse()
    os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.settings"
    import django

    django.setup()
    from benchmarks import bars, runs, tables

    console = Console()
    # Tables of eleven works are unreadable when they are folded.
    console.width = max(console.width, WIDTH)
    progress = Console(stderr=True)

    def say(text: str) -> None:
        progress.print(text, style="dim", highlight=False)

    began = time.monotonic()
    sections = []
    for section in runs.run(chosen, say):
        tables.show(console, section)
        sections.append(section)
    judged = bars.judge(sections)
    tables.show_bars(console, judged)
    runs.save(chosen, sections, judged)
    say(f"{time.monotonic() - began:.0f} s")
    is_missed = any(result.verdict is bars.Verdict.MISSED for result in judged)
    return 1 if chosen.check and is_missed else 0


if __name__ == "__main__":
    sys.exit(main())
