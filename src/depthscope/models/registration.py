"""Make transformers' Auto classes know DepthLM as soon as both they and depthscope are imported, in either order.

`AutoConfig.register` and its like want the classes themselves, and those take torch and transformers to import:
seconds, that `import depthscope` (so also `depthscope --help`) is not to cost. Importing the classes later, when the
Auto classes come to be imported, goes in circles. So DepthLM is entered in the tables in which transformers keeps its
own architectures: by name, the classes to be imported when a checkpoint first asks for them.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import depthscope.models

_TYPE = "depthlm"


def _enter_config(auto: ModuleType) -> None:
    auto.CONFIG_MAPPING._mapping[_TYPE] = "DepthLMConfig"
    auto.CONFIG_MAPPING._modules[_TYPE] = depthscope.models


def _enter_models(auto: ModuleType) -> None:
    for table, name in ((auto.MODEL_MAPPING, "DepthLMModel"), (auto.MODEL_FOR_CAUSAL_LM_MAPPING, "DepthLMForCausalLM")):
        table._model_mapping[_TYPE] = name
        table._reverse_config_mapping["DepthLMConfig"] = _TYPE
        table._modules[_TYPE] = depthscope.models


_STEPS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _enter_config,
    "transformers.models.auto.modeling_auto": _enter_models,
}


def register() -> None:
    """Enter DepthLM with the Auto classes: at once where they are imported, otherwise as soon as they are."""
    waiting = set()
    for name in _STEPS:
        if name in sys.modules:
            _take_step(sys.modules[name])
        else:
            waiting.add(name)
    if waiting:
        sys.meta_path.insert(0, _AfterImport(waiting))


def _take_step(module: ModuleType) -> None:
    try:
        _STEPS[module.__name__](module)
    except AttributeError as problem:
        # Never break the import of transformers itself.
        warnings.warn(
            f"This version of transformers keeps its Auto classes differently ({problem}): load DepthLM checkpoints "
            "with depthscope.DepthLMForCausalLM.from_pretrained instead of AutoModelForCausalLM.",
            stacklevel=2,
        )


class _AfterImport(MetaPathFinder):
    """Finds the modules that it waits for by the usual means, and has their step taken once they have run."""

    def __init__(self, waiting: set[str]) -> None:
        self._waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._waiting:
            return None
        self._waiting.discard(fullname)  # first, so that the search below passes this finder by
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _StepLoader(spec.loader)
        return spec


class _StepLoader(Loader):
    """A loader that takes the module's step once it has run."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps the loader that found it: inspect and others ask it for the source.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _take_step(module)
