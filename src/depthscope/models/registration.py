"""Register DepthLM with transformers' Auto classes as soon as they and depthscope are imported, in either order.

`AutoConfig.register` and the like need the classes themselves, whose import takes seconds for torch and transformers;
`import depthscope` (and `depthscope --help`) must not take so long. Importing the classes when the Auto classes are
imported would be circular. So DepthLM is added to transformers' own tables of architectures by name, and the classes
are imported when a checkpoint first needs them.
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
    """Register DepthLM with the Auto classes: now if they are imported, otherwise as soon as they are."""
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
            f"DepthLM cannot be registered in this version of transformers ({problem}): load DepthLM checkpoints "
            "with depthscope.DepthLMForCausalLM.from_pretrained instead of AutoModelForCausalLM.",
            stacklevel=2,
        )


class _AfterImport(MetaPathFinder):
    """Finds the awaited modules with the usual finders, and runs their registration step after their import."""

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
    """A loader that runs the module's registration step after its code."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps its original loader, from which inspect and others get the source.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _take_step(module)
