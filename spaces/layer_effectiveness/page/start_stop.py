"""The two buttons of a tab that starts analyses: one starts, the other stops what the visitor started."""

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

# How the page's own events are bound: no name among the endpoints, no veil over what they change.
QUIETLY: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
BROKEN = Problem("crashed", "The page could not go on with this. The log of this Space says why.")
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
        """The change that lets the visitor stop."""
        return {self.start: gr.update(interactive=False), self.stop: gr.update(interactive=True)}

    @property
    def idle(self) -> dict[Any, Any]:
        """The change that lets the visitor start."""
        return {self.start: gr.update(interactive=True), self.stop: gr.update(interactive=False)}

    def bind(
        self, service: Service, work: Work, inputs: Sequence[Any], status: gr.HTML, outputs: Sequence[Any]
    ) -> None:
        """Start `work`, whose changes are shown as they come, and stop what the same visitor has begun.

        Args:
            service: where the jobs are.
            work: takes the visit, the token of a visitor who has signed in, and the values of `inputs`.
            inputs: what `work` reads.
            status: where it is said that something broke which nobody expected.
            outputs: what `work` changes, besides these.
        """

        async def guarded(owner: str, token: str | None, values: tuple[Any, ...]) -> AsyncIterator[dict[Any, Any]]:
            try:
                with service.visit(owner) as visit:
                    async for change in work(visit, token, values):
                        yield change
            except Exception:  # the visitor must be able to go on, whatever it is
                logger.exception("The page could not go on.")
                yield {**self.idle, status: failed(BROKEN)}

        shown = [self.start, self.stop, status, *outputs]
        self.start.click(with_token(service, guarded), list(inputs), shown, concurrency_limit=None, **QUIETLY)

        def stop_mine(request: gr.Request) -> None:
            service.stop(str(request.session_hash))

        self.stop.click(stop_mine, None, None, queue=False, **QUIETLY)


def with_token(service: Service, work: Callable[[str, str | None, tuple[Any, ...]], AsyncIterator[Any]]) -> Any:
    """Bind `work` to an event: it is called with who the visitor is, their token if they signed in, and the values."""

    async def signed_in(request: gr.Request, oauth: gr.OAuthToken | None, *values: Any) -> AsyncIterator[Any]:
        async for change in work(str(request.session_hash), oauth.token if oauth else None, values):
            yield change

    async def anonymous(request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        async for change in work(str(request.session_hash), None, values):
            yield change

    return signed_in if service.offers_login else anonymous  # Gradio asks for what is annotated
