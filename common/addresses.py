"""Where process 0 of a run listens for the others: on the address it was given.

jax itself would listen on every address of the machine, and where it cannot
listen, or hears nobody, it ends the process with a stack of C++.
"""

import errno
import ipaddress
import logging
import os
import socket
import time
from typing import Any

from common.errors import RunError, UserError

log = logging.getLogger(__name__)

# jax reads them too; the second stays in force.
ADDRESS = "JAX_COORDINATOR_ADDRESS"
BIND = "JAX_COORDINATOR_BIND_ADDRESS"
# A cluster may know the name of a machine some time after the machine starts.
_PATIENCE_SECONDS, _PAUSE_SECONDS = 60, 1
# The others may start much earlier than process 0; jax waits as long.
_ABSENT_SECONDS, _KNOCK_SECONDS = 300, 0.5
# What an earlier start of the run has left may still be on its way out.
_TAKEN_SECONDS = 10


def bind_address(
  coordinator: str,
  process_id: int | None,
  *,
  name: str = "--coordinator",
  is_far: bool = False,
) -> str | None:
  """What jax is told to listen on; None leaves it to jax.

  Args:
    coordinator: HOST:PORT, as every process is given it.
    process_id: of this process; only process 0 listens. None where jax alone
      can tell: it may be process 0 where the host is this machine.
    name: of the flag or variable that gave the address, for errors.
    is_far: whether other machines take part, which may know a name that is a
      loopback address here: jax is to listen on all then.

  Raises:
    UserError: for what is no HOST:PORT; in process 0 also for a host that this
      machine is not.
  """
  given = f"{name}={coordinator}"
  host, port = _parts(coordinator, name)
  if process_id or BIND in os.environ:
    return None
  if process_id is None:
    own = _own(host)
    is_known = bool(own) and not _is_alias(host, own)
    return coordinator if is_known else None
  own = [found for found in _resolve(host, given) if _is_own(found)]
  if not own:
    raise UserError(
      f"{given} is no address of this machine, where "
      "process 0 would listen: name one, or all of them with "
      f"{BIND}='[::]:{port}' in its environment"
    )
  if not _is_alias(host, own):
    return coordinator
  if is_far:
    log.warning(
      "process 0 listens on all addresses, for %s means %s here: name one with "
      "%s in its environment", host, own[0], BIND,
    )  # fmt: skip
    return None
  log.warning(
    "process 0 listens on %s alone, which is what %s means here: processes "
    "on other machines need an address that they can reach",
    own[0], host,
  )  # fmt: skip
  return coordinator


def _parts(coordinator: str, name: str = "--coordinator") -> tuple[str, int]:
  """Host and port; `name` is what the address was given as."""
  host, _, port = coordinator.rpartition(":")
  host = host.removeprefix("[").removesuffix("]")
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise UserError(
      f"{name}={coordinator}: give HOST:PORT, such as 10.0.0.1:1234"
    )
  return host, int(port)


def meet(coordinator: str, process_id: int, bind: str | None = None) -> None:
  """Returns when process 0 could listen, and when others reach who listens.

  Args:
    coordinator: HOST:PORT, as every process is given it.
    process_id: of this process.
    bind: what process 0 listens on, if not on what its environment or jax says.

  Raises:
    UserError: in process 0, for a port that is taken.
    RunError: in others, where nobody listens for five minutes.
  """
  if process_id:
    _find(coordinator)
    return
  _, port = _parts(coordinator)
  host, port = _parts(bind or os.environ.get(BIND) or f"[::]:{port}")
  end = time.monotonic() + _TAKEN_SECONDS
  while _is_taken(host, port):
    if time.monotonic() > end:
      raise UserError(
        f"port {port} of coordinator {coordinator} is taken here, by another "
        "run or program: choose another one, the same for all processes"
      )
    time.sleep(_PAUSE_SECONDS)


def _find(coordinator: str) -> None:
  place, end = _parts(coordinator), time.monotonic() + _ABSENT_SECONDS
  while True:
    try:
      socket.create_connection(place, timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() > end:
        raise RunError(
          f"coordinator {coordinator} does not answer "
          f"({error.strerror or error}): has process 0 started, and can this "
          "machine reach it?"
        ) from None
    time.sleep(_KNOCK_SECONDS)


def _is_taken(host: str, port: int) -> bool:
  """Whether somebody listens there already."""
  try:
    *kind, _, address = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(*kind) as probe:
      # As jax does: connections that have ended do not count.
      probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      probe.bind(address)
  except OSError as error:
    # What else is wrong, such as a machine without IPv6, jax knows to handle.
    return error.errno == errno.EADDRINUSE
  return False


def _resolve(host: str, given: str) -> list[str]:
  """A host's numeric addresses; `given` says where its name comes from."""
  end = time.monotonic() + _PATIENCE_SECONDS
  while True:
    try:
      found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
      return _numbers(found)
    except OSError as error:
      if time.monotonic() > end:
        raise UserError(f"{given}: {host} is unknown here: {error}") from None
    time.sleep(_PAUSE_SECONDS)


def _is_own(address: str) -> bool:
  """Whether this machine has an address."""
  is_new = ":" in address
  family = socket.AF_INET6 if is_new else socket.AF_INET
  try:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
      probe.bind((address, 0))
  except OSError:
    return False
  return True


def _own(host: str) -> list[str]:
  """Those of a host's addresses that this machine has, as known by now."""
  try:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
  except OSError:
    return []
  return [address for address in _numbers(found) if _is_own(address)]


def _numbers(found: list[Any]) -> list[str]:
  return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _is_alias(host: str, addresses: list[str]) -> bool:
  """Whether a host's name hides that these are loopback addresses."""
  is_plain = host == "localhost" or _is_loopback([host])
  return _is_loopback(addresses) and not is_plain


def _is_loopback(addresses: list[str]) -> bool:
  try:
    return all(ipaddress.ip_address(own).is_loopback for own in addresses)
  except ValueError:  # a name
    return False
