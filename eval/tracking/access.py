"""Whether and how W&B can be reached: the mode of a run, the API key, and folders that may be written to."""

import netrc
import os
from pathlib import Path
from urllib.parse import urlparse

# W&B's own server: its address since wandb 0.31, and the one under which older logins stored their key.
HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")


def resolve_mode(mode: str) -> str:
    """One of "online", "offline", "disabled"."""
    if mode != "auto":
        return mode
    wish = os.environ.get("WANDB_MODE", "").lower()
    if wish in ("disabled", "offline", "online"):
        return wish
    if wish == "dryrun":  # the old name
        return "offline"
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether W&B can log in without asking: on a terminal it would ask, and wait."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "")).hostname
    hosts = HOSTS if host in (None, *HOSTS) else (host,)
    file = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        found = netrc.netrc(str(file))
        return any(found.authenticators(name) is not None for name in hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def keep_below(output: Path) -> None:
    """Give W&B folders it may write: by default some of its files go to the home folder, which may be read-only."""
    base = (output / "wandb").resolve()
    for variable, folder in (("WANDB_DATA_DIR", "data"), ("WANDB_CACHE_DIR", "cache"), ("WANDB_CONFIG_DIR", "config")):
        if not os.environ.get(variable):
            (base / folder).mkdir(parents=True, exist_ok=True)
            os.environ[variable] = str(base / folder)


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message, without the API key should it be in there."""
    text = str(error).splitlines()[0] if str(error) else "no message"
    key = os.environ.get("WANDB_API_KEY")
    return f"{type(error).__name__}: {text.replace(key, '***') if key else text}"
