"""Gradio's file input, without the empty file that it creates for each upload."""

from typing import Any

import gradio as gr
from gradio_client.utils import is_valid_file

__all__ = ["leave_no_empty_files"]


def leave_no_empty_files() -> None:
    """Let every `gr.File` pass on the path of an upload unchanged.

    Gradio 6 creates an empty temporary file for each path that is passed on, and never deletes it. A subclass would not
    work if Gradio creates a component again, and would write a stub file beside its own source.
    """
    gr.File._process_single_file = _path  # type: ignore[method-assign,assignment]


def _path(component: gr.File, file: Any) -> str:
    if component.file_types and not is_valid_file(file.path, component.file_types):
        kinds = ", ".join(component.file_types)
        raise gr.Error(f"upload: {(file.orig_name or 'The file')[:80]!a} is not one of {kinds}.", print_exception=False)
    return str(file.path)
