"""The page: its tabs, its style, and how it is launched."""

import os
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.exceptions import ComponentProcessingError, InvalidPathError
from gradio_client.utils import is_file_obj_with_meta, is_http_url_like, traverse
from starlette.middleware import Middleware

from jobs.readers import Listening
from jobs.service import Service
from page import analyze_tab, compare_tab, endpoints, explain_tab
from page.file_input import leave_no_empty_files
from page.receiving import Receiving
from page.results import parts

__all__ = ["build", "launch_options"]

HERE = Path(__file__).parent
TITLE = "depthscope: which layers of a language model do the work?"
CACHE_SECONDS = (600, 3600)  # uploads and downloads are checked at this interval, and deleted at this age
MOST_SESSIONS = 500  # that Gradio remembers, at 0.3 MB each; every call of a program may be one
FONT = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


class Page(gr.Blocks):
    """Blocks that accept only uploads: Gradio itself would fetch any link given as a file, of any size."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any, **options: Any) -> list[Any]:
        """Refuse links and invalid values; otherwise behave like Gradio.

        Raises:
            gr.Error: the message names the expected value; nothing is logged, because the error is the visitor's.
        """
        traverse(inputs, _refuse_link, is_file_obj_with_meta)
        endpoints.require_arguments(block_fn.api_name, block_fn.inputs, inputs)
        try:
            prepared: list[Any] = await super().preprocess_data(block_fn, inputs, *rest, **options)
        except gr.Error:
            raise
        except InvalidPathError as error:
            raise gr.Error("upload: The file was not uploaded to this Space.", print_exception=False) from error
        except (ComponentProcessingError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = str(error.__cause__ or error).partition("\n")[0][:200]
            raise gr.Error(f"settings: The request cannot be read: {reason}", print_exception=False) from error
        return prepared


def build(service: Service) -> gr.Blocks:
    """Build the page."""
    leave_no_empty_files()
    with Page(title=TITLE, analytics_enabled=False, delete_cache=CACHE_SECONDS) as page:
        gr.HTML(
            "<header class='ds-header'><h1>depthscope</h1><p>How much does each layer of a language model "
            "contribute?</p></header>"
        )
        kept = gr.State([])
        with gr.Tabs():
            with gr.Tab("Analyze", id="analyze"):
                analyze_tab.build(service, page, kept)
            with gr.Tab("Compare", id="compare"):
                compare_tab.build(service, kept)
            with gr.Tab("Explain", id="explain"):
                explain_tab.build()
            with gr.Tab("For programs", id="programs"):
                gr.HTML(
                    "<h2>The same from a program</h2><p>Every analysis can be called with <code>gradio_client</code>, "
                    "through the same queue and limits.</p>"
                )
                place = os.environ.get("SPACE_ID", "NAMESPACE/NAME")
                gr.HTML(parts.listing(endpoints.EXAMPLES.format(place=place), "Examples"))
                gr.HTML(f"<p class='ds-caption'>{escape(_limits(service))}</p>")
        endpoints.build(service)

        def leave(request: gr.Request) -> None:
            service.stop(str(request.session_hash))

        page.unload(leave)
    # Our own queue limits the work; Gradio's queue only holds the visitors.
    # Every answer is read from a stream, as on the Hub: otherwise a waiting visitor looks like one who has left.
    page.queue(max_size=None, default_concurrency_limit=16, api_open=False)
    return page


def launch_options(service: Service) -> dict[str, Any]:
    """The arguments of the page's `launch`."""
    style, narrow, script = (
        (HERE / name).read_text(encoding="utf-8") for name in ("style.css", "narrow.css", "page.js")
    )
    return {
        "app_kwargs": {"middleware": [Middleware(Listening, readers=service.readers), Middleware(Receiving)]},
        "theme": _theme(),
        "css": style,
        "head": f"<style>{narrow}</style><script>{script}</script>",
        "state_session_capacity": MOST_SESSIONS,
        "max_file_size": service.limits.max_upload_bytes,
        "show_error": True,
        "run_history": False,
        "footer_links": ["api"],
        "ssr_mode": False,
        "enable_monitoring": False,
    }


def _refuse_link(file: dict[str, Any]) -> dict[str, Any]:
    if is_http_url_like(str(file.get("path"))):
        raise gr.Error("upload: Links are not accepted. Upload the file itself.", print_exception=False)
    return file


def _theme() -> gr.themes.Base:
    """Gradio's plainest theme, with the visitor's own fonts and sufficient contrast."""
    theme = gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=MONO, radius_size="sm")
    return theme.set(
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_600",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
        color_accent="*primary_700",
        border_color_accent="*primary_700",
    )


def _limits(service: Service) -> str:
    limits = service.limits
    return (
        f"Limits here: models of {limits.max_parameters / 1e9:.3g} billion parameters, uploads of "
        f"{limits.max_upload_bytes / 2**30:.3g} GiB, {limits.max_tokens:,} tokens, {limits.max_job_seconds} seconds "
        f"per job, {limits.max_jobs} at once, {limits.max_waiting} waiting."
    )
