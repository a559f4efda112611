"""`python -m services.prefill`: one prefill worker."""

from services.mesh.server import run_process
from services.prefill.process import serve
from services.worker.settings import WorkerSettings

run_process("prefill", WorkerSettings, serve)
