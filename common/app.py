"""One entry for every project: workdir, logs, devices, exit statuses.

A project's `main.py` hands its function to `run`. A verb with flags of its
own takes `common.flags.Parser` for them and `call` for the exit status:

  0    done
  1    failed, with a traceback (a full disk, a loss that is not finite: a line)
  2    bad configuration or input, one line `error: ...`
  130  interrupted from the keyboard
  143  preempted, after saving

Nothing here imports jax before the flags are known to be right, so `--help`
and refusals come at once.
"""

import argparse
import contextlib
import errno
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from absl import flags as absl_flags
from ml_collections import ConfigDict

from common import config as config_lib
from common import flags
from common.errors import Preempted, RunError, UserError
from common.logs import logging_to, one_line, quiet_libraries

__all__ = ["Preempted", "UserError", "call", "leave", "make_workdir", "run"]

COMPILE_CACHE = "~/.cache/tetrad/xla"
LINGER_SECONDS = 3.0


def run(
  main: Callable[[ConfigDict, str], Any],
  *,
  name: str,
  description: str,
  example: str,
  argv: Sequence[str] | None = None,
  verb: str = "main",
  aliases: Mapping[str, str] | None = None,
  needs: Sequence[str] = (),
) -> NoReturn:
  """Reads the command line, prepares the process, calls `main`, exits.

  Args:
    main: gets the locked configuration and the run's folder. Import jax and
      whatever needs it inside, so that `--help` stays fast.
    name: the project's package; `configs/{name}.py` is what `--help` shows
      when no `--config` is given.
    description: what the program does, for `--help`.
    example: a command that works, for `--help`.
    argv: the arguments; by default the process's own.
    verb: the program's module in the package; others than `main` have default
      folders of their own.
    aliases: short flags for keys of the configuration: flag -> key.
    needs: keys that tell a configuration of this program from others.
  """
  is_process = argv is None
  argv = sys.argv[1:] if argv is None else argv
  aliases = aliases or {}
  parser = _make_parser(f"{name}.{verb}", description, example, aliases)

  def start() -> None:
    args, rest = parser.parse_known_args(argv)
    overrides = flags.group_overrides(rest, parser)
    if args.help:
      print(_help(parser, args.config, name), end="")
      return
    if args.config is None:
      raise UserError(f"--config is missing; for example: {example}")
    config, _ = flags.load_config_file(args.config)
    for key in needs:
      if key not in config:
        raise UserError(
          f"--config={args.config} is none of {name}: it has no {key!r}; for "
          f"example: {example}"
        )
    for alias, key in aliases.items():
      value = getattr(args, alias)
      if value is not None:
        overrides.setdefault(key, []).append(f"--config.{key}={value}")
    for key, arguments in overrides.items():
      config = flags.override(config, key, arguments)
    if args.print_config:
      print(config_lib.to_json(config), end="")
      return
    _check_distributed(args)
    workdir = make_workdir(args.workdir or _default_workdir(args.config, verb))
    config_lib.check_kind(workdir, config)
    _start_jax(args, config)
    with logging_to(workdir, own={"common", name, "__main__"}):
      main(config, workdir)

  leave(call(start), at_once=is_process)


def call(function: Callable[[], Any]) -> int:
  """Calls `function` and returns the exit status that its end means."""
  quiet_libraries()
  try:
    with _quiet_threads():
      function()
  except UserError as error:
    return _say(2, f"error: {one_line(error)}")
  except RunError as error:
    return _say(1, f"error: {one_line(error)}")
  except Preempted as error:
    return _say(143, one_line(error))
  except KeyboardInterrupt:
    return _say(130, "interrupted")
  except Exception as error:
    full = [e for e in _chain(error) if _is_disk_full(e)]
    # While everything is closed others follow, which know no place.
    placed = [e for e in full if getattr(e, "filename", None)]
    if full:
      return _say(1, f"error: {one_line((placed or full)[-1])}")
    traceback.print_exc()
    return 1
  return 0


