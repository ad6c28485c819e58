"""The exceptions of depthscope: each says what was given, what was expected and what to do next.

Every error that a user can correct derives from `DepthscopeError`. The command line prints its message and exits with
code 2, the Space shows the message, and a Python caller can catch each cause by its class.
"""


class DepthscopeError(Exception):
    """Base class of every error that depthscope raises on purpose."""

    of_peer = False  # True if another process of the same run failed, and this one stopped because of it


class NoLayerStackError(DepthscopeError):
    """The model has no plain stack of decoder layers, each called once and in order."""


class NotCausalError(NoLayerStackError):
    """The model sees the tokens that it should predict."""


class BatchDependentError(NoLayerStackError):
    """The model's output for one text depends on the other texts in its batch."""


class ModelLoadError(DepthscopeError):
    """The model could not be loaded: missing, gated, unsafe, not a causal language model, ..."""


class CorpusError(DepthscopeError):
    """The text could not be read, or holds fewer tokens than are needed."""


class SettingsError(DepthscopeError, ValueError):
    """An option has a value that is not allowed."""


class AnalysisError(DepthscopeError):
    """The analysis could not be carried out on this model and this text."""


class NonFiniteError(AnalysisError):
    """The model's activations or its loss are not finite."""


class OutOfMemoryError(AnalysisError):
    """The device ran out of memory; the message names the setting to lower."""


class ConversionError(DepthscopeError, ValueError):
    """A model cannot be converted exactly to the requested architecture or shape; the message says why."""


class SurgeryError(DepthscopeError, ValueError):
    """Layers cannot be cut out of a model so that a native model computes the same; the message says why."""


class PlanError(DepthscopeError, ValueError):
    """A plan of a cut is not valid, or does not hold what is asked of it; the message names the field."""


class ReportError(DepthscopeError):
    """A report could not be read or written."""


class SpecificationError(DepthscopeError, ValueError):
    """A sweep file holds a value that is not allowed; the message names the line and the allowed values."""


class SweepError(DepthscopeError):
    """A sweep could not be run or read."""


class HubError(DepthscopeError):
    """The Hub refused a request or did not answer; the message says what is on the Hub now and what to do."""


class AnalysisInterrupted(KeyboardInterrupt):
    """Ctrl-C during an analysis; the message says how far it was."""
