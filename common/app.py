"""One entry for every project: workdir, logs, devices.

A project's `main.py` hands its function to `run`. A verb with flags of its
own takes `common.flags.Parser` for them and `run_alone`; what the exit status
means stands in `common.ending`.

Nothing here imports jax before the flags are known to be right, so `--help`
and refusals come at once.
"""

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from absl import flags as absl_flags
from ml_collections import ConfigDict

from common import config as config_lib
from common import flags
from common.addresses import ADDRESS, bind_address, meet
from common.ending import call, leave, preemptible
from common.errors import Preempted, RunError, UserError
from common.files import bucket_errors
from common.logs import logging_to, one_line
from common.places import is_taken, taken_when_used

__all__ = [
  "Preempted", "UserError", "call", "leave", "make_workdir", "run", "run_alone"
]  # fmt: skip

COMPILE_CACHE = "~/.cache/tetrad/xla"


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
  programs: Callable[[ConfigDict], Iterable[Any]] | None = None,
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
    programs: the steps of a configuration, `common.plan.Program`s; with them
      there is a flag `--plan`.
  """
  is_process = argv is None
  argv = sys.argv[1:] if argv is None else argv
  aliases = aliases or {}
  parser = _make_parser(f"{name}.{verb}", description, example, aliases)
  if programs is not None:
    _add_plan(parser)

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
    if programs is not None and args.plan is not None:
      print(_plan(config, programs, args.plan))
      return
    _check_distributed(args)
    place = args.workdir or _default_workdir(args.config, verb)
    with taken_when_used(place):
      workdir = make_workdir(place)
      config_lib.check_kind(workdir, config)
      _start_jax(args, config)
      own = {"common", name, "__main__"}
      with (
        # A run that is at work there keeps its log for itself.
        logging_to(workdir, own=own, to_file=not is_taken(workdir)),
        preemptible(),
      ):
        main(config, workdir)

  leave(call(start), at_once=is_process)


def run_alone(main: Callable[[], Any]) -> NoReturn:
  """Calls the `main` of a verb that runs as one process, and exits.

  Refused, but for `--help`, where the environment says that this process is one
  of several: each would do the same work.
  """

  def start() -> None:
    name = _says_several(os.environ)
    if name is not None and not {"-h", "--help"} & set(sys.argv[1:]):
      raise UserError(
        f"this program runs as one process, and {name}={os.environ[name]!r} "
        "speaks of several: start one, or, where each is to work by itself, "
        f"take that away with `env -u {name}`"
      )
    main()

  leave(call(start))


def _says_several(env: Mapping[str, str]) -> str | None:
  """The first variable by which `_cluster` finds several processes."""
  for name, value in sorted(env.items()):
    try:
      if _cluster({name: value}) is not None:
        return name
    except UserError:  # there are, but it lacks others to tell where
      return name
  return None


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
  add(
    "--peer_timeout",
    type=int,
    metavar="SECONDS",
    help="after which a process that says nothing is given up, and the others "
    "end (default: 100)",
  )
  return parser


def _add_plan(parser: flags.Parser) -> None:
  parser.add_argument(
    "--plan",
    metavar="DEVICES",
    type=int,
    nargs="?",
    const=1,
    help="print what each of so many devices (1) would hold, compute and send "
    "in a step, then exit; they are simulated, nothing is trained",
  )


def _plan(
  config: ConfigDict,
  programs: Callable[[ConfigDict], Iterable[Any]],
  devices: int,
) -> str:
  if devices < 1:
    raise UserError(f"--plan={devices}: at least 1 device")
  import jax

  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", devices)
  _use_cache(config)
  from common.plan import make_plan, plan_table

  return plan_table(map(make_plan, programs(config)))


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
    RunError: a bucket cannot be reached.
  """
  from etils import epath

  if "://" in path:
    with bucket_errors(path):
      try:
        epath.Path(path).mkdir(parents=True, exist_ok=True)
      except ImportError as error:
        extra = " (pip install -e '.[gcs]')" if path.startswith("gs://") else ""
        raise UserError(
          f"workdir {path!r}: {one_line(error)}{extra}"
        ) from error
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
  if args.peer_timeout is not None and args.peer_timeout < 1:
    raise UserError(f"--peer_timeout={args.peer_timeout}: at least 1 second")


