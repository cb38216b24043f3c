"""What two real processes tell each other."""

SCRIPT = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from common.parallel import gather_texts, local_mesh

mine = [["eins", "zwei\\n", ""], ["ä" * 100]][jax.process_index()]
assert gather_texts(mine) == [["eins", "zwei\\n", ""], ["ä" * 100]]
assert gather_texts([]) == [[], []]
devices = set(local_mesh().devices.flat)
assert devices == set(jax.local_devices()) and len(devices) == 2
"""


def test_every_process_gets_the_texts_of_all(run_script_twice):
  run_script_twice(SCRIPT)
