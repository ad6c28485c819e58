"""The two buttons of a tab: one starts an analysis, the other stops it."""

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from jobs.service import Service, Visit
from jobs.visitor import failed
from safety.problems import Problem

__all__ = ["QUIETLY", "StartStop", "with_token"]

logger = logging.getLogger(__name__)

# The options of the page's own events: not among the endpoints, and no overlay over their outputs.
QUIETLY: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
BROKEN = Problem("crashed", "The page could not continue. The log of this Space has the cause.")
Work = Callable[[Visit, str | None, tuple[Any, ...]], AsyncIterator[dict[Any, Any]]]


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
        """The update that enables Stop."""
        return {self.start: gr.update(interactive=False), self.stop: gr.update(interactive=True)}

    @property
    def idle(self) -> dict[Any, Any]:
        """The update that enables Start."""
        return {self.start: gr.update(interactive=True), self.stop: gr.update(interactive=False)}

    def bind(
        self, service: Service, work: Work, inputs: Sequence[Any], status: gr.HTML, outputs: Sequence[Any]
    ) -> None:
        """Bind the buttons: one starts `work` and shows its updates, the other stops all work of the visitor.

        Args:
            service: the service that runs the jobs.
            work: called with the visit, the token of a visitor who has signed in, and the values of `inputs`.
            inputs: the inputs of `work`.
            status: the output for unexpected errors.
            outputs: the other outputs of `work`.
        """

        async def guarded(owner: str, token: str | None, values: tuple[Any, ...]) -> AsyncIterator[dict[Any, Any]]:
            try:
                with service.visit(owner) as visit:
                    async for change in work(visit, token, values):
                        yield change
            except Exception:  # after any error the visitor must be able to continue
                logger.exception("The page could not go on.")
                yield {**self.idle, status: failed(BROKEN)}

        shown = [self.start, self.stop, status, *outputs]
        self.start.click(with_token(service, guarded), list(inputs), shown, concurrency_limit=None, **QUIETLY)

        def stop_mine(request: gr.Request) -> None:
            service.stop(str(request.session_hash))

        self.stop.click(stop_mine, None, None, queue=False, **QUIETLY)


def with_token(service: Service, work: Callable[[str, str | None, tuple[Any, ...]], AsyncIterator[Any]]) -> Any:
    """Bind `work` to an event; it is called with the visitor, their token if they signed in, and the values."""

    async def signed_in(request: gr.Request, oauth: gr.OAuthToken | None, *values: Any) -> AsyncIterator[Any]:
        async for change in work(str(request.session_hash), oauth.token if oauth else None, values):
            yield change

    async def anonymous(request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        async for change in work(str(request.session_hash), None, values):
            yield change

    return signed_in if service.offers_login else anonymous  # Gradio asks for what is annotated
