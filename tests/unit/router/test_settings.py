"""Settings of a router: what cannot work is refused at the start."""

import pytest

from services.core.errors import ConfigurationError
from services.mesh.config import load_settings
from services.router.settings import NO_HTTP, RouterSettings

WORKERS = {"BATON_WORKERS": "decode=127.0.0.1:1"}


def test_settings_when_nothing_is_said_of_http_then_it_is_served() -> None:
    assert load_settings(RouterSettings, WORKERS).http_listen == "127.0.0.1:8000"
    assert load_settings(RouterSettings, {**WORKERS, "BATON_HTTP_LISTEN": "off"}).http_listen == NO_HTTP


@pytest.mark.parametrize(
    ("name", "text"),
    [("HTTP_LISTEN", "8000"), ("HTTP_LISTEN", "host:http"), ("LISTEN", "off"), ("MAX_IN_FLIGHT", "0"), ("TTFT_SLO_S", "-1")],
)
def test_settings_when_one_cannot_work_then_it_is_named(name: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"BATON_{name}"):
        load_settings(RouterSettings, {**WORKERS, f"BATON_{name}": text})
