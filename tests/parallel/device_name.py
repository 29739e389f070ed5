"""The device name that MindSpore's context holds, read and replaced where it lies. For these tests only.

A CPU wheel contains the parallel compiler and does not enter it on a CPU. The name is a ``std::string`` of the old,
reference-counted kind in a library that exports how to reach it; this depends on the wheel (written for 2.10), so
whoever uses it must skip when :func:`read` does not say ``CPU``.
"""

import ctypes
from pathlib import Path

import mindspore as ms
from mindspore._c_expression import ms_ctx_param

# Before the characters: length and capacity of a word each, and a count of references.
_LENGTH, _CAPACITY, _REFERENCES, _HEAD = 0, 8, 16, 24
_MANY_REFERENCES = 1 << 20  # so that nobody frees it
_strings = {}  # kept for as long as the process: others may hold on to them


def _location():
    library = ctypes.CDLL(str(Path(ms.__file__).parent / "lib" / "libmindspore_core.so"))
    context_of = library["_ZN9mindspore9MsContext11GetInstanceEv"]
    context_of.argtypes, context_of.restype = [ctypes.c_void_p], ctypes.c_void_p
    value_of = library["_ZNK9mindspore9MsContext9get_paramISsEERKT_NS_10MsCtxParamE"]
    value_of.argtypes, value_of.restype = [ctypes.c_void_p, ctypes.c_int], ctypes.c_void_p
    shared_pointer = (ctypes.c_void_p * 2)()
    context_of(ctypes.byref(shared_pointer))
    return ctypes.cast(value_of(shared_pointer[0], ms_ctx_param.device_target.value), ctypes.POINTER(ctypes.c_void_p))


def read() -> str:
    """The name, or why it cannot be read."""
    try:
        characters = _location()[0]
    except (OSError, AttributeError) as problem:
        return str(problem)
    length = ctypes.c_size_t.from_address(characters - _HEAD + _LENGTH).value
    return ctypes.string_at(characters, length).decode(errors="replace") if length < 32 else "no short string"


def write(name: str) -> None:
    """Replace it."""
    if name not in _strings:
        text = name.encode()
        block = ctypes.create_string_buffer(_HEAD + len(text) + 1)
        start = ctypes.addressof(block)
        ctypes.c_size_t.from_address(start + _LENGTH).value = len(text)
        ctypes.c_size_t.from_address(start + _CAPACITY).value = len(text)
        ctypes.c_int.from_address(start + _REFERENCES).value = _MANY_REFERENCES
        ctypes.memmove(start + _HEAD, text + b"\0", len(text) + 1)
        _strings[name] = block
    _location()[0] = ctypes.addressof(_strings[name]) + _HEAD
