"""Keep shapes such as [L][N] in docstrings from being read as links, by a space of no width between the brackets."""

from typing import Any

from griffe import Extension, Object

ZERO_WIDTH_SPACE = "\u200b"


class Shapes(Extension):
    """A griffe extension; mkdocs.yml names it."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Separate the brackets in an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("][", f"]{ZERO_WIDTH_SPACE}[")
