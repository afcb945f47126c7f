"""Extension of the reference pages: fields of specs are shown with their defaults, without their other facts."""

from __future__ import annotations

from typing import Any

from griffe import Attribute, ExprCall, Extension


class Defaults(Extension):
    """Shows ``option(None, help=...)`` as ``None``."""

    def on_attribute_instance(self, *, attr: Attribute, **kwargs: Any) -> None:
        if isinstance(attr.value, ExprCall) and str(attr.value.function) == "option":
            attr.value = attr.value.arguments[0]
