"""What two real processes tell each other."""

SCRIPT = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from common.parallel import gather_texts, local_mesh

whole = ["eins", "ä" * 100, "zwei\\n", "", "drei"]
assert gather_texts(whole[jax.process_index() :: 2]) == whole
assert gather_texts([]) == []
devices = set(local_mesh().devices.flat)
assert devices == set(jax.local_devices()) and len(devices) == 2
"""


def test_texts_that_were_dealt_out_come_back_in_their_order(run_script_twice):
  run_script_twice(SCRIPT)
