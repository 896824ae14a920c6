"""Where compiled code is kept: the usual places of numba, Triton and torch.compile, or a private temporary folder where they cannot be written.

A container's user may have no home and a read-only installation; a quota may be full, and a cache cut short by a crash. None of it is worth
more than a line: what cannot be kept is compiled again.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

log = logging.getLogger("fastbyol")


@cache
def private_folder() -> Path | None:
    """Returns a folder under the system's temporary one that this user alone can write, made if need be, or None.

    What is cached is run as code, so a folder that somebody else has put there under its name is not used.
    """
    try:
        folder = Path(tempfile.gettempdir(), f"fastbyol-cache-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if ours and can_write(folder) else None


def can_write(folder: Path) -> bool:
    """Tells whether a file can be made in the folder, which is made if need be. A try is the only test that a read-only file system passes rightly."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def njit(*signature: Any, cache: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba.njit, but with `cache=True` a place for the cache, and a cache that can be read and written, are not needed."""
    import numba

    def compiled(function: Callable[..., Any]) -> Any:
        kernel: Any = numba.njit(**options)(function)
        if kernel is function:  # NUMBA_DISABLE_JIT
            return function
        if cache and (found := _numba_cache(function)):
            kernel._cache = found
        if signature:
            kernel.compile(*signature)
            kernel.disable_compile()
        return kernel

    return compiled


def _numba_cache(function: Callable[..., Any]) -> Any:
    import numba

    if os.path.expanduser("~").startswith("~") and (folder := private_folder()):
        os.environ.setdefault("XDG_CACHE_HOME", str(folder))  # numba would make a folder named '~' where we are
    cache_class = _forgiving_cache()
    try:
        return cache_class(function)
    except RuntimeError:  # 'no locator available': no folder of numba's choice can be written
        folder = private_folder()
    if folder is None:
        _say_once("numba finds no folder for its cache, and there is no temporary one: each start compiles anew; set NUMBA_CACHE_DIR")
        return None
    settings: Any = numba.config
    settings.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"] = str(folder / "numba")  # the latter for the processes that we start
    _say_once(f"numba finds no folder for its cache: it is in {folder} now; set NUMBA_CACHE_DIR to have it elsewhere")
    with suppress(RuntimeError):
        return cache_class(function)
    return None


@cache
def _forgiving_cache() -> Any:
    from numba.core.caching import FunctionCache

    class ForgivingCache(FunctionCache):
        """numba's cache of a function, whose damage or lack of room costs a compilation and not the run."""

        def load_overload(self, sig: Any, target_context: Any) -> Any:
            try:
                return super().load_overload(sig, target_context)
            except Exception as error:  # a file cut short: whatever unpickling may raise
                log.debug("numba's cache in %s: not readable (%r)", self.cache_path, error)
                with suppress(OSError):
                    self.flush()
                return None

        def save_overload(self, sig: Any, data: Any) -> None:
            try:
                super().save_overload(sig, data)
            except OSError as error:
                _say_once(f"numba's cache in {self.cache_path} cannot be written ({error.strerror}): the next start compiles anew")

    return ForgivingCache


@cache
def _say_once(text: str) -> None:
    log.warning(text)


def give_triton_a_cache() -> None:
    """Points Triton at the private folder where its own, in the home folder, cannot be written."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    if "TRITON_CACHE_DIR" in os.environ or (not home.startswith("~") and can_write(Path(home, ".triton", "cache"))):
        return
    if folder := private_folder():
        os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")


def give_inductor_a_cache() -> None:
    """Points torch.compile at the private folder where its own, a temporary one by the user's name, cannot be written."""
    from torch._inductor.runtime.runtime_utils import cache_dir

    with suppress(OSError):
        if can_write(Path(cache_dir())):
            return
    if folder := private_folder():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
