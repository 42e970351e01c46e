"""Put the repository root on the path and make Hypothesis repeatable."""
import os
import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(min(2, os.cpu_count() or 1))

# The same examples on every run: a red test must be red for everybody.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=25,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")
