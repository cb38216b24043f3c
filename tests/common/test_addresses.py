"""The coordinator of several processes listens where it was told to."""

import logging
import socket
import time

import pytest

from common import addresses
from common.addresses import bind_address, meet
from common.errors import RunError

ELSEWHERE = "203.0.113.7"  # is for documentation: no machine has it


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_process_0_listens_on_the_address_given(host, caplog):
  assert bind_address(f"{host}:1234", 0) == f"{host}:1234"
  assert not caplog.records


def test_the_other_processes_listen_on_nothing():
  assert bind_address(f"{ELSEWHERE}:1234", 1) is None


def test_another_machines_address_is_refused(one_line):
  line = one_line(bind_address, f"{ELSEWHERE}:1234", 0)
  assert line == (
    f"--coordinator={ELSEWHERE}:1234 is no address of this machine, where "
    "process 0 would listen: name one, or all of them with "
    "JAX_COORDINATOR_BIND_ADDRESS='[::]:1234' in its environment"
  )


def test_that_variable_stays_in_force(monkeypatch):
  monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "[::]:1234")
  assert bind_address(f"{ELSEWHERE}:1234", 0) is None


@pytest.mark.parametrize(
  "text", ["node1", "node1:", ":1234", "node1:http", "node1:0", "node1:65536"]
)
@pytest.mark.parametrize("process", [0, 1])
def test_what_is_no_host_and_port(one_line, text, process):
  line = one_line(bind_address, text, process)
  assert line.startswith(f"--coordinator={text}: give HOST:PORT, such as ")


@pytest.fixture
def names(monkeypatch):
  """What the network says of names: their addresses, or None."""
  answers = []

  def answer(host, port, **settings):
    del port, settings
    found = answers.pop(0)
    if found is None:
      raise socket.gaierror(-3, "Temporary failure in name resolution")
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (found, 0))]

  monkeypatch.setattr(socket, "getaddrinfo", answer)
  monkeypatch.setattr(addresses, "_PAUSE_SECONDS", 0)
  return answers


def test_a_name_may_become_known_a_while_later(names):
  names += [None, None, "127.0.0.1"]
  assert bind_address("node1:1234", 0) == "node1:1234"
  assert not names


def test_a_name_that_stays_unknown(one_line, names, monkeypatch):
  monkeypatch.setattr(addresses, "_PATIENCE_SECONDS", -1)
  names += [None]
  line = one_line(bind_address, "node1:1234", 0)
  assert line.startswith("--coordinator=node1:1234: node1 is unknown here: ")


def test_a_name_that_only_this_machine_can_reach(names, caplog):
  """As Debian's /etc/hosts gives a machine's own name."""
  names += ["127.0.1.1"]
  with caplog.at_level(logging.WARNING):
    assert bind_address("node1:1234", 0) == "node1:1234"
  (record,) = caplog.records
  assert record.getMessage().startswith(
    "process 0 listens on 127.0.1.1 alone, which is what node1 means here"
  )


def test_a_name_that_only_this_machine_can_reach_is_of_no_use_to_others(
  names, caplog
):
  names += ["127.0.1.1"]
  with caplog.at_level(logging.WARNING):
    assert bind_address("node1:1234", 0, is_far=True) is None
  (record,) = caplog.records
  assert record.getMessage().startswith(
    "process 0 listens on all addresses, for node1 means 127.0.1.1 here: name "
  )


# The first means something else to other machines.
@pytest.mark.parametrize("found", ["127.0.0.1", ELSEWHERE, None])
def test_who_may_be_process_0_neither_waits_nor_refuses(names, caplog, found):
  names += [found]
  assert bind_address("node1:1234", None) is None
  assert not caplog.records


def test_who_may_be_process_0_listens_on_the_address_given():
  assert bind_address("127.0.0.1:1234", None) == "127.0.0.1:1234"


@pytest.fixture
def server():
  """A socket that listens."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    yield server


def address_of(server):
  return f"127.0.0.1:{server.getsockname()[1]}"


def test_a_port_that_is_taken_is_refused_by_process_0(
  server, one_line, monkeypatch
):
  monkeypatch.setattr(addresses, "_TAKEN_SECONDS", -1)
  address = address_of(server)
  port = address.partition(":")[2]
  for bind in (address, None):  # and every address of the machine
    line = one_line(meet, address, 0, bind)
    assert f"port {port} of coordinator {address} is taken here" in line
  server.close()
  meet(address, 0, address)


def test_what_an_earlier_start_has_left_may_end(server, monkeypatch):
  address = address_of(server)
  monkeypatch.setattr(time, "sleep", lambda seconds: server.close())
  meet(address, 0, address)
  assert server.fileno() == -1


def test_process_0_may_come_later(server, monkeypatch):
  address, begun = address_of(server), []
  server.close()

  def sleep(seconds):
    place = ("127.0.0.1", int(address.partition(":")[2]))
    begun.append(socket.create_server(place))

  monkeypatch.setattr(time, "sleep", sleep)
  meet(address, 1)
  begun.pop().close()
  monkeypatch.setattr(addresses, "_ABSENT_SECONDS", -1)
  with pytest.raises(RunError, match=f"{address} does not answer"):
    meet(address, 1)


TWO = """
import os, pathlib, sys
import jax
jax.config.update("jax_platforms", "cpu")
from common.addresses import bind_address

address, number = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(
  address, 2, number, coordinator_bind_address=bind_address(address, number)
)
from jax.experimental import multihost_utils

multihost_utils.sync_global_devices("both are there")
own = {os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
       if os.path.islink(f"/proc/self/fd/{n}")}
listening = []
for table in ("tcp", "tcp6"):
  lines = pathlib.Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]
  for line in map(str.split, lines):
    if line[3] == "0A" and f"socket:[{line[9]}]" in own:
      listening.append(line[1].split(":"))
port = f"{int(address.rpartition(':')[2]):04X}"
hosts = [host for host, own_port in listening if own_port == port]
# 127.0.0.1, also as IPv6 writes it.
loopback = ("0100007F", "0000000000000000FFFF00000100007F")
assert len(hosts) == (number == 0), listening
assert all(host in loopback for host in hosts), listening
# The other one is of the collectives, on what the machine's name stands for.
assert len(listening) <= 1 + len(hosts), listening
multihost_utils.sync_global_devices("both have looked")
"""


def test_of_two_processes_one_listens_for_the_other(run_script_twice):
  run_script_twice(TWO)
