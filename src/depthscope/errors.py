"""The exceptions of depthscope: each says what was given, what was expected and what to do next.

Everything that is the user's to mend derives from `DepthscopeError`; the command line prints its message and exits with
2, the Space shows it, and a Python caller can catch one cause without catching the others.
"""


class DepthscopeError(Exception):
    """Base class of every error that depthscope raises on purpose."""

    of_peer = False  # whether another process of the same run raised it, and this one left because of that


class NoLayerStackError(DepthscopeError):
    """The model has no plain stack of decoder layers, each called once and in order."""


class NotCausalError(NoLayerStackError):
    """The model sees the tokens that it should predict."""


class BatchDependentError(NoLayerStackError):
    """What the model says of a text depends on more than the text."""


class ModelLoadError(DepthscopeError):
    """The model could not be loaded: missing, gated, unsafe, not a causal language model, ..."""


class CorpusError(DepthscopeError):
    """The text could not be read, or holds fewer tokens than were asked for."""


class SettingsError(DepthscopeError, ValueError):
    """An option has a value that is not allowed."""


class AnalysisError(DepthscopeError):
    """The analysis could not be carried out on this model and this text."""


class NonFiniteError(AnalysisError):
    """The model's activations or its loss are not finite."""


class OutOfMemoryError(AnalysisError):
    """The device ran out of memory; the message says what to lower."""


class ConversionError(DepthscopeError, ValueError):
    """A model cannot be turned exactly into the architecture or the shape that was asked for; the message says why."""


class ReportError(DepthscopeError):
    """A report could not be read or written."""


class SpecificationError(DepthscopeError, ValueError):
    """A sweep file says something that is not allowed; the message names the line and what is."""


class SweepError(DepthscopeError):
    """A sweep could not be run or read."""


class HubError(DepthscopeError):
    """The Hub refused, or did not answer; the message says what is there now and what to do."""


class AnalysisInterrupted(KeyboardInterrupt):
    """Ctrl-C during an analysis; the message says what had been done."""
