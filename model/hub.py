"""A model folder by its path, or by its name on a hub of models (when `huggingface_hub` is there).

Only configurations, tokenizers and safetensors are fetched: no pickles, no code. The copy lies in
that package's cache, under the commit it came from, and is not fetched twice.
"""

import os
import re
from pathlib import Path

from model.errors import ModelError

PATTERNS = ("*.json", "*.safetensors", "*.txt")
_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")


def model_folder(source: str | Path) -> Path:
    """`source` where it is a folder; else the hub's `owner/name` or `owner/name@revision`.

    Raises ModelError when it is neither, or when the hub does not give it.
    """
    path = Path(source)
    found = None if isinstance(source, Path) else _HUB_NAME.fullmatch(source)
    if path.exists() or found is None:
        return path
    problem = f"{source} is no folder here, and as the name of a model on a hub "
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        raise ModelError(
            f"{problem}it needs the package huggingface_hub: give the path of a model folder, or "
            "install huggingface_hub"
        ) from None
    try:
        copy = huggingface_hub.snapshot_download(
            found["name"],
            revision=found["revision"],
            allow_patterns=list(PATTERNS),
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ModelError(
            f"{problem}it was not given ({type(error).__name__}: {reason[:200]}): check the name, "
            "the network and the access, or give the path of a model folder"
        ) from None
    return Path(copy)
