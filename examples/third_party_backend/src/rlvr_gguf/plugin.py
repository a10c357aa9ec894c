"""The entry point. Light, since listings import it: what is heavy is imported when the backend is asked for."""

from importlib.util import find_spec

from rlvr import hookimpl


@hookimpl
def rlvr_backend():
    from rlvr_gguf.backend import GGUFBackend

    return GGUFBackend()


@hookimpl
def rlvr_backend_availability():
    return None if find_spec("gguf") else "gguf not installed. Install with: pip install gguf"
