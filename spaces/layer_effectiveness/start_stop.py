"""The two buttons of a tab that starts analyses: one starts, the other stops what the visitor started."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from service import Service

__all__ = ["QUIETLY", "StartStop"]

# How the page's own events are bound: no name among the endpoints, no veil over what they change.
QUIETLY: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
Work = Callable[..., AsyncIterator[dict[Any, Any]]]


@dataclass(frozen=True)
class StartStop:
    """A row with both; only one of them can be pressed."""

    start: gr.Button
    stop: gr.Button

    @classmethod
    def build(cls, label: str, start_id: str, stop_id: str) -> "StartStop":
        """Draw them here."""
        with gr.Row():
            start = gr.Button(label, variant="primary", elem_id=start_id, min_width=120)
            stop = gr.Button("Stop", variant="stop", interactive=False, elem_id=stop_id, min_width=120)
        return cls(start, stop)

    @property
    def busy(self) -> dict[Any, Any]:
        """The change that lets the visitor stop."""
        return {self.start: gr.update(interactive=False), self.stop: gr.update(interactive=True)}

    @property
    def idle(self) -> dict[Any, Any]:
        """The change that lets the visitor start."""
        return {self.start: gr.update(interactive=True), self.stop: gr.update(interactive=False)}

    def bind(self, service: Service, work: Work, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Start `work`, whose changes are shown as they come, and stop the jobs of the same visitor.

        Args:
            service: where the jobs are.
            work: takes the request (and the OAuth token, if it asks for one) and the values of `inputs`.
            inputs: what `work` reads.
            outputs: what `work` changes, besides these buttons.
        """
        shown = [self.start, self.stop, *outputs]
        self.start.click(work, list(inputs), shown, concurrency_limit=None, **QUIETLY)

        def stop_mine(request: gr.Request) -> None:
            service.jobs.stop(str(request.session_hash))

        self.stop.click(stop_mine, None, None, queue=False, **QUIETLY)
