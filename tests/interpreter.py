"""Triton's interpreter beside today's numpy."""

import os


def repair() -> None:
    """Triton 3.6's interpreter keeps a scalar as an array of one element and takes int() of it for
    `range`, which numpy 2.4 refuses: no loop over a kernel's arguments would run. Triton's own
    remedy, from 3.7 on, is the same. Compiled kernels are not concerned."""
    if os.environ["TRITON_INTERPRET"] != "1":
        return
    try:
        from triton.runtime import interpreter
    except ImportError:  # torch's CPU build comes without Triton
        return
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_with_index
