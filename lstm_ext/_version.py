"""The package's version, in this one place; pyproject.toml and setup.py read it from here."""

__version__ = "0.1.0"
