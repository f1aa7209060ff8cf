import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def poisoned_under_the_interpreter():
    """Triton's interpreter is slow: there torch.empty gives NaN in every test, not in one more."""
    from dfm_fast._library import INTERPRET

    torch.use_deterministic_algorithms(INTERPRET, warn_only=True)
