"""The KV data plane's door: blocks go from one worker's pool into another's, by the best transport that both have.

    decode worker (receiver)                                   prefill worker (sender)
    transfer = receiver.grant(block_ids)
        transfer_id, block_ids, receiver.endpoint ── PrefillRequest ──▶ transfer = await sender.open(transfer_id, endpoint, block_ids)
                                                               for chunk in prefill:
    blocks land while later chunks are computed ◀──────────────────  for block in await transfer.send(pairs): yield it   (grpc only)
    await transfer.wait_landed()                                await transfer.finish()
    … or, on any other way out: await transfer.fence(timeout_s)     … or: await transfer.stop(timeout_s)

    kv_memory     the pool, and the peer's pool mapped
    kv_wire       what is said on a connection: hello and frames
    kv_channel    how one block crosses: both halves of tcp and of shm
    kv_incoming   the receiver's transfers: granted, open, closing, closed       kv_receiver   its listeners and connections
    kv_outgoing   the sender's transfers, and the threads that send              kv_sender     its choice of transport

The transports differ in who writes, and so in what fences. Over tcp and grpc the receiver writes into its own pool and can simply stop.
Over shm the sender writes: it is out when it has said STOPPED, or when its end of the socket is closed, which the kernel does for a dead
process after its last instruction. A sender that is frozen is neither: its blocks stay in quarantine.

A peer needs the endpoint's access key; over shm it must be the same user, too. What an authenticated tcp peer sends lands inside its grant
or not at all; an authenticated shm peer has the whole pool mapped and is trusted to keep to its grant.
"""

from services.mesh.kv_incoming import IncomingTransfer
from services.mesh.kv_memory import KVMemory, KVRegion
from services.mesh.kv_outgoing import InlineBlock
from services.mesh.kv_receiver import KVReceiver
from services.mesh.kv_sender import KVSender, OutgoingTransfer
from services.mesh.kv_wire import TRANSPORTS, KVEndpoint

__all__ = [
    "TRANSPORTS",
    "IncomingTransfer",
    "InlineBlock",
    "KVEndpoint",
    "KVMemory",
    "KVReceiver",
    "KVRegion",
    "KVSender",
    "OutgoingTransfer",
]
