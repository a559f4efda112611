"""`python -m services.router`: one router."""

from services.mesh.server import run_process
from services.router.process import serve
from services.router.settings import RouterSettings

run_process("router", RouterSettings, serve)
