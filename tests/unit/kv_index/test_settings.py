"""Settings of the index: what cannot work is refused at the start."""

import pytest

from services.core.errors import ConfigurationError
from services.kv_index.settings import KVIndexSettings
from services.mesh.config import load_settings


def test_settings_when_nothing_is_set_then_the_index_lives_in_memory() -> None:
    settings = load_settings(KVIndexSettings, {})
    assert settings.redis_url is None
    assert settings.namespace == "default"


@pytest.mark.parametrize(
    ("name", "text"),
    [("LEASE_S", "1.9"), ("WATCH_BUFFER_BYTES", "1000"), ("NAMESPACE", "a{b"), ("LISTEN", "nowhere"), ("LEASE", "10")],
)
def test_settings_when_one_cannot_work_then_it_is_named(name: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"(?i){name}"):
        load_settings(KVIndexSettings, {f"BATON_{name}": text})
