"The text of a policy at a size, and run folders from before that text."
import json

import pytest
import torch

from simclr_nb.run.config import RunConfig
from simclr_nb.run.pretrain import run_pretraining
from simclr_nb.views.compiled import compiled_policy
from simclr_nb.views.policy import POLICIES, create_policy


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("size", [8, 16, 20, 33])
def test_no_operator_is_named_that_does_nothing(name, size):
    "The blur of digits had a kernel of one pixel, and repr said that it blurs."
    policy = create_policy(name, size)
    x = torch.rand(64, 3, size, size)
    for o, line in zip(policy.operators, repr(policy).splitlines()[-len(policy.operators):]):
        is_idle = f"does nothing at {size} px" in line
        if "blur" in line and "motion" not in line: assert torch.equal(o(x), x) == is_idle
        else: assert not is_idle
    lines = repr(compiled_policy(policy)).splitlines()
    assert sorted(lines[1:]) == sorted(repr(policy).splitlines()[1:])


def test_a_run_from_before_the_note_goes_on(tmp_path):
    config = dict(epochs=1, n_train=64, n_valid=32, bs=32, width=0.125, precision="fp32")
    config = RunConfig(out=str(tmp_path / "run"), **config)
    run_pretraining(config)
    path = tmp_path / "run" / "config.json"
    saved = json.loads(path.read_text())
    note = " (does nothing at 16 px: a kernel of 1 px)"
    assert note in saved["policy"]
    path.write_text(json.dumps(saved | dict(policy=saved["policy"].replace(note, ""))))
    config.resume = True
    assert run_pretraining(config).results  # finished: read, and not refused
    path.write_text(json.dumps(saved | dict(policy=saved["policy"].replace("40%", "30%"))))
    with pytest.raises(ValueError, match="other settings .*policy"): run_pretraining(config)