def _say(status: int, line: str) -> int:
  print(line, file=sys.stderr)
  return status


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
  """Keeps from the terminal what writers' threads say of a full disk, and
  tensorstore's of the event loop of a save or a restore that has failed.

  Both come to the main thread as an error, which ends in one line.
  """
  before = threading.excepthook, sys.unraisablehook

  def in_thread(args: threading.ExceptHookArgs) -> None:
    if not any(map(_is_disk_full, _chain(args.exc_value))):
      before[0](args)

  def stray(args: Any) -> None:
    if issubclass(args.exc_type, KeyboardInterrupt):
      # It came where errors go nowhere, such as in a callback of the garbage
      # collector: again, when that is left.
      own = threading.main_thread().ident
      again = signal.pthread_kill, (own, signal.SIGINT)
      threading.Timer(0.05, *again).start()
    elif str(args.exc_value) != "Event loop is closed":
      before[1](args)

  threading.excepthook, sys.unraisablehook = in_thread, stray
  try:
    yield
  finally:
    threading.excepthook, sys.unraisablehook = before


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


def _is_disk_full(error: BaseException) -> bool:
  # The checkpoint's storage layer reports a full disk as a ValueError that
  # holds the system's text, not as an OSError.
  is_full = getattr(error, "errno", None) == errno.ENOSPC
  return is_full or os.strerror(errno.ENOSPC) in str(error)


def leave(status: int, *, at_once: bool = True) -> NoReturn:
  """Exits; a process that fails while jax is at work does so at once.

  Exit handlers would wait for other processes, which may be waiting in a
  collective for this one: gone without a word, it takes them along. And they
  would take the backend from under computations that an interrupt has left
  running.

  Args:
    status: of the exit.
    at_once: False where the interpreter is somebody else's.
  """
  if at_once and status not in (0, 143) and "jax" in sys.modules:
    if status == 2:
      _linger()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  sys.exit(status)


def _linger() -> None:
  """Lets the other processes refuse what process 0 has refused.

  They die with it, for it coordinates them, and whoever started them would take
  that for a failure, which may be worth another try.
  """
  import jax

  if jax.distributed.is_initialized() and jax.process_index() == 0:
    time.sleep(LINGER_SECONDS)


def _make_parser(
  program: str, description: str, example: str, aliases: Mapping[str, str]
) -> flags.Parser:
  parser = flags.Parser(
    program, description=description, example=example, add_help=False
  )
  add = parser.add_argument
  add(
    "-h",
    "--help",
    action="store_true",
    help="show this page and the configuration's keys, then exit",
  )
  add(
    "--config",
    metavar="FILE[:VARIANT,…]",
    help="a config file, relative to the working directory; "
    "--config.KEY=VALUE sets one of its keys",
  )
  add(
    "--workdir",
    metavar="DIR",
    help="the run's folder (default: runs/<config>[-<variant>]); "
    "a folder that holds a run resumes it",
  )
  add(
    "--print_config",
    action="store_true",
    help="print the resolved configuration as JSON, then exit",
  )
  add(
    "--distributed",
    action=argparse.BooleanOptionalAction,
    help="several processes form one run (default: found out under srun, "
    "mpirun and where TPU hosts are told of each other)",
  )
  for alias, key in aliases.items():
    add(f"--{alias}", metavar="VALUE", help=f"short for --config.{key}=VALUE")
  add("--coordinator", metavar="HOST:PORT", help="process 0, if not found out")
  add("--num_processes", type=int, metavar="N", help="with --coordinator")
  add("--process_id", type=int, metavar="I", help="with --coordinator")
  return parser


def _help(parser: flags.Parser, config: str | None, name: str) -> str:
  default = os.path.join("configs", f"{name}.py")
  if config is None and os.path.exists(default):
    config = default
  keys = "" if config is None else flags.config_help(config)
  return parser.format_help() + keys


def _default_workdir(config: str, verb: str) -> str:
  path, variant = flags.split_config_argument(config)
  name = os.path.splitext(os.path.basename(path))[0]
  parts = [name, *(variant or "").split(","), "" if verb == "main" else verb]
  return os.path.join("runs", "-".join(filter(None, parts)))


def make_workdir(path: str) -> str:
  """Makes a folder, checks that it can be written, returns it absolute.

  Addresses such as `gs://bucket/run` come back as they are.

  Raises:
    UserError: it cannot be made or written, or what reads such addresses is
      not installed.
  """
  from etils import epath

  if "://" in path:
    try:
      epath.Path(path).mkdir(parents=True, exist_ok=True)
    except ImportError as error:
      extra = " (pip install '.[gcs]')" if path.startswith("gs://") else ""
      raise UserError(f"workdir {path!r}: {one_line(error)}{extra}") from error
    except KeyError:
      raise UserError(
        f"workdir {path!r} is an address of no known kind: gs:// is one"
      ) from None
    return path
  path = os.path.abspath(os.path.expanduser(path))
  try:
    os.makedirs(path, exist_ok=True)
    with tempfile.TemporaryFile(dir=path) as file:
      file.write(b"0")
  except OSError as error:
    raise UserError(
      f"cannot write to workdir {path!r}: {error.strerror}; "
      "choose another --workdir"
    ) from None
  return path


