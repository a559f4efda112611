"""Copies blocks into another process's pool past the caches of this one's core.

An ordinary store first reads the line that it overwrites, a third of all that a copy moves. The C library knows that, too, but only for
copies of many MiB: on an AMD EPYC it copies blocks of 256 KiB at 9 GB/s, 512 MiB at once at 16, and this does either at 16. Neither
NumPy nor PyTorch offers it, hence a few lines for LLVM, which Numba brings along.
"""

import ctypes
import functools
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_LINE = 64  # bytes: a cache line of x86, and of most ARM

_DECLARATION, _FENCE = "", "fence seq_cst"
if platform.machine() == "x86_64":  # where these stores are ordered by an instruction of their own
    _DECLARATION, _FENCE = "declare void @llvm.x86.sse.sfence()", "call void @llvm.x86.sse.sfence()"

_COPY = f"""
{_DECLARATION}
define void @copy(ptr %target, ptr %source, ptr %moves, i64 %num_moves) {{
entry:
  br label %move
move:
  %m = phi i64 [ 0, %entry ], [ %next_m, %moved ]
  %target_field = getelementptr [3 x i64], ptr %moves, i64 %m, i64 0
  %source_field = getelementptr [3 x i64], ptr %moves, i64 %m, i64 1
  %size_field = getelementptr [3 x i64], ptr %moves, i64 %m, i64 2
  %target_start = load i64, ptr %target_field
  %source_start = load i64, ptr %source_field
  %size = load i64, ptr %size_field
  %to = getelementptr i8, ptr %target, i64 %target_start
  %from = getelementptr i8, ptr %source, i64 %source_start
  br label %line
line:
  %at = phi i64 [ 0, %move ], [ %next_at, %line ]
  %to_line = getelementptr i8, ptr %to, i64 %at
  %from_line = getelementptr i8, ptr %from, i64 %at
  %bytes = load <{_LINE} x i8>, ptr %from_line, align 1
  store <{_LINE} x i8> %bytes, ptr %to_line, align {_LINE}, !nontemporal !0
  %next_at = add i64 %at, {_LINE}
  %has_more = icmp ult i64 %next_at, %size
  br i1 %has_more, label %line, label %moved
moved:
  %next_m = add i64 %m, 1
  %has_moves = icmp ult i64 %next_m, %num_moves
  br i1 %has_moves, label %move, label %done
done:
  {_FENCE}
  ret void
}}
!0 = !{{ i32 1 }}
"""


def copy_past_caches(target: npt.NDArray[np.uint8], source: npt.NDArray[np.uint8], moves: Sequence[tuple[int, int, int]]) -> None:
    """Copies between two pools, [bytes] each, for each move (first byte in `target`, first byte in `source`, number of bytes). No two
    may write the same bytes.

    They are there, for all threads and processes, when it returns. Gives the GIL away once for all moves of whole lines, as those of blocks
    are with few exceptions. Raises ValueError for what is outside of a pool.
    """
    target_address, source_address = (pool.__array_interface__["data"][0] for pool in (target, source))
    whole_lines = []
    for to, at, size in moves:
        if not (0 <= to <= len(target) - size and 0 <= at <= len(source) - size and size >= 0):
            raise ValueError(f"{size} bytes from {at} of {len(source)} to {to} of {len(target)}")
        if size and size % _LINE == 0 == (target_address + to) % _LINE:
            whole_lines.append((to, at, size))
        else:
            np.copyto(target[to : to + size], source[at : at + size])
    if whole_lines:
        rows = np.array(whole_lines, np.int64)
        compiled().copy(target_address, source_address, rows.__array_interface__["data"][0], len(rows))


@functools.cache
def compiled() -> "_Compiled":
    """Takes 50 ms the first time: whoever will copy calls it before."""
    return _Compiled()


class _Compiled:
    """Machine code for this processor; `assembly` for people and tests."""

    def __init__(self) -> None:
        import llvmlite.binding as llvm  # not where nothing is copied

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(),
            features=llvm.get_host_cpu_features().flatten(),  # a virtual machine may lack some of those that its processor has
            opt=2,
        )
        module = llvm.parse_assembly(_COPY)
        self.assembly: str = machine.emit_assembly(module)
        self._engine = llvm.create_mcjit_compiler(module, machine)  # owns the code
        self._engine.finalize_object()
        function_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        self.copy: Any = function_type(self._engine.get_function_address("copy"))
