"""Properties: what must hold for every input. Hypothesis looks for an input that breaks them.

    python exercises/properties.py 01       tries property_01 on 01_vq.py

A property is a function of a chapter (the module). It raises an AssertionError if the chapter
violates it. It is graded by accepting the reference solution and noticing the wrong ones.
"""
import sys
from importlib import import_module
from pathlib import Path

import torch
from hypothesis import given, settings, strategies as st

ROOT = Path(__file__).resolve().parent.parent

sizes, seeds = st.integers(1, 5), st.integers(0, 10_000)
check = settings(max_examples=50, deadline=None, derandomize=True, database=None)


def main(number):
    sys.path.insert(0, str(ROOT))
    chapter = import_module(next(ROOT.glob(f"{number}_*.py")).stem)
    globals()[f"property_{number}"](chapter)
    print(f"property_{number} holds")


if __name__ == "__main__":
    main(sys.argv[1])
