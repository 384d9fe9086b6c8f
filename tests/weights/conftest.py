from __future__ import annotations

import numpy as np
import pytest

from mega_tvm.weights import WeightsError, load_checkpoint


@pytest.fixture
def load_bytes(tmp_path):
    """Load a file of these bytes and this suffix."""

    def load(content, suffix, **kwargs):
        path = tmp_path / f"model{suffix}"
        path.write_bytes(content)
        return load_checkpoint(path, **kwargs)

    return load


@pytest.fixture
def refuses(load_bytes, tmp_path):
    """Check that loading raises a `WeightsError` that names the file and holds these words."""

    def check(content, suffix, *words, **kwargs):
        with pytest.raises(WeightsError) as info:
            load_bytes(content, suffix, **kwargs)
        message = str(info.value)
        assert message.startswith(str(tmp_path / f"model{suffix}: "))
        for word in words:
            assert word in message, message
        return message

    return check


@pytest.fixture
def same_bits():
    """Check that two models' parameters have the same names, shapes, dtypes and bits."""

    def check(found, expected):
        assert set(found) == set(expected)
        for name, array in expected.items():
            assert found[name].dtype == np.float32
            assert found[name].flags.c_contiguous
            assert found[name].shape == array.shape, name
            assert found[name].tobytes() == np.ascontiguousarray(array).tobytes(), name

    return check