def _check_distributed(args: argparse.Namespace) -> None:
  parts = {
    "--coordinator": args.coordinator,
    "--num_processes": args.num_processes,
    "--process_id": args.process_id,
  }
  missing = [flag for flag, value in parts.items() if value is None]
  if missing and len(missing) < len(parts):
    raise UserError(f"{', '.join(parts)} go together: {missing[0]} is missing")
  if not missing and ":" not in args.coordinator:
    raise UserError(f"--coordinator={args.coordinator} has no port: HOST:PORT")
  if not missing and not 0 <= args.process_id < args.num_processes:
    raise UserError(
      f"--process_id={args.process_id} must be at least 0 and less than "
      f"--num_processes={args.num_processes}"
    )
  if not missing and args.distributed is False:
    raise UserError("--coordinator contradicts --no-distributed")


def _cluster(env: Mapping[str, str]) -> dict[str, Any] | None:
  """What `jax.distributed.initialize` must be told where this process is one of
  several; {} where jax finds it all out, None where the process is alone.

  A SLURM batch script that runs outside of `srun` has no step, and is alone.

  Raises:
    UserError: under Open MPI 5, where nobody has said where process 0 is.
  """

  def count(name: str) -> int:
    value = env.get(name, "")
    return int(value) if value.isdecimal() else 1

  mpi = count("OMPI_COMM_WORLD_SIZE")
  if mpi > 1 and "OMPI_MCA_orte_hnp_uri" not in env:
    # What jax goes by ended with version 4.
    if "JAX_COORDINATOR_ADDRESS" not in env:
      raise UserError(
        "Open MPI does not say where process 0 is: add `-x "
        "JAX_COORDINATOR_ADDRESS=HOST:PORT` to mpirun"
      )
    return {
      "coordinator_address": env["JAX_COORDINATOR_ADDRESS"],
      "num_processes": mpi,
      "process_id": int(env["OMPI_COMM_WORLD_RANK"]),
      "local_device_ids": [int(env["OMPI_COMM_WORLD_LOCAL_RANK"])],
      "cluster_detection_method": "deactivate",
    }
  several = (
    mpi > 1
    or count("SLURM_STEP_NUM_TASKS") > 1
    or count("MEGASCALE_NUM_SLICES") > 1
    or "," in env.get("TPU_PROCESS_ADDRESSES", "")
    or "," in env.get("TPU_WORKER_HOSTNAMES", "")
    or "JAX_COORDINATOR_ADDRESS" in env
  )
  return {} if several else None


def _join(args: argparse.Namespace) -> None:
  """Joins the other processes of the run, if there are any.

  Raises:
    UserError: nothing says which these are.
  """
  import jax

  if args.coordinator is not None:
    # Whoever counts processes gets all devices of a host for each: asked for
    # the rest, jax would take one under SLURM, and warn under Kubernetes.
    jax.distributed.initialize(
      coordinator_address=args.coordinator,
      num_processes=args.num_processes,
      process_id=args.process_id,
      cluster_detection_method="deactivate",
    )
  elif args.distributed is not False:
    found = _cluster(os.environ)
    if found is None and not args.distributed:
      return
    try:
      jax.distributed.initialize(**(found or {}))
    except ValueError as error:
      raise UserError(
        f"nothing here says which processes form the run ({one_line(error)}): "
        "give --coordinator, --num_processes and --process_id, or "
        "--no-distributed"
      ) from error


def _start_jax(args: argparse.Namespace, config: ConfigDict) -> None:
  """Sets up the compilation cache and joins the run's other processes."""
  import jax

  # Libraries that read absl flags refuse to while these are unparsed.
  if not absl_flags.FLAGS.is_parsed():
    absl_flags.FLAGS.mark_as_parsed()
  platforms = os.environ.get("JAX_PLATFORMS", "")
  if platforms and "cpu" not in platforms.split(","):
    # What has to be the same bits everywhere is computed on the host.
    jax.config.update("jax_platforms", f"{platforms},cpu")
  cache = config.get("compile_cache", COMPILE_CACHE)
  if cache:
    path = cache if "://" in cache else os.path.expanduser(cache)
    jax.config.update("jax_compilation_cache_dir", path)
    # The default of one second would leave out most of a small model.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  _join(args)