def _cluster(env: Mapping[str, str]) -> dict[str, Any] | None:
  """What `jax.distributed.initialize` must be told where this process is one of
  several; {} where jax finds it all out, None where the process is alone.

  A SLURM batch script that runs outside of `srun` has no step, and is alone.

  Raises:
    UserError: under Open MPI 5, where nobody has said where process 0 is, or
      which of the processes this one is.
  """

  def count(name: str) -> int:
    value = env.get(name, "")
    return int(value) if value.isdecimal() else 1

  mpi = count("OMPI_COMM_WORLD_SIZE")
  if mpi > 1 and "OMPI_MCA_orte_hnp_uri" not in env:
    # What jax goes by ended with version 4.
    if ADDRESS not in env:
      raise UserError(
        "Open MPI does not say where process 0 is: add `-x "
        f"{ADDRESS}=HOST:PORT` to mpirun"
      )
    ranks = "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"
    for name in ranks:
      if not env.get(name, "").isdecimal():
        raise UserError(
          f"OMPI_COMM_WORLD_SIZE={mpi} without a number in {name}: mpirun sets "
          "both; unset the first where it did not, or give --no-distributed"
        )
    rank, local_rank = (int(env[name]) for name in ranks)
    address = env[ADDRESS]
    return {
      "coordinator_address": address,
      "num_processes": mpi,
      "process_id": rank,
      "local_device_ids": [local_rank],
      "cluster_detection_method": "deactivate",
      "coordinator_bind_address": bind_address(address, rank, name=ADDRESS),
    }
  several = (
    mpi > 1
    or count("SLURM_STEP_NUM_TASKS") > 1
    or count("MEGASCALE_NUM_SLICES") > 1
    or "," in env.get("TPU_PROCESS_ADDRESSES", "")
    or "," in env.get("TPU_WORKER_HOSTNAMES", "")
    or ADDRESS in env
  )
  return {} if several else None


def _given_address(env: Mapping[str, str]) -> dict[str, Any]:
  """What jax, which finds out the rest, must be told to listen on no other
  address than the one in `JAX_COORDINATOR_ADDRESS`.

  Raises:
    UserError: in process 0, where this is no address of this machine.
  """
  if ADDRESS not in env:
    return {}
  is_mpi = "OMPI_MCA_orte_hnp_uri" in env  # jax asks in this order
  rank = env.get("OMPI_COMM_WORLD_RANK" if is_mpi else "SLURM_PROCID", "")
  nodes = env.get("SLURM_STEP_NUM_NODES", "1")
  bind = bind_address(
    env[ADDRESS],
    int(rank) if rank.isdecimal() else None,
    name=ADDRESS,
    is_far=not is_mpi and nodes != "1",
  )
  return {} if bind is None else {"coordinator_bind_address": bind}


def _join(args: argparse.Namespace) -> None:
  """Joins the other processes of the run, if there are any.

  Raises:
    UserError: nothing says which these are, or process 0 cannot listen.
    RunError: process 0 is not there.
  """
  import jax

  join = jax.distributed.initialize
  if args.peer_timeout is not None:
    join = functools.partial(join, heartbeat_timeout_seconds=args.peer_timeout)
  if args.coordinator is not None:
    bind = bind_address(args.coordinator, args.process_id)
    meet(args.coordinator, args.process_id, bind)
    # Whoever counts processes gets all devices of a host for each: asked for
    # the rest, jax would take one under SLURM, and warn under Kubernetes.
    join(
      coordinator_address=args.coordinator,
      num_processes=args.num_processes,
      process_id=args.process_id,
      cluster_detection_method="deactivate",
      coordinator_bind_address=bind,
    )
  elif args.distributed is not False:
    found = _cluster(os.environ)
    if found is None and not args.distributed:
      return
    found = found or _given_address(os.environ)
    if "coordinator_address" in found:
      bind = found["coordinator_bind_address"]
      meet(found["coordinator_address"], found["process_id"], bind)
    try:
      join(**found)
    except ValueError as error:
      raise UserError(
        f"nothing here says which processes form the run ({one_line(error)}): "
        "give --coordinator, --num_processes and --process_id, or "
        "--no-distributed"
      ) from error


def _start_jax(args: argparse.Namespace, config: ConfigDict) -> None:
  """Sets up the compilation cache and joins the run's other processes.

  Raises:
    RunError: nothing is here of what JAX_PLATFORMS names.
  """
  import jax

  # Libraries that read absl flags refuse to while these are unparsed.
  if not absl_flags.FLAGS.is_parsed():
    absl_flags.FLAGS.mark_as_parsed()
  platforms = os.environ.get("JAX_PLATFORMS", "")
  accelerated = platforms and "cpu" not in platforms.split(",")
  if accelerated:
    # What has to be the same bits everywhere is computed on the host.
    jax.config.update("jax_platforms", f"{platforms},cpu")
  _use_cache(config)
  _join(args)
  if accelerated:
    _check_device(platforms)


def _check_device(platforms: str) -> None:
  import jax

  problem = ""
  try:
    # Without a GPU's device file jax passes over `cuda`, and says nothing.
    if jax.default_backend() == "cpu":
      problem = "there is no such device"
  except RuntimeError as error:
    problem = one_line(error)
  if problem:
    raise RunError(
      f"JAX_PLATFORMS={platforms}: {problem}; look for the driver and the "
      "extra, or name cpu"
    )


def _use_cache(config: ConfigDict) -> None:
  """Keeps compiled programs in the folder that the configuration names."""
  import jax

  cache = config.get("compile_cache", COMPILE_CACHE)
  if cache:
    path = cache if "://" in cache else os.path.expanduser(cache)
    jax.config.update("jax_compilation_cache_dir", path)
    # The default of one second would leave out most of a small model.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
