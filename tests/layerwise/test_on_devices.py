"""On eight devices a step layer by layer is that of a single device."""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


def test_fsdp_and_data_parallel_give_the_result_of_a_single_device():
    """In a process of its own, because the number of host devices is fixed when JAX starts."""
    command = [sys.executable, HERE / "layerwise_on_eight_devices.py"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 3
    for row in found.values():
        assert row["gap"] < 1e-5
        assert row["losses"] < 1e-5
    # All leaves but the norm of the head have a side of 16 or 24 behind another axis.
    assert [row["split"] for row in found.values()] == [8, 8, 0]
