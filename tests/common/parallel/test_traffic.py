"""What programs send, read from lines as the compiler writes them."""

import pytest

from common.parallel.traffic import bytes_sent

LINES = {
  "%a = f32[16,6]{1,0} all-gather(%b), replica_groups={{0,1,2,3},{4,5,6,7}}": {
    "all-gather": 16 * 6 * 4 * 3 / 4
  },
  "%a = bf16[2,6]{1,0} reduce-scatter(%b), replica_groups=[2,4]<=[8]": {
    "reduce-scatter": 2 * 6 * 2 * 3
  },
  "%a = (f32[], pred[7]{0}) all-reduce(%b, %c), replica_groups={{0,1}}": {
    "all-reduce": (4 + 7) * 2 / 2
  },
  "%a = s32[8]{0} all-to-all(%b), replica_groups=mesh['x'=4,'y'=2] {'x'}": {
    "all-to-all": 8 * 4 * 3 / 4
  },
  "%a = s32[8]{0} all-to-all(%b), "
  "replica_groups=mesh['x'=4,'y'=2] {'x':(1)2, 'y'}": {
    "all-to-all": 8 * 4 * 3 / 4
  },
  "%a = s32[8]{0} all-to-all(%b), replica_groups=mesh['x'=4,'y'=2], "
  "device_ids=([2,4]T(1,0)) {'y'}": {"all-to-all": 8 * 4 / 2},
  "ROOT %a = (f32[2]{0}, f32[8]{0}) all-gather-start(%b), "
  "replica_groups=[1,4]<=[4]": {"all-gather": 8 * 4 * 3 / 4},
  "%a = f32[3]{0} all-reduce-start(%b), replica_groups=[1,4]<=[4]": {
    "all-reduce": 2 * 3 * 4 * 3 / 4
  },
  "%a = f32[3]{0} collective-permute(%b), source_target_pairs={{0,1}}": {
    "collective-permute": 12
  },
  "%a = f32[8]{0} all-gather-done(%b)": {},
  "%all-gather = f32[8]{0} add(%b, %c)": {},
}


@pytest.mark.parametrize("line", LINES)
def test_a_line(line):
  assert bytes_sent(line) == LINES[line]


def test_lines_add_up():
  line = "  %a = f32[4]{0} all-gather(%b), replica_groups={{0,1}}\n"
  assert bytes_sent(line * 3) == {"all-gather": 24}


def test_groups_that_cannot_be_read_are_no_guess():
  with pytest.raises(ValueError, match="no groups of devices in '%a = f32"):
    bytes_sent("%a = f32[4]{0} all-gather(%b), replica_groups={}")
