"""The door: ``atelier``, and ``python -m app``. Ctrl-C is one line here, too, while it imports."""

from __future__ import annotations

import sys


def main() -> None:
    """Bring the command, and run it."""
    try:
        from app.cli import main as command
    except KeyboardInterrupt:
        print("\natelier: stopped before it began", file=sys.stderr)
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
