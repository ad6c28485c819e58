"""Make transformers' Auto classes know DepthLM as soon as both they and depthscope are imported, in either order.

Registering needs transformers and torch, which take seconds to import, and `import depthscope` (so also `depthscope
--help`) is to stay quick. Where the Auto classes are not imported yet, their registration waits until they are.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def _register_config(auto: ModuleType) -> None:
    from depthscope.models.configuration_depthlm import DepthLMConfig

    auto.AutoConfig.register("depthlm", DepthLMConfig, exist_ok=True)


def _register_models(auto: ModuleType) -> None:
    from depthscope.models.modeling_depthlm import DepthLMConfig, DepthLMForCausalLM, DepthLMModel

    auto.AutoModel.register(DepthLMConfig, DepthLMModel, exist_ok=True)
    auto.AutoModelForCausalLM.register(DepthLMConfig, DepthLMForCausalLM, exist_ok=True)


_STEPS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
}


def register_when_imported() -> None:
    """Register DepthLM with the Auto classes: at once where they are imported, otherwise when they come to be."""
    queue = _Queue()
    waiting = {}
    for name, step in _STEPS.items():
        if name in sys.modules:
            queue.take(step, sys.modules[name])
        else:
            waiting[name] = step
    if waiting:
        sys.meta_path.insert(0, _AfterImport(waiting, queue))


class _Queue:
    """Takes one step after another. A step imports modules of its own, which may bring the next step's module along:
    that step then has to wait until the first has finished, or it would meet half-imported modules of ours."""

    def __init__(self) -> None:
        self._steps: list[tuple[Callable[[ModuleType], None], ModuleType]] = []
        self._busy = False

    def take(self, step: Callable[[ModuleType], None], module: ModuleType) -> None:
        self._steps.append((step, module))
        if self._busy:
            return
        self._busy = True
        try:
            while self._steps:
                step, module = self._steps.pop(0)
                step(module)
        finally:
            self._busy = False


class _AfterImport(MetaPathFinder):
    """Finds the modules it waits for by the usual means, and has a step taken once they have run."""

    def __init__(self, waiting: dict[str, Callable[[ModuleType], None]], queue: _Queue) -> None:
        self.waiting = waiting
        self.queue = queue

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        step = self.waiting.pop(fullname, None)
        if step is None:
            return None
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenLoader(spec.loader, partial(self.queue.take, step))
        return spec


class _ThenLoader(Loader):
    """A loader that does something more with the module once it has run."""

    def __init__(self, loader: Loader, then: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._then = then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps the loader that found it: inspect and others ask it for the source.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._then(module)
