"""`python -m services.kv_index`: one instance of the KV index, the owner or a standby."""

from services.kv_index.process import serve
from services.kv_index.settings import KVIndexSettings
from services.mesh.server import run_process

run_process("kv_index", KVIndexSettings, serve)
