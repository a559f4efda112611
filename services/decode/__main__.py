"""`python -m services.decode`: one decode worker."""

from services.decode.process import serve
from services.mesh.server import run_process
from services.worker.settings import WorkerSettings

run_process("decode", WorkerSettings, serve)
