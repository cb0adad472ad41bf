"""What a person looks at after a conversion."""

from .summary import summary, written

__all__ = ["summary", "written"]
