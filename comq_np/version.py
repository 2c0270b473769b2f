"""The version, which the package's metadata and the files carry."""

__version__ = "0.1.0"
