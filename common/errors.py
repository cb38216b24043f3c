"""Errors that are the user's to mend."""


class UserError(ValueError):
  """Bad input: one clear line that names the value and the remedy.

  `common.app` prints it as `error: ...` without a traceback and exits with
  status 2.
  """


class TakenError(UserError):
  """Another run is at work in the folder."""


class RunError(RuntimeError):
  """The run cannot go on; one line says why. Exit status 1."""


class Preempted(Exception):
  """The run saved its state and leaves; exit status 143."""
