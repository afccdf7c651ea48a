"""``python -m evolora``."""

from evolora.cli import main

main()
