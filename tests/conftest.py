import os
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


@pytest.fixture(scope="session", autouse=True)
def float32_is_float32():
    """torch lets cuDNN convolve float32 in TF32 unless told otherwise; our kernels do likewise."""
    torch.backends.cudnn.allow_tf32 = False


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish():
    """A fault on a GPU spoils its process for every test that follows: under xdist another one
    takes over."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
