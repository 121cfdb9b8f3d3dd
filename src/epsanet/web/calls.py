"""What the page's functions can be asked for, looked at before Gradio, which gives no reason for most wrong values."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.data_classes import ImageData
from pydantic import ValidationError

__all__ = ["Calls"]


class Calls:
    """The functions of a page, and what each takes.

    Args:
        page: whose functions they are.
    """

    def __init__(self, page: gr.Blocks) -> None:
        self._functions = page.fns
        self._by_name = {function.api_name: function for function in page.fns.values()}

    def mistake(self, name: str | None, content: Any) -> tuple[str, str] | None:
        """What is wrong with a request.

        Args:
            name: of the function; without one the request names its number.
            content: of the request, as JSON had it.

        Returns:
            The parameter and a reason; ``None`` where Gradio may have it.
        """
        if not isinstance(content, dict):
            return "data", 'the request is no object with a list "data"'
        number = content.get("fn_index")
        if name is None:
            function = self._functions.get(number) if isinstance(number, int) else None
        else:
            function = self._by_name.get(name)
        if function is None:
            return "function", f"there is no function {_short(number if name is None else name)}"
        data, inputs = content.get("data"), function.inputs
        if not isinstance(data, list) or len(data) != len(inputs):
            return "data", f"{len(inputs)} values are needed, in a list"
        for component, value in zip(inputs, data, strict=True):
            reason = _reason(component, value)
            if reason is not None:
                return str(getattr(component, "label", None) or "data").lower(), reason
        return None


def _reason(component: Any, value: Any) -> str | None:
    """Why a value is none that a component can have."""
    if isinstance(component, gr.Image):
        if value is not None and not _is_file(value):
            return f"{_short(value)} is no file as an upload gives it"
    elif isinstance(component, gr.Dropdown):
        names = [choice for _, choice in component.choices]
        if value not in names:
            return f"{_short(value)} is none of {', '.join(map(str, names))}"
    elif isinstance(component, gr.Slider):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not component.minimum <= value <= component.maximum:
            return f"{_short(value)} is no number from {component.minimum} to {component.maximum}"
    return None


def _is_file(value: Any) -> bool:
    try:
        ImageData.model_validate(value)
    except ValidationError:
        return False
    return True


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
