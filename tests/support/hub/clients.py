"""`pointed_at`: the clients of this process use another Hub for a while, though they read their settings at import."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import datasets.config
import huggingface_hub
import huggingface_hub.hf_api
import pytest
import transformers.utils.hub
from huggingface_hub import HfFileSystem, constants
from huggingface_hub.utils import close_session


@contextmanager
def pointed_at(settings: Mapping[str, str]) -> Iterator[None]:
    """Set the variables that `LocalHub.environment` gives, and every value that libraries derived from them at import.

    huggingface_hub reads its settings from `constants` when it needs them, transformers asks huggingface_hub, datasets
    has its own copies in `config`; the functions that huggingface_hub exports are methods of one HfApi made at import.
    A client that has copied a value elsewhere needs a process of its own.
    """
    endpoint, home = settings["HF_ENDPOINT"], settings["HF_HOME"]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in settings.items():
            if name.startswith("HF_") or name == "NO_PROXY":
                patch.setenv(name, value)
        patch.setattr(constants, "ENDPOINT", endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        patch.setattr(constants, "HF_HOME", home)
        patch.setattr(constants, "HF_HUB_CACHE", f"{home}/hub")
        patch.setattr(constants, "HF_TOKEN_PATH", f"{home}/token")
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
        patch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # made anew where it is needed
        patch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
        patch.setattr(datasets.config, "HUB_DATASETS_URL", endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        patch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", f"{home}/datasets")
        _forget_connections()
        try:
            yield
        finally:
            _forget_connections()


def _forget_connections() -> None:
    """File systems keep listings and connections keep proxies from the settings before."""
    close_session()
    HfFileSystem.clear_instance_cache()
