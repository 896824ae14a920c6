"""Cache folders for compiled code: the usual ones of numba, Triton and torch.compile, or a private temporary folder if those are not
writable.

A container's user may have no home folder and a read-only installation, a quota may be full, a crash may have truncated a cached
file. None of these should end a run: a warning is logged and the code is compiled again.
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
    """Returns a folder in the system's temporary folder that only this user can write to, creating it if needed, or None."""
    # Cached files are executed as code, so a folder of that name created by another user is not used.
    try:
        folder = Path(tempfile.gettempdir(), f"fastbyol-cache-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        # lstat, because a link planted by another user must not be followed.
        found = folder.lstat()
    except OSError:
        return None
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if ours and can_write(folder) else None


def can_write(folder: Path) -> bool:
    """Returns True if a file can be created in the folder, which is created if needed."""
    return not why_not_writable(folder)


def why_not_writable(folder: Path) -> str:
    """Returns the system's reason why no file can be created in the folder, which is created if needed; '' if one can."""
    # Tried, because os.access allows root to write on a read-only file system.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def njit(*signature: Any, cache: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba.njit, except that `cache=True` does not require a writable folder or an undamaged cache."""
    import numba

    def compiled(function: Callable[..., Any]) -> Any:
        kernel: Any = numba.njit(**options)(function)
        if kernel is function:  # NUMBA_DISABLE_JIT
            return function
        if cache and (found := _numba_cache(function)):
            # What numba.njit(cache=True) does too (Dispatcher.enable_caching), with its own class of cache.
            kernel._cache = found
        if signature:
            kernel.compile(*signature)
            kernel.disable_compile()
        return kernel

    return compiled


def _numba_cache(function: Callable[..., Any]) -> Any:
    import numba

    if os.path.expanduser("~").startswith("~") and (folder := private_folder()):
        os.environ.setdefault("XDG_CACHE_HOME", str(folder))  # numba would create a folder named '~' in the current one
    cache_class = _forgiving_cache()
    try:
        return cache_class(function)
    except RuntimeError:  # 'no locator available': none of numba's folders is writable
        folder = private_folder()
    if folder is None:
        _say_once("numba finds no writable cache folder, not even a temporary one: each start compiles again; set NUMBA_CACHE_DIR")
        return None
    settings: Any = numba.config
    settings.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"] = str(folder / "numba")  # the environment variable is for child processes
    _say_once(f"numba finds no writable cache folder: using {folder}; set NUMBA_CACHE_DIR to choose another one")
    with suppress(RuntimeError):
        return cache_class(function)
    return None


@cache
def _forgiving_cache() -> Any:
    from numba.core.caching import FunctionCache

    class ForgivingCache(FunctionCache):
        """numba's function cache, except that a damaged file or a full disk costs a compilation instead of the run."""

        def load_overload(self, sig: Any, target_context: Any) -> Any:
            try:
                return super().load_overload(sig, target_context)
            except Exception as error:  # unpickling a truncated file may raise anything
                log.debug("numba's cache in %s: not readable (%r)", self.cache_path, error)
                # Empty the cache, or the damaged file would be found again at each start.
                with suppress(OSError):
                    self.flush()
                return None

        def save_overload(self, sig: Any, data: Any) -> None:
            try:
                super().save_overload(sig, data)
            except OSError as error:
                _say_once(f"numba's cache in {self.cache_path} cannot be written ({error.strerror}): the next start compiles again")

    return ForgivingCache


@cache
def _say_once(text: str) -> None:
    log.warning(text)


def give_triton_a_cache() -> None:
    """Points Triton at the private folder if its own, in the home folder, is not writable."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    if "TRITON_CACHE_DIR" in os.environ or (not home.startswith("~") and can_write(Path(home, ".triton", "cache"))):
        return
    if folder := private_folder():
        os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")


def give_inductor_a_cache() -> None:
    """Points torch.compile at the private folder if its own, a temporary one named after the user, is not writable."""
    from torch._inductor.runtime.runtime_utils import cache_dir

    with suppress(OSError):
        if can_write(Path(cache_dir())):
            return
    if folder := private_folder():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
