"""An optional store of finished reports in a dataset repository, so that they outlive a restart of the Space.

Set DEPTHSCOPE_SPACE_RESULTS to the dataset's id and HF_TOKEN to a token that may write to it. Only reports of public
models on the Hub are stored, never those of uploads or of private or gated models.
"""

import logging
import os
import re
import threading

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError

from depthscope import LayerReport
from depthscope.errors import ReportError
from jobs.tasks import Task

__all__ = ["ResultStore", "result_store"]

VARIABLE = "DEPTHSCOPE_SPACE_RESULTS"
KEY = re.compile(r"[0-9a-f]{64}")
logger = logging.getLogger(__name__)


class ResultStore:
    """Reports as `reports/<key>.json` in a dataset repository; a report that cannot be read is measured again."""

    def __init__(self, repository: str, token: str | None = None) -> None:
        self.repository = repository
        self.token = token

    def get(self, key: str) -> str | None:
        """The report of a task, or None if there is no readable one."""
        if not KEY.fullmatch(key):
            return None
        try:
            path = hf_hub_download(self.repository, _path(key), repo_type="dataset", token=self.token)
            return LayerReport.load(path).to_json()
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, HTTPError, OSError, ReportError) as error:
            logger.warning("A result could not be read from %s: %s", self.repository, error)
            return None

    def put(self, task: Task, report: str) -> None:
        """Store a report in the background."""
        threading.Thread(target=self._upload, args=(task.key(), task.name, report), daemon=True).start()

    def _upload(self, key: str, name: str, report: str) -> None:
        try:
            HfApi(token=self.token).upload_file(
                path_or_fileobj=report.encode(),
                path_in_repo=_path(key),
                repo_id=self.repository,
                repo_type="dataset",
                commit_message=f"Layers of {name}",
            )
        except (HfHubHTTPError, HTTPError, OSError) as error:
            logger.warning("A result could not be stored in %s: %s", self.repository, error)


def result_store() -> ResultStore | None:
    """The store that the owner has set, or None."""
    repository = os.environ.get(VARIABLE)
    return ResultStore(repository, os.environ.get("HF_TOKEN")) if repository else None


def _path(key: str) -> str:
    return f"reports/{key}.json"
