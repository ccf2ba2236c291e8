"""``python -m llmbrain``."""

from llmbrain.cli import main

main()
