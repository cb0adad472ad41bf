"""What a person looks at after a conversion."""

from .summary import summary

__all__ = ["summary"]
