"""Commands for people: python -m nanomed.tools.NAME."""
