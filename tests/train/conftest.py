import pytest
import tiny


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A small random model, as a directory that tests only read."""
    return tiny.save_base(tmp_path_factory.mktemp("base"))
