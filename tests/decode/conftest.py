"""What tests of decoding share."""

import pytest
from decode_model import MODEL, draw_params


@pytest.fixture(scope="module")
def params():
    """Parameters of MODEL."""
    return draw_params(MODEL, 2)
