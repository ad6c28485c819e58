"""The templates of pages and cards (Jinja2): an unknown name is an error, and blocks leave no empty lines."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

__all__ = ["templates"]


def templates(**options: Any) -> Environment:
    """The environment of the templates, with further `options` of Jinja2, such as escaping."""
    return Environment(
        loader=PackageLoader("depthscope", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
